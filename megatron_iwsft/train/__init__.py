"""A training run: setup, step, optimizer, callbacks, continuation."""
