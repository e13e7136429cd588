"""`iwsft reference` on a small disk that is filled before, and while, it computes. test_damaged_logprobs runs this in a mount namespace.

Prints one JSON object: each call's exit status and output, and what was in the sidecar after it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.support import ROOT, command_environment
from tests.support.small_disk import fill_disk


def main(config: Path, corpus: Path, mount: Path) -> None:
    copy = Path(shutil.copytree(corpus, mount / "corpus"))
    command = [sys.executable, "-m", "megatron_iwsft", "reference", "--config", str(config), f"data.corpus={copy}"]
    partial = "reference-*/shard-00000.bin.partial"

    def call(meanwhile: Callable[[], object] = lambda: None) -> dict:
        process = subprocess.Popen(
            command, cwd=ROOT, env=command_environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        meanwhile()
        output = process.communicate(timeout=240)[0]
        files = sorted(p.name for p in copy.glob("reference-*/*"))
        return {"status": process.returncode, "output": output, "files": files}

    def fill_once_begun() -> None:
        while not list(copy.glob(partial)):
            time.sleep(0.01)
        fill_disk(mount / "filler", leaving=0)

    fill_disk(mount / "filler", leaving=0)
    found = [call()]
    (mount / "filler").unlink()
    found.append(call(fill_once_begun))
    (mount / "filler").unlink()
    found.append(call())
    (values,) = copy.glob("reference-*/shard-00000.bin")
    print(json.dumps({"calls": found, "values": values.read_bytes().hex()}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
