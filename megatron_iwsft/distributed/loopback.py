"""Jobs on one machine: they talk over the loopback interface only, so that nobody can reach them over the network.

torch's store and gloo's connections accept anyone who can connect: a stranger's message ends the job.
"""

from __future__ import annotations

import datetime
import os
import socket

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

ADDRESS = "127.0.0.1"
BACKEND = "loopback"


def loopback_store() -> dist.TCPStore:
    """A store that listens on the loopback interface, on a free port (`store.port`)."""
    with socket.socket() as listener:
        listener.bind((ADDRESS, 0))
        listener.listen(1024)
        port = listener.getsockname()[1]
        store = dist.TCPStore(ADDRESS, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.fileno())
        listener.detach()  # the store's from here on
    return store


def keep_to_loopback(environment: dict[str, str] | os._Environ[str] = os.environ) -> None:
    """Have gloo and NCCL listen on the loopback interface, unless the environment names others."""
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    environment.setdefault("NCCL_SOCKET_IFNAME", "lo")


def register_with_torchrun() -> str:
    """Make `--rdzv_backend=loopback` known to torchrun; returns its name."""
    rendezvous_handler_registry.register(BACKEND, _Rendezvous)
    return BACKEND


class _Rendezvous(RendezvousHandler):
    """Of a single node with itself."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._run_id = parameters.run_id
        self._store: dist.TCPStore | None = None

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        if self._store is None:
            self._store = loopback_store()
            self._store.set_timeout(datetime.timedelta(minutes=10))
        address = RendezvousStoreInfo(ADDRESS, self._store.port)
        return RendezvousInfo(dist.PrefixStore(self._run_id, self._store), 0, 1, address)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None: ...

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True
