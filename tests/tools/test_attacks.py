"""The bench of random attacks, for a short while."""

from __future__ import annotations

import pytest

from tests.support import run_python

pytestmark = [pytest.mark.slow, pytest.mark.command]


def test_random_attacks_are_held() -> None:
    ran = run_python("tools/bench/attacks.py", "--attacks", "60", "--seed", "7", OMP_NUM_THREADS="1")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    name, tried, held = ran.stdout.splitlines()[-1].split()
    assert (name, tried, held) == ("all", "60", "60")
