"""The environment variables by which torchrun, or a scheduler, tells a process its place in a job."""

from __future__ import annotations

import os
import socket

from megatron_iwsft.errors import ConfigError

_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_ADVICE = "Start the command under torchrun, or unset them to run a single process."


def check_launch_environment() -> None:
    """Raise ConfigError unless the variables describe this process's place in a job, or none does.

    Without this check, a process would wait for peers that nobody starts, or for a port that another program uses.
    """
    found = {name: os.environ[name] for name in _NUMBERS if name in os.environ}
    numbers = {}
    for name, value in found.items():
        if not (value.isascii() and value.isdigit()):
            raise ConfigError(f"the environment variable {name} is {value!r}, which is not a number. {_ADVICE}")
        numbers[name] = int(value)
    world, rank = numbers.get("WORLD_SIZE", 1), numbers.get("RANK", 0)
    if world < 1 or rank >= world:
        raise ConfigError(
            f"RANK is {rank} and WORLD_SIZE is {world} in the environment: ranks go from 0 to WORLD_SIZE - 1. {_ADVICE}"
        )
    if world == 1 and "MASTER_PORT" not in os.environ:
        return
    needed = (*_NUMBERS, "MASTER_ADDR", "MASTER_PORT") if world > 1 else ("MASTER_PORT",)
    missing = [name for name in needed if name not in os.environ]
    if missing:
        raise ConfigError(f"WORLD_SIZE is {world} in the environment, but {', '.join(missing)} is not set. {_ADVICE}")
    port = os.environ["MASTER_PORT"]
    if not (port.isascii() and port.isdigit() and int(port) < 65536):
        raise ConfigError(f"the environment variable MASTER_PORT is {port!r}, which is not a port. {_ADVICE}")
    if (
        rank == 0 and "TORCHELASTIC_RUN_ID" not in os.environ
    ):  # torchrun has chosen the port, and may listen there itself
        _check_port_is_free(int(port))


def _check_port_is_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ConfigError(
                f"rank 0 cannot use MASTER_PORT {port}: {error.strerror}. Set it to a free port, the same on every rank."
            ) from None
