"""Checkpoints to and from Hugging Face directories, and their parity."""
