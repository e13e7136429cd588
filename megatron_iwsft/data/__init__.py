"""The training data: corpus directory, tokenizer, chat template, sampling, packing and batches."""
