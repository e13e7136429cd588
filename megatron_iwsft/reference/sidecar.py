"""The reference policy's log-probs r_t: cached in a sidecar of the corpus, or live from a frozen second model.

corpus/reference-<fingerprint>/
    shard-00000.bin, .idx    float32, aligned with the tokens, 0 where not trained on
    manifest.json            which model, at which precision, for which corpus; SHA-256 of every file; written last
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_iwsft.data.batch import Batch
from megatron_iwsft.data.corpus import MANIFEST, Corpus, write_manifest
from megatron_iwsft.data.indexed import IndexedReader, write_index
from megatron_iwsft.errors import DataError
from megatron_iwsft.utils.files import sha256_file

FORMAT_VERSION = 1
_SAMPLES = 64
_SAMPLE_BYTES = 65536


@dataclass(frozen=True)
class ReferenceIdentity:
    """What a sidecar must have been computed with: weights, tokenizer, template, precision."""

    weights: str
    tokenizer: str
    template: str
    dtype: str

    @property
    def fingerprint(self) -> str:
        text = json.dumps([self.weights, self.tokenizer, self.template, self.dtype])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def weights_fingerprint(directory: Path, pattern: str) -> str:
    """Identity of the weight files in a directory: name, size, both ends and 64 evenly spaced blocks of 64 KiB of each.

    Reading all of a 64 GB model at every start would take minutes; training changes every block, so a sample tells.
    """
    digest = hashlib.sha256()
    for path in sorted(directory.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with open(path, "rb") as file:
            for at in sorted({int(x) for x in np.linspace(0, max(0, size - _SAMPLE_BYTES), _SAMPLES)}):
                file.seek(at)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def sidecar_directory(corpus: Corpus, identity: ReferenceIdentity) -> Path:
    return corpus.directory / f"reference-{identity.fingerprint}"


class Sidecar:
    """An open, complete sidecar; `sidecar(i)` is float32 [num_tokens] of trajectory i.

    Raises DataError if there is none for this reference, or if it is unfinished, truncated or of another corpus.
    """

    def __init__(self, corpus: Corpus, identity: ReferenceIdentity) -> None:
        self.directory = sidecar_directory(corpus, identity)
        again = "Run tools/precompute_reference.py with this config."
        path = self.directory / MANIFEST
        if not path.exists():
            others = sorted(p.name for p in corpus.directory.glob("reference-*") if (p / MANIFEST).exists())
            if self.directory.is_dir():
                raise DataError(f"the reference log-probs at {self.directory} are unfinished. {again}")
            raise DataError(
                f"{corpus.directory} has no reference log-probs of this reference model ({self.directory.name}); it has "
                f"{', '.join(others) or 'none of any model'}. Model, tokenizer, chat template and precision.dtype must all match. {again}"
            )
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            version, made_for, hashes = manifest["format_version"], manifest["corpus"], manifest["files"]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path} is damaged. Remove {self.directory}. {again}") from None
        if version != FORMAT_VERSION:
            raise DataError(
                f"{path} has format version {version}; this program reads {FORMAT_VERSION}. Remove {self.directory}. {again}"
            )
        if made_for != corpus.fingerprint:
            raise DataError(f"{self.directory} was computed for another version of the corpus. Remove it. {again}")
        self._shards = [IndexedReader(self.directory / name) for name in corpus.shards]
        for k, reader in enumerate(self._shards):
            if not np.array_equal(reader.lengths, corpus.shard_lengths(k)):
                raise DataError(
                    f"{self.directory / corpus.shards[k]} does not fit its corpus shard. Remove {self.directory}. {again}"
                )
        self._corpus, self._hashes = corpus, hashes

    def damage(self, rank: int, size: int) -> list[str]:
        """One complaint for each of every `size`-th file, from the `rank`-th, that is not what was written. Reads them whole."""
        again = f"Remove {self.directory}, and run tools/precompute_reference.py with this config."
        return [
            f"{self.directory / name} is damaged: its checksum is not the one it was written with. {again}"
            for name in sorted(self._hashes)[rank::size]
            if sha256_file(self.directory / name) != self._hashes[name]
        ]

    def __call__(self, i: int) -> np.ndarray:
        shard, k = self._corpus.locate(i)
        return self._shards[shard][k]


class SidecarWriter:
    """Fills a sidecar; any number of ranks write their own positions into the same memory-mapped files.

    A trained position is NaN until its value is known, so an interrupted run sees what is left to do.
    """

    def __init__(self, corpus: Corpus, identity: ReferenceIdentity) -> None:
        self.corpus, self.identity = corpus, identity
        self.directory = sidecar_directory(corpus, identity)
        self._maps: list[np.memmap] = []
        self._files: list[int] = []
        self._starts = [
            np.concatenate([[0], np.cumsum(corpus.shard_lengths(k), dtype=np.int64)]) for k in range(len(corpus.shards))
        ]

    @property
    def complete(self) -> bool:
        return (self.directory / MANIFEST).exists()

    def prepare(self) -> None:
        """Create the files that are not there yet. On one rank, before `open` on all."""
        self.directory.mkdir(exist_ok=True)
        for index, name in enumerate(self.corpus.shards):
            path = self._partial(name)
            if path.exists():
                continue
            mask = np.memmap(self.corpus.directory / f"{name}.mask.bin", np.uint8, mode="r")
            fresh = path.with_suffix(".new")
            with open(fresh, "wb") as file:
                for at in range(0, len(mask), 1 << 24):
                    part = mask[at : at + (1 << 24)]
                    file.write(np.where(part == 1, np.float32(np.nan), np.float32(0)).astype(np.float32).tobytes())
            # A first token has no prediction: its log-prob is 0 by definition, also where a mask covers it.
            values = np.memmap(fresh, np.float32, mode="r+")
            values[self._starts[index][:-1]] = 0
            values.flush()
            os.replace(fresh, path)

    def open(self) -> None:
        self._maps = [np.memmap(self._partial(name), np.float32, mode="r") for name in self.corpus.shards]
        self._files = [os.open(self._partial(name), os.O_WRONLY) for name in self.corpus.shards]

    def _partial(self, name: str) -> Path:
        return self.directory / f"{name}.bin.partial"

    def done(self, i: int) -> bool:
        """Whether every position of trajectory i has its value."""
        return not np.isnan(self._view(i)).any()

    def _view(self, i: int) -> np.ndarray:
        shard, k = self.corpus.locate(i)
        starts = self._starts[shard]
        return self._maps[shard][starts[k] : starts[k + 1]]

    def write(self, batch: Batch, logprobs: Tensor) -> None:
        """Store logprobs float32 [T] of this rank's micro-batch (its context-parallel slice)."""
        trained = batch.mask.bool().cpu().numpy()
        values = logprobs.float().cpu().numpy()[trained]
        if np.isnan(values).any():
            raise DataError(
                "the reference model gives NaN log-probs. Check its weights, or use a wider precision.dtype."
            )
        segment = batch.segment.cpu().numpy()[trained]
        # A label belongs to the next token.
        position = batch.position_ids[0].cpu().numpy()[trained] + 1
        trajectory = batch.trajectory.cpu().numpy()
        for s in np.unique(segment):
            at = segment == s
            shard, k = self.corpus.locate(int(trajectory[s]))
            runs = np.flatnonzero(np.diff(position[at]) != 1) + 1
            # Written byte by byte, not through the mapping: nodes that share a page of it over a network file system would
            # write back each other's stale values.
            for where, run in zip(np.split(position[at], runs), np.split(values[at], runs), strict=True):
                os.pwrite(self._files[shard], run.tobytes(), run.itemsize * int(self._starts[shard][k] + where[0]))

    def flush(self) -> None:
        for file in self._files:
            os.fsync(file)

    def finish(self, described: dict[str, Any]) -> None:
        """Give the files their names and write the manifest. On one rank, after every rank has flushed."""
        for file in self._files:
            os.close(file)
        missing = sum(int(np.isnan(values).sum()) for values in self._maps)
        if missing:
            raise DataError(f"{missing} positions of {self.directory} have no value. Run the same command again.")
        files: dict[str, str] = {}
        for k, name in enumerate(self.corpus.shards):
            os.replace(self._partial(name), self.directory / f"{name}.bin")
            write_index(self.directory / name, self.corpus.shard_lengths(k), np.dtype(np.float32))
            files |= {f"{name}{s}": sha256_file(self.directory / f"{name}{s}") for s in (".bin", ".idx")}
        write_manifest(
            self.directory,
            {
                "format_version": FORMAT_VERSION,
                "corpus": self.corpus.fingerprint,
                "reference": vars(self.identity) | described,
                "files": files,
            },
        )


