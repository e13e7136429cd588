"""What training reads: the corpus directory, its tokenizer and template, sampling, packing, batches."""
