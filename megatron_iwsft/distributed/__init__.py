"""Devices, process groups, parallel layouts, Megatron-Core without CUDA, signals, the watchdog."""
