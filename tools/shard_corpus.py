"""The same as `iwsft shard`."""

import sys

from megatron_iwsft.cli.main import main

if __name__ == "__main__":  # worker processes import this file
    main(["shard", *sys.argv[1:]])
