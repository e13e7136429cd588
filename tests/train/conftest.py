"""Fixtures that several files here share."""

from __future__ import annotations

import pytest

from megatron_iwsft.testing import run_distributed
from tests.support import iw_sft_runs, tiny
from tests.support.shared_runs import SharedRuns


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> SharedRuns:
    """The runs of tests/support/iw_sft_runs.py."""
    directory = tmp_path_factory.mktemp("iw-sft")
    tiny.token_corpus(directory, tiny.LENGTHS, scores=True)
    run_distributed(iw_sft_runs.sft_and_sidecar, 2, directory)
    return SharedRuns(directory, iw_sft_runs.prepare, iw_sft_runs.GROUPS)
