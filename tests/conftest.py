"""How pytest-xdist deals the tests to its workers: tests/run.sh starts two."""

from __future__ import annotations

from typing import Any

import pytest

# Files of tests/train that share most of the runs of its conftest.py, which every worker trains for itself.
SHARED_RUNS = {f"tests/train/test_{name}.py" for name in ("layout_curves", "outputs", "references", "resume")}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A worker gets whole files, whose tests share fixtures."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "shared runs" if file in SHARED_RUNS else file

    return Scheduling(config, log)
