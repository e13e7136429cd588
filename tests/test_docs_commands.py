"""Every command of README and docs: the parser knows it, its files and config keys exist. Those that need nothing are run."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_iwsft.cli import main as cli
from megatron_iwsft.config.describe import fields
from megatron_iwsft.config.loader import load_config
from megatron_iwsft.config.schema import Config
from megatron_iwsft.errors import UserError
from megatron_iwsft.experiments.control.config import Experiment
from tests.support import ROOT, command_environment, tiny
from tests.test_docs import DOCUMENTS

# Programs of others.
FOREIGN = frozenset(
    "pip .venv/bin/pip python3 .venv/bin/python hf docker mkdir head source cd export torchrun srun mkdocs tensorboard wandb vllm "
    "lm_eval lighteval trl llama-server ollama curl jq tail cat ls pgrep kill".split()
)
FOREIGN_MODULES = {"sglang.launch_server", "vllm.entrypoints.openai.api_server", "pip", "mkdocs"}
# A script of this repository that is another name of a command.
ALIASES = {
    "shard_corpus": "shard",
    "inspect_corpus": "inspect",
    "inspect_checkpoint": "inspect",
    "precompute_reference": "reference",
}
WRAPPERS = {"launch/train.py": "train", "slurm/evaluate.sbatch": "evaluate", "slurm/shard_corpus.sbatch": "shard"}
PLACEHOLDER = re.compile(r"…|\.\.\.|[\[\]{}|]")
# Of a run, and of the control experiments.
KEYS = {key for schema in (Config, Experiment) for key, _ in fields(schema)}


@dataclass(frozen=True)
class Command:
    """words: without what a shell would take away. complete: from a block, so that it can be parsed as it stands."""

    document: Path
    words: tuple[str, ...]
    complete: bool

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}: {' '.join(self.words)}"


def commands() -> Iterator[Command]:
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                yield from split(document, line, complete=True)
        for span in re.findall(
            r"`((?:iwsft|bash|python|sbatch) [^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        ):
            yield from split(document, span.replace("\\|", "|"), complete=False)


def split(document: Path, line: str, *, complete: bool) -> Iterator[Command]:
    """The commands of a line: between `&&`, `;` and pipes, without comments and variables that are set for them."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= {";", "&"}:
            if words:
                yield Command(document, tuple(words), complete)
            words = []
        elif words or not re.fullmatch(r"\w+=\S*", word):
            words.append(word)


COMMANDS = list(commands())


def subcommand(command: Command) -> tuple[str, list[str]] | None:
    """(name, arguments) of an `iwsft` command, however it is started."""
    words = list(command.words)
    if "megatron_iwsft" in words:  # python -m megatron_iwsft, and under a launcher
        words = ["iwsft", *words[words.index("megatron_iwsft") + 1 :]]
    for script, name in WRAPPERS.items():
        if script in words:
            return name, words[words.index(script) + 1 :]
    if len(words) > 1 and re.fullmatch(r"(python )?tools/\w+\.py", " ".join(words[:2])):
        stem = Path(words[1]).stem
        rest = words[2:]
        if stem == "convert_hf":
            return (rest[0], rest[1:]) if rest else None
        return ALIASES.get(stem, stem.replace("_", "-")), rest
    return (words[1], words[2:]) if words[0] == "iwsft" and len(words) > 1 else None


