"""Continuous control: the seed paper's second domain, on the objective functions that train the language models.

A trajectory is an episode, a token one of its steps, and log π a Gaussian's density. `experiment` is the whole in order:
`learner` (a policy in training and what it did) → `replay` → `tuning` (BC, SFT, iw-SFT) → `environment.evaluate` → table.
"""
