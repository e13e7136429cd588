"""The same as `iwsft doctor`."""

import sys

from megatron_iwsft.cli.main import main

if __name__ == "__main__":  # worker processes import this file
    main(["doctor", *sys.argv[1:]])
