"""The vocabulary-parallel log-prob operator."""
