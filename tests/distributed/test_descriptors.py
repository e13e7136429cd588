"""A store serves more connections than the soft limit on open files allows, since the limit is raised."""

from __future__ import annotations

import datetime
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_iwsft.distributed.descriptors import CONNECTIONS_PER_RANK, largest_world, raise_descriptor_limit
from megatron_iwsft.distributed.doctor import _descriptors
from tests.support import ROOT, command_environment, run_python, torchrun

SOFT = 128
SERVER = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, ({SOFT}, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from megatron_iwsft.distributed.descriptors import raise_descriptor_limit
raise_descriptor_limit()
from megatron_iwsft.distributed.loopback import loopback_store
store = loopback_store()
print(store.port, flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_a_store_serves_more_connections_than_the_soft_limit() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env=command_environment(),
    ) as server:  # fmt: skip
        assert server.stdin is not None and server.stdout is not None
        port = int(server.stdout.readline())
        timeout = datetime.timedelta(seconds=20)
        clients = []
        for number in range(2 * SOFT):
            clients.append(dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timeout))
            clients[-1].set(str(number), "here")
        assert clients[0].get(str(2 * SOFT - 1)) == b"here"
        del clients
        server.stdin.close()


LOWERED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (200, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
WORKER = """
import resource
inherited, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
from megatron_iwsft.distributed import context
context.start("cpu")
print(inherited == hard, resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard)
"""


@pytest.mark.command
def test_the_launcher_and_every_rank_raise_the_limit(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    found = run_python("-c", LOWERED, *torchrun(1), tmp_path / "worker.py")
    assert found.stdout.split() == ["True", "True"], found.stderr


@pytest.mark.parametrize(("hard", "enough"), [(1 << 20, True), (4096, True), (1024, False)])
def test_the_doctor_says_for_how_many_ranks_the_limit_is_enough(
    hard: int, enough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, hard))
    found = _descriptors()
    assert found.ok == enough
    assert f"{hard:,}" in found.found and f"up to {largest_world(hard):,} processes" in found.means


def test_the_largest_world_fits_the_limit() -> None:
    limit = raise_descriptor_limit()
    assert CONNECTIONS_PER_RANK * largest_world(limit) < limit
    assert largest_world(1024) < 1024, "the usual soft limit is too low for a thousand ranks"
