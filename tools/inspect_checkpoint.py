"""The same as `iwsft inspect` with its `--show-config` under the earlier name `--config`."""

import sys

from megatron_iwsft.cli.main import main

if __name__ == "__main__":  # worker processes import this file
    main(["inspect", *("--show-config" if argument == "--config" else argument for argument in sys.argv[1:])])
