"""The same as `iwsft train-tokenizer`."""

import sys

from megatron_iwsft.cli.main import main

if __name__ == "__main__":  # worker processes import this file
    main(["train-tokenizer", *sys.argv[1:]])
