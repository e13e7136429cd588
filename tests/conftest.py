"""How pytest-xdist deals the tests to its workers: tests/run.sh starts two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

# Files of tests/train that share most of the runs of its conftest.py, which every worker trains for itself.
SHARED_RUNS = {f"tests/train/test_{name}.py" for name in ("layout_curves", "outputs", "references", "resume")}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A worker's files that start jobs come first: the last ones are short, so that no worker waits long for the other."""
    if not hasattr(config, "workerinput"):
        return
    cost: dict[Path, int] = {}
    for item in items:
        own = sum(2**k for k, mark in enumerate(("command", "parallel", "slow")) if item.get_closest_marker(mark))
        cost[item.path] = max(own, cost.get(item.path, 0))
    items.sort(key=lambda item: -cost[item.path])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The tests of a file go to one worker, since they share fixtures."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "shared runs" if file in SHARED_RUNS else file

    config.option.loadscopereorder = False  # keep the order above, instead of starting with the files of most tests
    return Scheduling(config, log)
