"""The check of the corpus's content at the start of a run."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from megatron_iwsft.config.loader import load_config
from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.testing import run_distributed
from megatron_iwsft.train import setup
from tests.support.launched_runs import write_config

pytestmark = pytest.mark.parallel


def said_by_the_check(platform: Any, config_file: Path, announced_bytes: int) -> str:
    setup._ANNOUNCED_BYTES = announced_bytes
    config = load_config(str(config_file), [])
    with redirect_stdout(io.StringIO()) as output:
        setup._check_contents(Corpus.open(config.data.corpus), config, platform)
    return output.getvalue()


def test_a_long_check_is_announced(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    announced = run_distributed(said_by_the_check, 2, config, 1)
    assert announced == [
        f"checking {tmp_path}/corpus: each process reads 0.00 GiB (data.verify: full; `sample` reads less).\n",
        "",
    ]
    assert run_distributed(said_by_the_check, 1, config, 1 << 30) == [""]
