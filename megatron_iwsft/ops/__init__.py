"""Vocabulary-parallel log-probs."""