def check_options(command: Command, parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    for word in arguments:
        name = word.partition("=")[0]
        if re.fullmatch(r"--[a-z][\w-]*", name):
            assert name in parser._option_string_actions, f"{command}: no option {name}"


def check_overrides(command: Command, arguments: list[str]) -> None:
    """section.key=value: the keys exist; on a config that ships, their values are valid, too."""
    overrides = [word for word in arguments if re.fullmatch(r"[a-z]+\.[\w.]+=.*", word)]
    for word in overrides:
        assert word.partition("=")[0] in KEYS, f"{command}: no config key {word}"
    configs = [word for word in arguments if re.fullmatch(r"configs/[\w./-]+\.yaml", word)]
    for path in configs:
        assert (ROOT / path).is_file(), f"{command}: no {path}"
        if not Path(path).name.startswith("control-"):
            load_config(ROOT / path, [word for word in overrides if "…" not in word])


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_the_program_has_what_a_command_names(command: Command) -> None:
    found = subcommand(command)
    if found is not None:
        name, arguments = found
        if PLACEHOLDER.search(name) or name.startswith("--") or name in ("COMMAND", "SUBCOMMAND", "NAME"):
            return
        assert name in cli.COMMANDS, f"{command}: no command {name}"
        parser = cli.command_parser(name)
        check_options(command, parser, arguments)
        check_overrides(command, arguments)
        if command.complete and not PLACEHOLDER.search(" ".join(arguments)):
            parser.parse_known_args(arguments)  # raises ConfigError for a missing or malformed one
        return
    words = [word for word in command.words if word not in ("bash", "python", "-m", "sbatch", "$(which")]
    scripts = [word for word in words if re.fullmatch(r"(?:launch|tools|tests|slurm|examples|\.ci)/[\w./-]+", word)]
    if command.words[:2] == ("python", "-m") and command.words[2] in FOREIGN_MODULES:
        return
    if not scripts:
        assert command.words[0] in FOREIGN or not command.complete or PLACEHOLDER.search(command.words[0]), (
            f"{command}: what is it?"
        )
        return
    script = ROOT / scripts[0]
    assert script.is_file(), f"{command}: no {scripts[0]}"
    if script.suffix == ".py":  # the benchmarks share options
        source = "".join(path.read_text(encoding="utf-8") for path in (script, *script.parent.glob("*.py")))
        for word in words[words.index(scripts[0]) + 1 :]:
            option = word.partition("=")[0].rstrip(",;.")
            assert not option.startswith("--") or f'"{option}"' in source, f"{command}: no option {option}"
    check_overrides(command, words)


RUNNABLE = {"config", "layouts", "reference-costs"}


@pytest.mark.parametrize(
    "command",
    [
        c
        for c in COMMANDS
        if c.complete and (found := subcommand(c)) and found[0] in RUNNABLE and not PLACEHOLDER.search(str(c))
    ],
    ids=str,
)
def test_a_command_that_needs_no_files_runs(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a directory with the configs that ship and the architectures of the models that they name."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copy(ROOT / "configs" / "own-data.yaml", tmp_path / "CONFIG.yaml")
    found = subcommand(command)
    assert found is not None
    name, arguments = found
    if "--model" in arguments:
        model = tmp_path / arguments[arguments.index("--model") + 1].lstrip("/")
        arguments[arguments.index("--model") + 1] = str(model)
        known = [path for path in (ROOT / "configs" / "models").glob("*.json") if path.stem.startswith(model.name)]
        if not known:
            pytest.skip(f"configs/models has no {model.name}")
        model.mkdir(parents=True)
        shutil.copy(known[0], model / "config.json")
    monkeypatch.chdir(tmp_path)
    assert not cli.run([name, *arguments])


@pytest.mark.slow
@pytest.mark.command
def test_the_commands_for_own_data_run(tmp_path: Path) -> None:
    """README's, in their order, then those that docs/start/cpu.md adds; with a small model in the place of the downloaded one."""
    readme = [c.words for c in COMMANDS if c.complete and c.document == ROOT / "README.md"]
    added = [
        c.words
        for c in COMMANDS
        if c.document.name == "cpu.md" and c.words[:2] in (("iwsft", "inspect"), ("iwsft", "doctor"))
    ]
    model = tmp_path / "models" / "SmolLM2-135M-Instruct"
    tiny.hf_model(tiny.hf_tokenizer(model), "llama", vocab_size=400, max_position_embeddings=1024)
    records = [{"prompt": f"What is {k} plus 2?", "response": f"It is {k + 2}.", "score": k % 3 / 2} for k in range(40)]
    tiny.write_jsonl(tmp_path / "records.jsonl", records)
    tiny.write_jsonl(tmp_path / "problems.jsonl", [{"question": "What is 1 plus 2?", "answer": "3"}])
    for directory in ("configs", "launch"):
        (tmp_path / directory).symlink_to(ROOT / directory)
    programs = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "IWSFT_PYTHON": sys.executable}
    for words in [*readme[1 + readme.index(("source", ".venv/bin/activate")) :], *added]:
        if words[0] == "hf":
            continue
        done = subprocess.run(
            words,
            cwd=tmp_path,
            env=command_environment(**programs),
            input="What is 3 plus 2?\n",
            text=True,
            capture_output=True,
        )
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"
    assert (tmp_path / "models" / "mine" / "config.json").exists() and list((tmp_path / "runs").rglob("*.html"))


@pytest.mark.parametrize(
    ("document", "block"),
    [
        (document, block)
        for document in DOCUMENTS
        for block in re.findall(
            r"```python\n(import torch\nimport megatron_iwsft.*?)```", document.read_text(encoding="utf-8"), re.DOTALL
        )
    ],
    ids=lambda value: value.name if isinstance(value, Path) else "",
)
def test_a_complete_python_block_runs(document: Path, block: str) -> None:
    names: dict = {}
    exec(compile(block, str(document), "exec"), names)
    gradient = names["policy"].grad
    assert gradient[0] < gradient[3] < 0  # the trajectory that the policy prefers has the larger weight


def test_wrong_commands_are_found() -> None:
    def check(line: str) -> None:
        for command in split(ROOT / "README.md", line, complete=True):
            test_the_program_has_what_a_command_names(command)

    check(
        "iwsft shard a.jsonl --output DIR --tokenizer T && bash launch/local.sh 2 configs/gsm8k-sft.yaml optimizer.lr=1.0e-3"
    )
    for line in (
        "iwsft shrad a.jsonl",
        "iwsft shard a.jsonl --output DIR --tokenizer T --min-scores 1",
        "python -m megatron_iwsft.distributed.torchrun --nproc_per_node 2 -m megatron_iwsft train --config configs/none.yaml",
        "bash launch/local.sh 2 configs/gsm8k-sft.yaml optimizer.learning_rate=1",
        "bash launch/none.sh",
        "python tools/bench/learning.py --experiment 0 --nothing",
        "frobnicate",
    ):
        with pytest.raises((AssertionError, UserError)):
            check(line)
    with pytest.raises(UserError):
        check("iwsft shard --output DIR --tokenizer T")
