"""The same as `iwsft inspect`."""

import sys

from megatron_iwsft.cli.main import main

if __name__ == "__main__":  # worker processes import this file
    main(["inspect", *sys.argv[1:]])
