"""Continuous control, the paper's second domain, with the same objective functions as the language models.

A trajectory is an episode, a token is one of its steps, and log π is a Gaussian log-density. `experiment` runs all stages:
`learner` (PPO, records its episodes) → `replay` → `tuning` (BC, SFT, iw-SFT) → `environment.evaluate` → table.
"""
