"""A thread on every rank that detects crashed and hung ranks, reports which rank it was, and ends the job.

Every second, each rank writes its progress to the job's store and checks whether another rank has failed and whether the processes
on the same machine are alive. The first rank to find a failure records it in the store and prints it; the others exit without a
message. The thread keeps running while the main thread is blocked in a collective.
"""

from __future__ import annotations

import datetime
import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_iwsft.errors import EXIT_FAILURE, PeerError, RequeueError, UserError
from megatron_iwsft.utils.files import open_for_writing
from megatron_iwsft.utils.memory import out_of_memory
from megatron_iwsft.utils.text import tell

_BEAT_S = 1.0
_FAILURE = "failure"
# A rank's error is often only a consequence of another rank's: it waits so long for the other to report first.
_ECHO_S = 4.0
# A UserError is printed by one rank after another (utils.cli.run_command), which takes longer.
_TURNS_S = 12.0
# Lost connection, or a frozen rank: after so many missed beats.
_LOST_BEATS = 5


@dataclass(frozen=True)
class Peer:
    """A rank's process.

    place    host and PID namespace; process ids are comparable only between equal places
    started  in clock ticks since boot, which does not change when the machine's clock is set
    """

    rank: int
    host: str
    place: str
    pid: int
    started: int

    @staticmethod
    def own(rank: int) -> Peer:
        host, pid = socket.gethostname(), os.getpid()
        return Peer(rank, host, f"{host} {os.readlink('/proc/self/ns/pid')}", pid, _start_ticks(pid) or 0)

    def alive(self) -> bool:
        return _start_ticks(self.pid) == self.started

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


