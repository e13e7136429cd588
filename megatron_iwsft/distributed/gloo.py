"""Gloo's process groups, of which a process needs about fifteen: they share one device, and each has one worker thread.

torch gives every group a device, whose thread wakes a hundred times a second, and two workers: some fifty threads per process,
which on a machine with more processes than cores take a part of its time. A layout's groups are used in the same order on every
rank, so one worker each is enough.
"""

from __future__ import annotations

import datetime
from typing import Any, ClassVar

import torch.distributed.distributed_c10d

c10d: Any = torch.distributed.distributed_c10d


class _OnSharedDevice(c10d.ProcessGroupGloo):
    _devices: ClassVar[list[Any]] = []  # the first group's: on the interfaces that the environment names

    def __init__(
        self, store: torch.distributed.Store, rank: int, size: int, timeout: datetime.timedelta, **others: Any
    ) -> None:
        """others: of newer versions of torch; a group that asks for any of them gets a device of its own."""
        is_first = not self._devices
        if is_first or any(others.values()):
            super().__init__(store, rank, size, timeout, **others)
            if is_first:
                self._devices.extend(self.options._devices)
            return
        options = c10d.ProcessGroupGloo._Options()
        options._timeout, options._devices, options._threads = timeout, self._devices, len(self._devices)
        super().__init__(store, rank, size, options)


def share_device() -> None:
    """Have this process's later groups share the device of its first one. Idempotent."""
    c10d.ProcessGroupGloo = _OnSharedDevice