class WithCompanions(torch.nn.Module):
    """A policy stage and frozen models' same stages (reference, lagged proposal), run in one pipeline pass.

    Between stages the k + 1 models' hidden states [T (/tp), 1, H] travel side by side as [T (/tp), k + 1, H]; the last stage
    returns −log-probs [k + 1, T], policy first. `module` is the policy: Megatron-Core's schedules unwrap through it.
    `offload`: companions' weights lie in pinned host memory and come to the device for the time of each micro-batch's forward.
    """

    def __init__(self, policy: torch.nn.Module, companions: list[torch.nn.Module], *, offload: bool = False) -> None:
        super().__init__()
        self.module = policy
        self.companions = torch.nn.ModuleList(companion.requires_grad_(False).eval() for companion in companions)
        self.config = policy.config
        self._hosts = [_HostWeights(companion) for companion in companions] if offload else [None] * len(companions)

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        (tensor,) = tensors
        policy = self.module.module if hasattr(self.module, "module") else self.module
        for i, stage in enumerate((policy, *self.companions)):
            part = None if tensor is None else tensor[:, i : i + 1]
            stage.set_input_tensor([None if part is None else (part if i == 0 else part.detach()).contiguous()])

    def set_is_first_microbatch(self) -> None:
        """Megatron-Core's schedules call it where it is: Transformer Engine then converts weights to FP8 anew."""
        for model in (self.module, *self.companions):
            if hasattr(model, "set_is_first_microbatch"):
                model.set_is_first_microbatch()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        outs = [self.module(*args, **kwargs)]
        with torch.no_grad():
            for companion, host in zip(self.companions, self._hosts, strict=True):
                if host is None:
                    outs.append(companion(*args, **kwargs))
                else:
                    with host:
                        outs.append(companion(*args, **kwargs))
        return torch.cat(outs, dim=0 if outs[0].dim() == 2 else 1)


class _HostWeights:
    """Keeps a frozen module's weights on the host; within the context they are on their device."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._parameters = list(module.parameters())
        self._device = self._parameters[0].device
        for parameter in self._parameters:
            on_host = parameter.data.to("cpu")
            parameter.data = on_host.pin_memory() if self._device.type == "cuda" else on_host
        self._on_host: list[Tensor] = []

    def __enter__(self) -> None:
        self._on_host = [parameter.data for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.data = parameter.data.to(self._device, non_blocking=True, copy=True)

    def __exit__(self, *exception: object) -> None:
        for parameter, host in zip(self._parameters, self._on_host, strict=True):
            parameter.data = host