def _start_ticks(pid: int) -> int | None:
    """When a process was started (proc(5), stat, field 22); None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


class Watchdog:
    """Context manager around a job's work; call `at` to mark progress. Entering is collective over all ranks.

    timeout_s: a rank without a mark for this long is hung. The ranks that are behind are then reported, every rank writes its Python
    stacks to `logs`, and the job ends. An exception that leaves the context is reported by the first rank that raised one; the
    others raise PeerError, which is not printed.
    """

    def __init__(self, rank: int, world_size: int, *, timeout_s: float, logs: Path) -> None:
        self.rank, self.world_size, self.timeout_s, self.logs = rank, world_size, timeout_s, logs
        self._mark: dict[str, Any] = {"marks": 0, "step": 0, "phase": "starting"}
        self._marked_at = time.monotonic()
        self._beats = 0
        self._leaving = threading.Event()
        self._store: dist.Store | None = None
        self._peers: list[Peer] = []
        self._beside: list[Peer] = []

    def at(self, step: int, phase: str) -> None:
        """Mark progress: this rank begins `phase` of `step`. All ranks go through the same phases in the same order."""
        self._mark = {"marks": self._mark["marks"] + 1, "step": step, "phase": phase}
        self._marked_at = time.monotonic()

    def describe(self, rank: int) -> str:
        """A rank with its process and host, for people."""
        return str(self._peers[rank]) if self._peers else f"rank {rank}"

    def __enter__(self) -> Watchdog:
        if self.world_size > 1:
            peers: list[Any] = [None] * self.world_size
            dist.all_gather_object(peers, (Peer.own(self.rank), uuid.uuid4().hex))
            self._peers = [peer for peer, _ in peers]
            self._beside = [peer for peer in self._peers if peer.place == self._peers[self.rank].place]
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            # A separate connection for this thread: that of the process group may be blocked in a wait.
            store = dist.TCPStore(
                address, port, is_master=False, wait_for_workers=False, timeout=datetime.timedelta(seconds=10)
            )
            self._store = dist.PrefixStore(f"watchdog-{peers[0][1]}", store)
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._store is None:
            return
        try:
            if isinstance(error, UserError):
                self._claim(f"{self._peers[self.rank]}: {error}", patience_s=_TURNS_S)
            elif error is not None and not isinstance(error, (RequeueError, KeyboardInterrupt)):
                self._raise_unless_first(error)
            self._store.set(f"left-{self.rank}", "")
        except dist.DistError:
            pass  # the store is gone, because the process of rank 0 is
        finally:
            self._leaving.set()
            self._thread.join(timeout=15)

    def _raise_unless_first(self, error: BaseException) -> None:
        if _is_echo(error):
            # The rank that caused it is known within seconds: it reports its error, or its process is gone.
            until = time.monotonic() + _ECHO_S
            while time.monotonic() < until and self._failure() is None:
                time.sleep(0.1)
        text = "".join(traceback.format_exception_only(error)).strip()
        if not self._claim(out_of_memory(error) or f"{self._peers[self.rank]}: {text}"):
            raise PeerError from None

    def _watch(self) -> None:
        lost = 0
        while not self._leaving.wait(_BEAT_S):
            try:
                self._beat()
                lost = 0
            except (dist.DistError, RuntimeError):  # the store is gone, and with it the process that hosts it
                lost += 1
                if lost < _LOST_BEATS or self._leaving.is_set():
                    continue
                if os.environ.get("LOCAL_RANK", "0") == "0":
                    tell(
                        f"{self._peers[self.rank]} lost the connection to the job's store at {os.environ['MASTER_ADDR']}: the machine "
                        "or process of rank 0 is gone.",
                        error=True,
                    )
                self._end()

    def _beat(self) -> None:
        stuck_s = self._publish()
        failure = self._failure()
        if failure is not None:
            # Give the main thread time to raise the resulting error and exit normally.
            if not self._leaving.wait(failure["patience_s"]):
                self._end()
            return
        for peer in self._beside:
            if not peer.alive() and not self._has_left(peer):
                text = f"{peer} exited unexpectedly (killed, or out of memory; check dmesg on {peer.host})."
                if self._claim(text):
                    tell(text, error=True)
                return
        if stuck_s > self.timeout_s:
            self._report_hang()

    def _publish(self) -> float:
        """Write this rank's progress to the store and return the seconds since its last mark."""
        assert self._store is not None
        self._beats += 1
        since_s = time.monotonic() - self._marked_at
        self._store.set(f"beat-{self.rank}", json.dumps(self._mark | {"beats": self._beats, "since_s": since_s}))
        return since_s

    def _has_left(self, peer: Peer) -> bool:
        assert self._store is not None
        return self._store.check([f"left-{peer.rank}"])

    def _failure(self) -> dict[str, Any] | None:
        assert self._store is not None
        return json.loads(self._store.get(_FAILURE)) if self._store.check([_FAILURE]) else None

    def _claim(self, text: str, *, patience_s: float = _ECHO_S) -> bool:
        """Record a failure; False if another rank already has. The other ranks then have `patience_s` to exit normally."""
        assert self._store is not None
        if self._store.add("failures", 1) > 1:
            return False
        self._store.set(_FAILURE, json.dumps({"text": text, "patience_s": patience_s}))
        return True

    def _report_hang(self) -> None:
        self._dump_stacks()
        assert self._store is not None
        before = self._marks() if self._store.add("hangs", 1) == 1 else None
        for _ in range(_LOST_BEATS if before is not None else 3 * _LOST_BEATS):
            time.sleep(_BEAT_S)
            self._publish()  # so that the reporting rank does not take this one for frozen
            if self._failure() is not None:
                break
        if before is not None:
            text = self._who_is_stuck(before, self._marks())
            if self._claim(text):
                tell(text, error=True)
        self._end()

    def _who_is_stuck(self, before: dict[int, dict[str, Any]], after: dict[int, dict[str, Any]]) -> str:
        """Describe which ranks are stuck, from all ranks' marks a few beats apart."""
        silent = [p for p in self._peers if before.get(p.rank, {}).get("beats") == after.get(p.rank, {}).get("beats")]
        furthest = max(mark["marks"] for mark in after.values())
        behind = [p for p in self._peers if p not in silent and after[p.rank]["marks"] < furthest]
        lines = [f"no progress for {self.timeout_s:g} s (run.hang_timeout_s)."]
        lines += [f"{p} is not responding (frozen or gone); last seen {_where(after.get(p.rank))}" for p in silent]
        lines += [f"{p} is behind: still {_where(after[p.rank])}" for p in behind]
        if not silent and not behind:
            lines.append(
                f"All ranks are {_where(after[self.rank])}: a collective hangs, or the step takes longer than that."
            )
        else:
            waiting = self.world_size - len(silent) - len(behind)
            lines.append(f"The other {waiting} {'is' if waiting == 1 else 'are'} waiting {_where(after[self.rank])}.")
        return "\n  ".join([*lines, f"Python stacks: {self.logs}/hang-rank-*.txt"])

    def _marks(self) -> dict[int, dict[str, Any]]:
        assert self._store is not None
        keys = {p.rank: f"beat-{p.rank}" for p in self._peers}
        return {rank: json.loads(self._store.get(key)) for rank, key in keys.items() if self._store.check([key])}

    def _dump_stacks(self) -> None:
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            with open_for_writing(self.logs / f"hang-rank-{self.rank}.txt", os.O_WRONLY | os.O_TRUNC) as file:
                faulthandler.dump_traceback(file)
        except OSError:
            pass  # a full disk must not keep the job from ending

    def _end(self) -> None:
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(EXIT_FAILURE)


def _where(mark: dict[str, Any] | None) -> str:
    if mark is None:
        return "before its first step"
    return f"in step {mark['step']}, {mark['phase']}, for {mark['since_s']:.0f} s"


def _is_echo(error: BaseException) -> bool:
    """Whether an error is one that a broken collective raises."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "Connection"))
