"""Answer questions with a Hugging Face model, greedily, through its chat template; text is printed as it is generated.

--batch answers all prompts together, with vLLM on a GPU if it is installed.

examples:
  iwsft generate --model models/iw-sft "What is 37 + 48?"
  iwsft generate --model models/iw-sft --chat --system "You are terse."
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from megatron_iwsft.errors import ConfigError
from megatron_iwsft.utils.cli import add_template_options, positive_int, template_options
from megatron_iwsft.utils.text import LOADING, printable, say, without_surrogates

if TYPE_CHECKING:
    from megatron_iwsft.data.template_defaults import TemplateVariables
    from megatron_iwsft.evaluate.chat import Chat


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="Hugging Face directory")
    add(
        "prompts",
        nargs="*",
        metavar="PROMPT",
        help="user message; one conversation per prompt, with --chat one for all",
    )
    add(
        "--chat",
        action="store_true",
        help="after the prompts, continue the conversation with lines from standard input",
    )
    add("--system", metavar="TEXT", help="system message")
    add("--batch", action="store_true", help="generate all answers together, and print them when they are complete")
    add("--max-new-tokens", type=positive_int, default=256, metavar="N", help="tokens per answer at most")
    add_template_options(add)


def run(args: argparse.Namespace) -> None:
    if not args.prompts and not args.chat:
        raise ConfigError("iwsft generate needs a PROMPT, or --chat.")
    if args.batch and (args.chat or args.system):
        raise ConfigError("--batch goes with prompts alone. Leave out --chat and --system.")
    args.prompts = [without_surrogates(prompt) for prompt in args.prompts]
    args.system = args.system and without_surrogates(args.system)
    say(LOADING, error=True)

    from megatron_iwsft.distributed.mcore_compat import quiet_megatron

    quiet_megatron()
    from megatron_iwsft.data.template_defaults import TemplateVariables

    variables = TemplateVariables(args.date, template_options(args.template_option))
    if args.batch:
        _together(args, variables)
        return
    from megatron_iwsft.evaluate.chat import Chat

    chat = Chat(args.model, max_new_tokens=args.max_new_tokens, system=args.system, variables=variables)
    opening = list(chat.messages)
    for prompt in args.prompts:
        if not args.chat:
            chat.messages = list(opening)
        say(f"> {prompt}")
        _answer(chat, prompt)
    if args.chat:
        _converse(chat)


def _together(args: argparse.Namespace, variables: TemplateVariables) -> None:
    from megatron_iwsft.evaluate.generate import Sampling, make_generator

    generator = make_generator(args.model, Sampling(max_new_tokens=args.max_new_tokens), variables=variables)
    for prompt, (answer,) in zip(args.prompts, generator.answer(list(enumerate(args.prompts))), strict=True):
        say(f"> {prompt}\n{answer.text}")


def _converse(chat: Chat) -> None:
    """Until the end of standard input."""
    typed = sys.stdin.isatty()
    while True:
        if typed:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            if not typed:
                say(f"> {line.strip()}")
            _answer(chat, line.strip())


def _answer(chat: Chat, prompt: str) -> None:
    chat.say(prompt, lambda text: print(printable(text), end="", flush=True))
    print(flush=True)
