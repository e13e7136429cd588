"""Train a small tokenizer on the user's own records, for models trained from random weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_iwsft.data.template_presets import PRESETS
from megatron_iwsft.errors import DataError
from megatron_iwsft.utils.files import write_json, write_text

END_OF_TURN, END_OF_TEXT = "<|im_end|>", "<|endoftext|>"


def train_tokenizer(inputs: Sequence[Path], output: Path, *, fields: Sequence[str], vocab_size: int) -> None:
    """Train a byte-level BPE tokenizer on `fields` of JSONL records; write it, with a ChatML template, in Hugging Face format.

    Every digit is a separate token, so that arithmetic does not depend on which numbers were merged. Raises DataError if an
    input file does not exist, no record has any of the fields, or the files cannot be written.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, "<|im_start|>", END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    texts = _texts(inputs, fields)
    first = next(texts, None)
    if first is None:
        raise DataError(
            f"no record in {', '.join(map(str, inputs))} has any of the fields {', '.join(fields)}. "
            "Name the text fields with --text-field."
        )

    def all_texts() -> Iterator[str]:
        yield first
        yield from texts

    tokenizer.train_from_iterator(all_texts(), trainer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TURN,
        "pad_token": END_OF_TEXT,
        "chat_template": PRESETS["chatml"],
    }
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "tokenizer_config.json", config)
        write_text(output / "tokenizer.json", tokenizer.to_str(pretty=True))  # last: without it there is no tokenizer
    except OSError as error:
        raise DataError(
            f"cannot write the tokenizer {output}: {error.strerror}. Check the disk's space and permissions."
        ) from None


def _texts(inputs: Sequence[Path], fields: Sequence[str]) -> Iterator[str]:
    for path in inputs:
        if not path.is_file():
            raise DataError(f"input file {path} does not exist. Check the path.")
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    continue  # sharding reports it
                if isinstance(record, dict):
                    yield from (record[field] for field in fields if isinstance(record.get(field), str))
