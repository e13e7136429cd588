"""Answer questions with a Hugging Face model, greedily, through its chat template. Uses vLLM on a GPU if installed, else transformers.

example:
  iwsft generate --model models/iw-sft "What is 37 + 48?"
"""

from __future__ import annotations

import argparse

from megatron_iwsft.utils.cli import positive_int
from megatron_iwsft.utils.text import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face directory")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="user message; one conversation per prompt")
    parser.add_argument(
        "--max-new-tokens", type=positive_int, default=256, metavar="N", help="tokens per answer at most"
    )


def run(args: argparse.Namespace) -> None:
    from megatron_iwsft.distributed.mcore_compat import quiet_megatron

    quiet_megatron()
    from megatron_iwsft.evaluate.generate import Sampling, make_generator

    generator = make_generator(args.model, Sampling(max_new_tokens=args.max_new_tokens))
    for prompt, (answer,) in zip(args.prompts, generator.answer(list(enumerate(args.prompts))), strict=True):
        say(f"> {prompt}\n{answer.text}")
