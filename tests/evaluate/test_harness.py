"""What lm-evaluation-harness is called with. It is not installed where the tests run: a stand-in keeps its arguments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_iwsft.cli import main as cli
from megatron_iwsft.errors import ConfigError


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that looks like a model's, where a stand-in is installed."""
    package = tmp_path / "site" / "lm_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        f"import json, sys\njson.dump(sys.argv[1:], open('{tmp_path}/arguments.json', 'w'))\nsys.exit('refused' in sys.argv)\n"
    )
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    return tmp_path / "mine"


@pytest.mark.command
def test_tasks_are_run_with_the_chat_template_and_further_arguments(model: Path, tmp_path: Path) -> None:
    command = ["evaluate", "--model", str(model), "--output", str(tmp_path / "out"), "--tasks", "gsm8k_cot,ifeval"]
    cli.run([*command, "--limit", "5", "--num_fewshot", "0"])
    expected = ["--model", "hf", "--model_args", f"pretrained={model}", "--tasks", "gsm8k_cot,ifeval"]
    expected += ["--batch_size", "16", "--output_path", str(tmp_path / "out" / "lm_eval" / "mine")]
    expected += ["--apply_chat_template", "--limit", "5", "--num_fewshot", "0"]
    assert json.loads((tmp_path / "arguments.json").read_text()) == expected
    cli.run([*command, "--raw"])
    assert "--apply_chat_template" not in json.loads((tmp_path / "arguments.json").read_text())
    with pytest.raises(ConfigError, match=r"lm_eval exited with status 1: .* refused"):
        cli.run([*command, "refused"])
