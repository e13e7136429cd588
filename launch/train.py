"""The same as `iwsft train`."""

import sys

from megatron_iwsft.cli.main import main

if __name__ == "__main__":  # worker processes import this file
    main(["train", *sys.argv[1:]])
