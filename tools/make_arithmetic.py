"""The same as `iwsft make-arithmetic`."""

import sys

from megatron_iwsft.cli.main import main

if __name__ == "__main__":  # worker processes import this file
    main(["make-arithmetic", *sys.argv[1:]])
