"""The same as `iwsft import`, `iwsft export` and `iwsft verify`."""

from megatron_iwsft.cli.main import main

if __name__ == "__main__":  # worker processes import this file
    main(commands=("import", "export", "verify"))
