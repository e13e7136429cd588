"""Where a step's time went, at coarse grain and for free: no wait for the device that the step would not make anyway."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_iwsft.train.profiling import range_of


class PhaseTimes:
    """Seconds of the host in each phase of a step. since: when the step before ended, by `time.perf_counter`.

    The device's work is counted where the host waits for it: in forward and backward, whose sums it reads, and in the update.
    """

    def __init__(self, since: float | None) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._between = time.perf_counter() - since if since is not None else None

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Add the time of a block, which is also a range in profiles."""
        started = time.perf_counter()
        with range_of(name):
            yield
        self._seconds[name] += time.perf_counter() - started

    def metrics(self, own_time_s: float) -> dict[str, float]:
        """own_time_s: from the start of the step to the end of this rank's last backward pass, before ranks wait for each other."""
        data, passes = self._seconds["data"], self._seconds["forward and backward"]
        own = min(max(own_time_s - data, 0.0), passes)
        return {
            "data_s": data,
            "forward_backward_s": own,
            "reduce_s": passes - own,
            "optimizer_s": self._seconds["optimizer"],
            **({"between_steps_s": self._between} if self._between is not None else {}),
        }
