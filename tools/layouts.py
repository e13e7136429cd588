"""The same as `iwsft layouts`."""

import sys

from megatron_iwsft.cli.main import main

if __name__ == "__main__":  # worker processes import this file
    main(["layouts", *sys.argv[1:]])
