"""Small generated inputs: tokenizers, corpora and model configs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.data.prepare.records import RecordFormat
from megatron_iwsft.data.prepare.shard import ShardSettings, shard_corpus
from megatron_iwsft.data.template_presets import PRESETS

LENGTHS = [30 + (i * 37) % 90 for i in range(40)]  # tokens per trajectory of a small corpus

TEXTS = [
    "What is 12 plus 30? 12 plus 30 is 42.",
    "Add 7 and 8, then double it. First 7 + 8 = 15. Then 15 * 2 = 30.",
    "Ein Zug fährt 120 km in 2 Stunden. How fast? 120 / 2 = 60 km/h.",
]


def hf_tokenizer(directory: Path, vocab_size: int = 400, template: str | None = PRESETS["chatml"]) -> Path:
    """A byte-level BPE tokenizer in Hugging Face's format."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXTS * 20,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    if template is not None:
        config["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def sentencepiece_model(path: Path) -> Path:
    """A SentencePiece BPE model."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20),
        model_prefix=str(path.with_suffix("")),
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return path


def write_jsonl(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def token_corpus(
    directory: Path, lengths: list[int], *, vocab_size: int = 300, seed: int = 0, scores: bool | list[float] = False
) -> Corpus:
    """A corpus of random tokens, some much likelier than others, with about half of each trajectory trained on.

    scores: random ones, or those given.
    """
    rng = np.random.default_rng(seed)
    tokenizer = hf_tokenizer(directory / "tokenizer", vocab_size=vocab_size)
    records = []
    for i, n in enumerate(lengths):
        mask = (rng.random(n) < 0.5).astype(int)
        mask[0], mask[-1] = 0, 1
        records.append(
            {
                "input_ids": np.minimum(rng.zipf(1.3, n), vocab_size - 1).tolist(),
                "loss_mask": mask.tolist(),
                "score": scores[i] if isinstance(scores, list) else round(rng.random() + 0.1, 3),
            }
        )
    write_jsonl(directory / "records.jsonl", records)
    settings = ShardSettings(str(tokenizer), record=RecordFormat(score_fields=("score",) if scores else ()))
    shard_corpus([directory / "records.jsonl"], directory / "corpus", settings, show_progress=False)
    return Corpus.open(directory / "corpus")


def model_config(family: str = "qwen2", **changes) -> dict:
    """A Hugging Face config small enough for tests; 4 layers, 8 heads in 4 groups."""
    return {
        "model_type": family,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 300,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
    } | changes


def hf_model(directory: Path, family: str = "qwen2", **changes) -> Path:
    """Random weights of `model_config` in Hugging Face's format, beside what is in `directory`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model_config(family, **changes)))
    model.save_pretrained(directory)
    return directory
