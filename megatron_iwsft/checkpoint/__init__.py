"""Checkpoints: what they hold, writing, loading, verifying."""
