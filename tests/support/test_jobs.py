"""A failing case of a job fails alone."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.support.jobs import result, run_each

pytestmark = pytest.mark.parallel


def square(platform: Any, value: int) -> int:
    if value == 2 and platform.rank == 1:
        raise ValueError("rank 1 does not like 2")
    if value == 4:
        os._exit(3)
    return value * value


def test_a_failing_case_does_not_hide_the_others() -> None:
    outcomes = run_each(square, 2, {str(value): (value,) for value in range(6)})
    assert {name: result(outcomes, name) for name in "0135"} == {"0": 0, "1": 1, "3": 9, "5": 25}
    with pytest.raises(AssertionError, match=r"(?s)2 failed:.*rank 1 does not like 2"):
        result(outcomes, "2")
    with pytest.raises(AssertionError, match="4 failed"):
        result(outcomes, "4")
