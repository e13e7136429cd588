"""The same as `iwsft evaluate`."""

import sys

from megatron_iwsft.cli.main import main

if __name__ == "__main__":  # worker processes import this file
    main(["evaluate", *sys.argv[1:]])
