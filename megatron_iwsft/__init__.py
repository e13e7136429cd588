"""Importance-weighted supervised fine-tuning on Megatron-Core."""

from megatron_iwsft.version import __version__ as __version__
