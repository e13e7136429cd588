"""The same as `iwsft reference`."""

import sys

from megatron_iwsft.cli.main import main

if __name__ == "__main__":  # worker processes import this file
    main(["reference", *sys.argv[1:]])
