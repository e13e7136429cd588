"""The same as `iwsft report`."""

import sys

from megatron_iwsft.cli.main import main

if __name__ == "__main__":  # worker processes import this file
    main(["report", *sys.argv[1:]])
