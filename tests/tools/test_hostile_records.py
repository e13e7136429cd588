"""The bench of hostile records, on fewer of them."""

from __future__ import annotations

import pytest

from tests.support import run_python

pytestmark = [pytest.mark.command]


def test_every_hostile_line_is_kept_or_dropped_once() -> None:
    ran = run_python("tools/bench/hostile_records.py", "--records", "20000", "--seed", "5", "--workers", "2")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "Traceback" not in ran.stderr
    assert ran.stdout.splitlines()[-1].endswith("not blank: 0 problems")
