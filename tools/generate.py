"""The same as `iwsft generate`."""

import sys

from megatron_iwsft.cli.main import main

if __name__ == "__main__":  # worker processes import this file
    main(["generate", *sys.argv[1:]])
