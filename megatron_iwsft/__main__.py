"""`python -m megatron_iwsft COMMAND …`, which is also how torchrun starts a command: `torchrun -m megatron_iwsft train …`."""

from megatron_iwsft.cli.main import main

if __name__ == "__main__":  # worker processes import this module
    main()
