"""The iwsft command: help without heavy imports, consistent options, and the commands that need no model."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
from pathlib import Path

import pytest
import yaml

from megatron_iwsft.cli import main as cli
from megatron_iwsft.config.describe import fields
from megatron_iwsft.config.schema import Config
from megatron_iwsft.errors import ConfigError, DataError
from megatron_iwsft.version import __version__
from tests.support import run_python, tiny, torchrun
from tests.support.malformed_commands import VALID

HEAVY = ("torch", "numpy", "pydantic", "yaml", "transformers", "megatron.core")


def iwsft(*arguments: str, command: tuple[str, ...] = ("-m", "megatron_iwsft")) -> subprocess.CompletedProcess[str]:
    return run_python(*command, *arguments)


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config with a space.yaml"
    path.write_text(json.dumps(VALID | {"objective": {"name": "sft"}}))
    return str(path)


@pytest.mark.command
@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([name, "--help"] for name in cli.COMMANDS)], ids=" ".join
)
def test_help_imports_no_heavy_package(arguments: list[str]) -> None:
    done = iwsft(*arguments, command=("-X", "importtime", "-m", "megatron_iwsft"))
    assert done.returncode == 0, done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert imported.isdisjoint(HEAVY)


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text and summary in text for name, (_, summary) in cli.COMMANDS.items())
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"megatron-iwsft {__version__}\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_documents_purpose_example_and_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.run([name, "--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert f"iwsft {name}" in text.partition("example")[2]
    module = importlib.import_module(f"megatron_iwsft.cli.{cli.COMMANDS[name][0]}")
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    assert all(action.help for action in parser._actions)


def test_an_option_of_one_name_takes_the_same_thing_in_every_command() -> None:
    taken: dict[str, set[str]] = {}
    for name in cli.COMMANDS:
        for action in cli.command_parser(name)._actions:
            kind = "a flag" if action.nargs == 0 else str(action.metavar or action.dest).partition(".")[0]
            for option in action.option_strings:
                taken.setdefault(option, set()).add(kind)
    several = {option: kinds for option, kinds in taken.items() if len(kinds) > 1}
    assert several.pop("--output") == {"DIR", "FILE"}
    assert several == {}


@pytest.mark.parametrize("name", cli.FORMER_OPTIONS)
def test_former_names_of_options_still_work(name: str) -> None:
    present = {option for action in cli.command_parser(name)._actions for option in action.option_strings}
    for former, option in cli.FORMER_OPTIONS[name].items():
        assert former not in present and option in present
        assert cli._present_names(name, [former, "a=b", f"{former}=c"]) == [option, "a=b", f"{option}=c"]


@pytest.mark.command
@pytest.mark.parametrize(
    ("script", "usage"),
    [
        ("launch/train.py", "usage: iwsft train"),
        ("tools/control.py", "usage: iwsft control"),
        ("tools/convert_hf.py", "usage: iwsft COMMAND"),
        ("tools/doctor.py", "usage: iwsft doctor"),
        ("tools/evaluate.py", "usage: iwsft evaluate"),
        ("tools/generate.py", "usage: iwsft generate"),
        ("tools/inspect_checkpoint.py", "usage: iwsft inspect"),
        ("tools/inspect_corpus.py", "usage: iwsft inspect"),
        ("tools/layouts.py", "usage: iwsft layouts"),
        ("tools/make_arithmetic.py", "usage: iwsft make-arithmetic"),
        ("tools/precompute_reference.py", "usage: iwsft reference"),
        ("tools/reference_costs.py", "usage: iwsft reference-costs"),
        ("tools/report.py", "usage: iwsft report"),
        ("tools/shard_corpus.py", "usage: iwsft shard"),
        ("tools/train_tokenizer.py", "usage: iwsft train-tokenizer"),
    ],
)
def test_a_script_is_an_alias(script: str, usage: str) -> None:
    done = iwsft("--help", command=(script,))
    assert done.returncode == 0 and done.stdout.startswith(usage), done.stdout + done.stderr


@pytest.mark.command
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("lay", ["layouts"]),
        ("layouts --back", ["--backend"]),
        ("layouts --backend ''", ["transformer_engine", "local"]),
        ("completion ''", ["bash", "zsh", "fish"]),
        ("shard --min-s", ["--min-score"]),
    ],
)
def test_bash_completes(words: str, expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["completion", "bash"])
    script = tmp_path / "completion.bash"
    script.write_text(capsys.readouterr().out)
    ask = f'''source {script}; function=$(complete -p iwsft | sed "s/.*-F \\([^ ]*\\).*/\\1/")
COMP_WORDS=(iwsft {words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
$function iwsft "${{COMP_WORDS[-1]}}" "${{COMP_WORDS[-2]}}"; printf "%s\\n" "${{COMPREPLY[@]}}"'''
    done = subprocess.run(["bash", "-c", ask], text=True, capture_output=True)
    assert done.stdout.split() == expected, done.stderr


def test_zsh_and_fish_know_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in ("zsh", "fish"):
        cli.run(["completion", shell])
        text = capsys.readouterr().out
        assert all(name in text for name in cli.COMMANDS) and "--near-duplicates" in text


@pytest.mark.command
def test_under_torchrun_a_mistake_is_reported_once(config: str) -> None:
    launcher = (*torchrun(2), "-m", "megatron_iwsft")
    done = iwsft("train", "--config", config, "data.seq_lenght=1", command=launcher)
    assert done.returncode == 2
    assert done.stderr.count("data.seq_lenght is not a known key. Did you mean seq_length?") == 1


def test_config_lists_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["config"])
    text = capsys.readouterr().out
    assert all(f"{key}: " in text or f"  {key} " in text for key, _ in fields(Config))
    assert "  data.packing                       best_fit | none; default best_fit\n" in text


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("data.seq_length", "data.seq_length\n  integer > 0\n  required\n\n  Tokens per sequence."),
        ("optimizer.betas", "list of (number ≥ 0, < 1) at least 2 items, at most 2 items\n  default [0.9, 0.95]"),
        ("parallel.layers_per_stage", "list of (integer > 0) | null\n  default null"),
        ("reference.refresh", "integer ≥ 0 | epoch\n  default 0"),
        ("precision.fp8", "delayed | tensorwise | blockwise | mxfp8 | null"),
        ("optimizer.eps", "number > 0\n  default 1e-08"),
        ("parallel.sequence", "true or false\n  default false"),
        ("model.config", "mapping | null"),
        ("objective.proposal", "objective.proposal.decay           number ≥ 0, < 1 | null; default null"),
    ],
)
def test_config_documents_a_field(key: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["config", "--field", key])
    assert expected in capsys.readouterr().out


def test_config_prints_the_resolved_config(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["config", config, "optimizer.lr=3e-5"])
    resolved = yaml.safe_load(capsys.readouterr().out)
    assert Config.model_validate(resolved).optimizer.lr == 3e-5
    assert resolved["data"]["packing"] == "best_fit"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--get", "run.dir"], "runs/r\n"),
        (["--get", "run.dir", "run.dir='a b'"], "a b\n"),
        (["--get", "data.max_steps", "--get", "optimizer.betas"], "null\n[0.9, 0.95]\n"),
        (["--null", "--get", "run.dir", "--get", "data.corpus", 'run.dir="a\\nb\\n"'], "a\nb\n\0c\0"),
        (["--get", "data.directories", "data.corpus=null", "data.corpora=[{corpus: a}, {corpus: b/c}]"], "a\nb/c\n"),
        (["--get", "parallel.sequence"], "false\n"),
        (["--get", "reference.needs_sidecar"], "false\n"),
        (["--get", "reference.needs_sidecar", "objective.name=iw_sft"], "true\n"),
        (["--get", "reference.needs_sidecar", "objective.name=iw_sft", "reference.source=live"], "false\n"),
    ],
)
@pytest.mark.parametrize("config_first", [True, False])
def test_config_prints_single_values(
    arguments: list[str], expected: str, config_first: bool, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [a for a in arguments if "=" in a]
    options = [a for a in arguments if "=" not in a]
    cli.run(["config", *([config, *options, *overrides] if config_first else [*options, config, *overrides])])
    assert capsys.readouterr().out == expected


def test_inspect_recognizes_a_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = tiny.token_corpus(tmp_path, [20, 30])
    assert cli.run(["inspect", str(corpus.directory), "--verify", "--seq-length", "64", "--trajectories", "0"]) == 0
    shown = capsys.readouterr().out
    assert "packed to 64" in shown and "trained tokens T" in shown and "exponent T/(T−τ), τ = 1 " in shown
    (corpus.directory / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"has no manifest\.json"):
        cli.run(["inspect", str(corpus.directory)])


def test_an_unknown_command_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown command 'evalute'\. Did you mean evaluate\?"):
        cli.run(["evalute"])
    with pytest.raises(ConfigError, match=r"unknown command 'train'\. Commands: import, export, verify\."):
        cli.run(["train"], commands=("import", "export", "verify"))
