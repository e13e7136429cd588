"""Ask a model: tools/generate.py --model HF_DIR "What is 37 + 48?" …"""

from __future__ import annotations

import argparse

from megatron_iwsft.utils.cli import positive_int, run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--max-new-tokens", type=positive_int, default=256)
    args = parser.parse_args()

    from megatron_iwsft.distributed.context import quiet_megatron

    quiet_megatron()
    from megatron_iwsft.evaluate.generate import Sampling, make_generator

    generator = make_generator(args.model, Sampling(max_new_tokens=args.max_new_tokens))
    for prompt, (answer,) in zip(args.prompts, generator.answer(list(enumerate(args.prompts))), strict=True):
        print(f"> {prompt}\n{answer.text}")


if __name__ == "__main__":
    run_command(main)
