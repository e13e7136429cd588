"""Megatron-Core's GPT model for an architecture, and what it costs."""
