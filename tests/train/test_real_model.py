"""SmolLM2-135M-Instruct from its Hugging Face directory through iw-SFT and back; the export is verified with `transformers`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from megatron_iwsft.checkpoint.initial_weights import InitialWeights
from megatron_iwsft.config.schema import Model
from megatron_iwsft.convert.parity import checkpoint_logprobs, verify
from megatron_iwsft.distributed.context import Platform
from megatron_iwsft.distributed.spawn import run_job
from megatron_iwsft.model.gpt import ModelSettings, build_model
from megatron_iwsft.testing import comparable_metrics
from tests.support import real, run_python, torchrun

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.parallel]

QUESTIONS = ["What is 12 plus 30?", "Name the capital of France."]
NEW_TOKENS = 12


def run(*arguments: str | Path) -> str:
    done = run_python(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path, list[dict]]:
    """(home, Hugging Face directory, metrics): imported, sharded, referenced, trained for 2 + 2 steps at PP 2, and exported."""
    hf, home = real.smollm2(), tmp_path_factory.mktemp("real")
    run("-m", "megatron_iwsft", "make-arithmetic", "--output", home / "sums.jsonl", "--count", "48", "--wrong", "0.2")
    run("-m", "megatron_iwsft", "shard", home / "sums.jsonl", "--output", home / "corpus", "--tokenizer", hf)
    run("-m", "megatron_iwsft", "import", "--model", hf, "--output", home / "imported")
    config = {
        "run": {"name": "real", "dir": str(home / "run"), "seed": 1, "device": "cpu"},
        "model": {"checkpoint": str(home / "imported")},
        "data": {"corpus": str(home / "corpus"), "seq_length": 256, "global_batch_size": 2, "max_steps": 4},
        "objective": {"name": "iw_sft"},
        "reference": {"source": "cached"},
        "parallel": {"pipeline": 2},
        "precision": {"dtype": "fp32"},
        "optimizer": {"lr": 2.0e-5, "schedule": "constant", "warmup_fraction": 0.0},
        "checkpoint": {"every": 2},
    }
    (home / "config.yaml").write_text(yaml.safe_dump(config))
    run(*torchrun(2), "-m", "megatron_iwsft", "reference", "--config", home / "config.yaml")
    for steps in (2, 4):  # the second run resumes the first
        run(*torchrun(2), "-m", "megatron_iwsft", "train", "--config", home / "config.yaml", f"data.max_steps={steps}")
    run("-m", "megatron_iwsft", "export", "--checkpoint", home / "run", "--output", home / "exported")
    return home, hf, comparable_metrics(home / "run")


def test_weights_are_one_until_the_first_update_and_then_differ(trained) -> None:
    _, _, metrics = trained
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    assert abs(metrics[0]["weight_mean"] - 1) <= 1e-6 and abs(metrics[0]["weight_max"] - 1) <= 1e-6
    assert abs(metrics[-1]["weight_mean"] - 1) > 1e-3
    assert metrics[-1]["nll"] < metrics[0]["nll"]


def test_the_export_equals_the_checkpoint_in_transformers(trained) -> None:
    home, _, _ = trained
    text = "Ann has 3 boxes of 12 pencils and gives 5 away. 3 * 12 = 36, and 36 - 5 = 31."
    (parity,) = verify(home / "exported", home / "run", text, lengths=[32])
    assert parity.max_difference <= 1e-4


def test_greedy_answers_of_the_export_equal_those_of_the_checkpoint(trained) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    home, hf, _ = trained
    tokenizer = AutoTokenizer.from_pretrained(home / "exported")
    model = AutoModelForCausalLM.from_pretrained(home / "exported", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    prompts, answers = [], []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        generated = model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist()
        prompts.append(ids["input_ids"][0].tolist())
        answers.append(generated[len(prompts[-1]) :])
        assert not torch.equal(model(**ids).logits, base(**ids).logits)  # the export is the trained model, not the base
    (found,) = run_job(_greedy, 1, str(home / "run"), prompts, [len(answer) for answer in answers])
    assert found == answers


def _greedy(platform: Platform, run: str, prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
    """The most likely continuations under a run's last checkpoint, from the hidden states of its Megatron-Core model."""
    latest = Path(run) / "checkpoints" / (Path(run) / "checkpoints" / "latest").read_text().strip()
    weights, parallel = InitialWeights(Model(checkpoint=str(latest)), seed=0), platform.parallel()
    (model,) = build_model(weights.architecture, parallel, platform, ModelSettings(dtype=torch.float32))
    weights.load([model], parallel)
    hidden: list[torch.Tensor] = []
    embedding = next(p for name, p in model.named_parameters() if name.endswith("word_embeddings.weight"))
    norm = next(m for name, m in model.named_modules() if name.endswith("decoder.final_layernorm"))
    norm.register_forward_hook(lambda _module, _inputs, output: hidden.append(output))
    answers = []
    for prompt, length in zip(prompts, lengths, strict=True):
        ids = list(prompt)
        for _ in range(length):
            checkpoint_logprobs(model, ids)
            ids.append(int((hidden[-1].reshape(len(ids), -1)[-1] @ embedding.T).argmax()))
        answers.append(ids[len(prompt) :])
    return answers
