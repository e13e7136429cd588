"""Experiments of the paper beyond language models."""
