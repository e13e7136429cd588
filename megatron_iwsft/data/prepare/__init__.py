"""Build a corpus directory from records: read, render, tokenize, filter, deduplicate, write."""
