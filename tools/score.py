"""How likely a Hugging Face model finds a corpus: tools/score.py --model HF_DIR --corpus DIR"""

from __future__ import annotations

import argparse

from megatron_iwsft.errors import run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--corpus", required=True, help="corpus directory of tools/shard_corpus.py")
    args = parser.parse_args()

    from megatron_iwsft.platform import quiet_megatron

    quiet_megatron()
    from megatron_iwsft.evaluate import score_corpus

    score = score_corpus(args.model, args.corpus)
    print(f"nll {score.nll:.6f} per trained token, {score.tokens:,} tokens of {score.trajectories:,} trajectories")


if __name__ == "__main__":
    run_command(main)
