"""Hugging Face model directories: architecture, weight mapping, safetensors, model card."""
