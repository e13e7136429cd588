"""Run task suites with EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_iwsft.errors import ConfigError


def run_harness(
    directory: Path,
    tasks: str,
    output: Path,
    *,
    batch_size: int,
    limit: int | None = None,
    raw: bool = False,
    more: Sequence[str] = (),
) -> None:
    """Run `lm_eval` on a Hugging Face directory, with its chat template unless `raw`, and write the results to `output`.

    tasks: comma-separated names; limit: problems per task; more: further arguments for lm_eval.
    Raises ConfigError if the harness is not installed or fails; lm_eval prints the reason itself.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--tasks needs lm-evaluation-harness: pip install 'lm-eval[hf]'.")
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={directory}"]
    command += ["--tasks", tasks, "--batch_size", str(batch_size), "--output_path", str(output)]
    command += [] if raw else ["--apply_chat_template"]
    command += [] if limit is None else ["--limit", str(limit)]
    command += more
    status = subprocess.run(command, check=False).returncode
    if status:
        raise ConfigError(
            f"lm_eval exited with status {status}: {' '.join(command)}. "
            "Run that command to see its messages, and correct its arguments."
        )
