"""The same as `iwsft control`."""

import sys

from megatron_iwsft.cli.main import main

if __name__ == "__main__":  # worker processes import this file
    main(["control", *sys.argv[1:]])
