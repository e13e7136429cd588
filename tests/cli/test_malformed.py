"""Three hundred malformed configs and command lines: each ends with status 2 and one message, before torch is imported."""

from __future__ import annotations

import json

import pytest

from tests.support import run_python


@pytest.mark.slow
@pytest.mark.command
def test_every_malformed_config_and_command_line_gets_one_message() -> None:
    done = run_python("-m", "tests.support.malformed_commands")
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) >= 300
    wrong = [
        case
        for case in found
        if case["status"] != 2
        or case["expected"] not in case["output"]
        or "Traceback" in case["output"]
        or case["output"].count("Error: ") != 1
        or case["torch"]
    ]
    assert wrong == []
