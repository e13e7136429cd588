"""Progress where there is no terminal."""

from __future__ import annotations

import pytest

from megatron_iwsft.utils import progress as module


def test_a_log_gets_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "_LINE_EVERY_S", 0.0)
    assert list(module.progress(range(3), "scoring", unit="trajectories")) == [0, 1, 2]
    with module.progress(None, "answers", unit="problems", total=10, done=4) as bar:
        bar.update(3)
    said = capsys.readouterr().err.splitlines()
    assert "scoring: 2 of 3 trajectories, 00:00 left" in said and "answers: 7 of 10 problems, 00:00 left" in said
    assert not any("\r" in line or "|" in line for line in said)


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(module.progress(range(3), "scoring", unit="trajectories")) == [0, 1, 2]
    assert list(module.progress(range(3), "scoring", unit="trajectories", shown=False)) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")
