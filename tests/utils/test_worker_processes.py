"""How commands start worker processes."""

from __future__ import annotations

import pytest

from megatron_iwsft.utils.worker_processes import worker_context
from tests.support import run_python


@pytest.mark.parametrize(("chosen", "used"), [(None, "spawn"), ("fork", "spawn"), ("forkserver", "forkserver")])
def test_workers_are_never_forked_from_a_program_that_may_have_threads(monkeypatch, chosen: str, used: str) -> None:
    monkeypatch.setattr("multiprocessing.get_start_method", lambda allow_none: chosen)
    assert worker_context().get_start_method() == used


@pytest.mark.command
def test_workers_share_what_the_forkserver_imported() -> None:
    script = """
import sys
from concurrent.futures import ProcessPoolExecutor
from megatron_iwsft.utils.worker_processes import start_forkserver, worker_context
start_forkserver(["fractions"])
with ProcessPoolExecutor(1, worker_context()) as pool:
    print("fractions" in sys.modules, pool.submit(eval, "'fractions' in __import__('sys').modules").result())
"""
    ran = run_python("-c", script)
    assert ran.stdout.split() == ["False", "True"], ran.stderr
