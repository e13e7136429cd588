"""What tests share: small generated inputs, an independent reference, runs started from the command line."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]  # of the checkout


def command_environment(**more: str) -> dict[str, str]:
    """For a command that must import the package from this checkout, whatever is installed."""
    return (
        os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])} | more
    )
