"""Records to corpus directory: read, render, tokenize, filter, deduplicate, write."""
