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
from tests.support import real, run_python, tiny, torchrun

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.parallel]

# Word problems in GSM8K's format.
PROBLEMS = [
    (
        "Ann has 3 boxes of 12 pencils and gives 5 pencils to Tom. How many pencils does she have left?",
        "Ann has 3 * 12 = <<3*12=36>>36 pencils.\nAfter giving 5 away she has 36 - 5 = <<36-5=31>>31.\n#### 31",
    ),
    (
        "A train travels 60 kilometers per hour for 2 hours and then 45 kilometers. How far does it travel?",
        "In 2 hours it travels 60 * 2 = <<60*2=120>>120 kilometers.\nIn all 120 + 45 = <<120+45=165>>165.\n#### 165",
    ),
    (
        "A baker sells 24 rolls in the morning and half as many in the afternoon. Each costs $2. What does she earn?",
        "In the afternoon she sells 24 / 2 = <<24/2=12>>12 rolls.\nShe sells 24 + 12 = <<24+12=36>>36 rolls.\n"
        "She earns 36 * 2 = $<<36*2=72>>72.\n#### 72",
    ),
    (
        "Leo reads 15 pages a day. His book has 180 pages, and he has read 30. How many more days does he need?",
        "He has 180 - 30 = <<180-30=150>>150 pages left.\nHe needs 150 / 15 = <<150/15=10>>10 days.\n#### 10",
    ),
    (
        "A shop had 50 apples, sold 3/5 of them and threw 4 away. How many apples are left?",
        "It sold 50 * 3 / 5 = <<50*3/5=30>>30 apples.\nThere are 50 - 30 - 4 = <<50-30-4=16>>16 left.\n#### 16",
    ),
    (
        "Mia saves $8 a week. After 6 weeks she buys a $20 game. How much money does she have?",
        "She saves 8 * 6 = $<<8*6=48>>48.\nShe has 48 - 20 = $<<48-20=28>>28 left.\n#### 28",
    ),
    (
        "A tank of 200 liters is a quarter full. A pump adds 10 liters per minute. How many minutes until it is full?",
        "It holds 200 / 4 = <<200/4=50>>50 liters.\n200 - 50 = <<200-50=150>>150 liters are missing.\n"
        "That takes 150 / 10 = <<150/10=15>>15 minutes.\n#### 15",
    ),
    (
        "Sam is twice as old as Eve, who is 3 years older than Max. Max is 9. How old is Sam?",
        "Eve is 9 + 3 = <<9+3=12>>12.\nSam is 12 * 2 = <<12*2=24>>24.\n#### 24",
    ),
]
QUESTIONS = ["What is 12 plus 30?", "Name the capital of France."]
NEW_TOKENS = 12


def run(*arguments: str | Path) -> str:
    done = run_python(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path, list[dict]]:
    """(home, Hugging Face directory, metrics): imported, sharded, referenced, trained for 2 + 1 steps at PP 2, and exported.

    home/straight is the same run, of 3 steps without an interruption.
    """
    hf, home = real.smollm2(), tmp_path_factory.mktemp("real")
    problems = [{"question": question, "answer": answer} for question, answer in PROBLEMS]
    source = tiny.write_jsonl(home / "problems.jsonl", problems)
    fields = ["--prompt-field", "question", "--response-field", "answer"]
    run("-m", "megatron_iwsft", "shard", source, *fields, "--output", home / "corpus", "--tokenizer", hf)
    run("-m", "megatron_iwsft", "import", "--model", hf, "--output", home / "imported")
    config = {
        "run": {"name": "real", "dir": str(home / "run"), "seed": 1, "device": "cpu"},
        "model": {"checkpoint": str(home / "imported")},
        "data": {"corpus": str(home / "corpus"), "seq_length": 256, "global_batch_size": 2, "max_steps": 3},
        "objective": {"name": "iw_sft"},
        "reference": {"source": "cached"},
        "parallel": {"pipeline": 2},
        "precision": {"dtype": "fp32"},
        "optimizer": {"lr": 2.0e-5, "schedule": "constant", "warmup_fraction": 0.0},
        "checkpoint": {"every": 0},
    }
    (home / "config.yaml").write_text(yaml.safe_dump(config))
    run(*torchrun(2), "-m", "megatron_iwsft", "reference", "--config", home / "config.yaml")
    for directory, steps in (("run", 2), ("run", 3), ("straight", 3)):  # the second resumes the first
        settings = [f"data.max_steps={steps}", f"run.dir={home / directory}"]
        run(*torchrun(2), "-m", "megatron_iwsft", "train", "--config", home / "config.yaml", *settings)
    run("-m", "megatron_iwsft", "export", "--checkpoint", home / "run", "--output", home / "exported")
    return home, hf, comparable_metrics(home / "run")


def test_weights_are_one_until_the_first_update_and_then_differ(trained) -> None:
    _, _, metrics = trained
    assert [line["step"] for line in metrics] == [1, 2, 3]
    assert abs(metrics[0]["weight_mean"] - 1) <= 1e-6 and abs(metrics[0]["weight_max"] - 1) <= 1e-6
    assert abs(metrics[-1]["weight_mean"] - 1) > 1e-3
    assert metrics[-1]["nll"] < metrics[0]["nll"]


def test_the_resumed_run_equals_the_uninterrupted_one_bit_for_bit(trained) -> None:
    home, _, metrics = trained
    assert metrics == comparable_metrics(home / "straight")


def test_the_export_equals_the_checkpoint_in_transformers(trained) -> None:
    home, _, _ = trained
    text = "\n\n".join(f"{question}\n{answer}" for question, answer in PROBLEMS)
    found = verify(home / "exported", home / "run", text, lengths=[32, 257, 512])
    assert [parity.tokens for parity in found] == [32, 257, 512]
    assert max(parity.max_difference for parity in found) <= 1e-4


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
