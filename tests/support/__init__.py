"""What tests share: small generated inputs, an independent reference, runs started from the command line."""

from pathlib import Path

ROOT = Path(__file__).parents[2]  # of the checkout
