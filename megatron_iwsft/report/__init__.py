"""A page about finished or running runs."""
