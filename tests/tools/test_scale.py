"""The bench of what grows with the ranks: its comparison of the packs' costs, and the rows that context parallelism pads."""

from __future__ import annotations

import re
import runpy

import pytest

from tests.support import ROOT


def test_packs_cost_the_same_pack_by_pack_and_rows_keep_their_length(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "tools" / "bench" / "scale.py"))["host_work"](packs=256)
    longest = {
        what: int(tokens.replace(",", ""))
        for what, tokens in re.findall(r"packed by (\w+).*?: ([\d,]+) tokens", capsys.readouterr().out)
    }
    assert longest["padded"] <= 32768 < longest["tokens"]
