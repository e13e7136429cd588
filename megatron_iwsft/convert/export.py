"""Export: a checkpoint, or a model in training, as a Hugging Face directory; adapters as a PEFT directory, or merged."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor

from megatron_iwsft.checkpoint.best import best_checkpoint
from megatron_iwsft.checkpoint.info import AdapterInfo, CheckpointInfo, complete_checkpoints
from megatron_iwsft.checkpoint.initial_weights import InitialWeights
from megatron_iwsft.checkpoint.names import CHECKPOINTS, TOKENIZER
from megatron_iwsft.checkpoint.tensors import hugging_face_reader
from megatron_iwsft.config.schema import Model
from megatron_iwsft.convert.gather import RunningWeights
from megatron_iwsft.distributed.agreement import on_first_rank
from megatron_iwsft.distributed.context import ParallelContext
from megatron_iwsft.errors import CheckpointError, UserError
from megatron_iwsft.hf.adapter_mapping import A, B, lora_name, merged
from megatron_iwsft.hf.adapters import AdapterSettings
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.hf.directory import DTYPES, write_directory
from megatron_iwsft.hf.model_card import Provenance, SupportingFiles
from megatron_iwsft.hf.peft import Description, write_adapter
from megatron_iwsft.model.gpt import PolicyModel


def earlier_checkpoint(source: str | Path) -> Path | None:
    """Of a run, or a directory of checkpoints, whose newest checkpoint is damaged: the newest undamaged one before it, if there is one.

    Hashes all files of those that it looks at.
    """
    earlier = [path for root in (Path(source), Path(source) / CHECKPOINTS) for path in complete_checkpoints(root)[1:]]
    return next((path for path in earlier if not _is_damaged(path)), None)


def _is_damaged(checkpoint: Path) -> bool:
    try:
        return bool(CheckpointInfo.read(checkpoint).damage())
    except CheckpointError:
        return True


def export_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    dtype: str | None = None,
    best: bool = False,
    exist_ok: bool = False,
    merge: bool = False,
    base: str | Path | None = None,
) -> Path:
    """Write a checkpoint made at any layout as a Hugging Face directory, or one of adapters as a PEFT directory; returns `output`.

    Holds one parameter in memory at a time. dtype: fp32, bf16 or fp16; None is the run's. Vocabulary padding is removed; tokenizer,
    chat template and generation config are included. best: of a run, its best checkpoint instead of its latest. exist_ok: if another
    process completes `output` first, keep that.
    merge: write the model that adapters make of their base. base: its directory, if it is no longer where the run read it.
    Raises CheckpointError, and then leaves no partial directory.
    """
    info, output = CheckpointInfo.read(best_checkpoint(source) if best else source), Path(output)
    if info.adapter is None and (merge or base):
        raise CheckpointError(
            f"{info.directory} holds a model's weights: there is nothing to merge. Leave out --merge and --base."
        )
    if base and not merge:
        raise CheckpointError("--base is for --merge: adapters are written without their base.")
    _return_freed_memory()
    tensor_type = DTYPES[dtype or info.config.get("precision", {}).get("dtype", "fp32")]
    files = SupportingFiles(
        sorted((info.directory / TOKENIZER).glob("*")),
        Provenance(info.step, info.config, info.corpora, info.template_hash),
    )
    if info.adapter is not None and not merge:
        read, _ = hugging_face_reader(info.directory, info.architecture, info.adapters)
        described = _described(info.adapter, info.config)
        _write_adapter(output, info.architecture, described, read, files, dtype=tensor_type, exist_ok=exist_ok)
        return output
    read, names = merged_reader(info, base) if merge else hugging_face_reader(info.directory, info.architecture)
    write_directory(
        output,
        info.architecture,
        read,
        names=names,
        dtype=tensor_type,
        finish=lambda partial: files.write(partial, info.architecture),
        exist_ok=exist_ok,
    )
    return output


def merged_reader(info: CheckpointInfo, base: str | Path | None) -> tuple[Callable[[str], Tensor], list[str]]:
    """`hugging_face_reader` of the model that a checkpoint's adapters make of their base. Raises CheckpointError for another base."""
    adapter, settings = info.adapter, info.adapters
    assert adapter is not None and settings is not None
    model = (info.config.get("model") or {}) if base is None else {"hf": str(base)}
    try:
        weights = InitialWeights(Model(**model), info.config.get("run", {}).get("seed", 0))
    except ValidationError:
        raise CheckpointError(
            f"{info.directory} does not say which model its adapters are of. Name its directory with --base."
        ) from None
    if weights.fingerprint != adapter["base"]:
        raise CheckpointError(
            f"{weights.described} is not the base of {info.directory}: its fingerprint is {weights.fingerprint[:12]}, not "
            f"{adapter['base'][:12]}. Name the directory of the right one with --base."
        )
    of_base, names = weights.reader()
    # Each keeps the parameter that it read last, and A and B are two.
    (of_a, adapted), (of_b, _) = (hugging_face_reader(info.directory, info.architecture, settings) for _ in (A, B))
    has_adapter = set(adapted)

    def read(name: str) -> Tensor:
        a, b = (lora_name(name, part) for part in (A, B))
        weight = of_base(name)
        return merged(weight, of_a(a), of_b(b), settings.scale) if a in has_adapter else weight

    return read, names


def _described(adapter: AdapterInfo, config: dict[str, Any]) -> Description:
    settings = AdapterSettings(adapter["rank"], adapter["alpha"], tuple(adapter["targets"]))
    model, section = config.get("model") or {}, config.get("adapter") or {}
    return Description(settings, adapter["base"], model.get("hf"), section.get("dropout", 0.0))


def _write_adapter(
    output: Path,
    architecture: Architecture,
    described: Description,
    read: Callable[[str], Tensor],
    files: SupportingFiles,
    *,
    dtype: torch.dtype,
    exist_ok: bool,
) -> None:
    files = replace(files, library="peft")
    write_adapter(
        output,
        architecture,
        described,
        read,
        dtype=dtype,
        finish=lambda partial: files.write(partial, architecture),
        exist_ok=exist_ok,
    )


def _return_freed_memory() -> None:
    """Make the C library return freed blocks of 1 MB and more to the system.

    glibc keeps blocks of up to 32 MB for reuse, and tensors of many sizes make it keep a lot of them.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library has no such option
        ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD


def export_running(
    chunks: list[PolicyModel],
    parallel: ParallelContext,
    output: Path,
    supporting_files: SupportingFiles,
    *,
    dtype: torch.dtype,
    adapter: AdapterInfo | None = None,
) -> None:
    """Write a model in training, at any layout, as a Hugging Face directory; leaves an existing `output` as it is.

    adapter: what is said about its adapters, if it has some; they are written as a PEFT directory.
    Collective over all ranks: rank 0 writes, holding one full parameter at a time; the others send it their shards. Raises
    CheckpointError on all ranks if it cannot be written.
    """
    if on_first_rank(output.exists):
        return
    weights = RunningWeights(chunks, parallel)
    failure = [""]
    if dist.get_rank() == 0:
        architecture = weights.architecture
        try:
            if adapter is not None:
                described = _described(adapter, supporting_files.provenance.config)
                _write_adapter(
                    output, architecture, described, weights.read, supporting_files, dtype=dtype, exist_ok=True
                )
            else:
                write_directory(
                    output,
                    architecture,
                    weights.read,
                    names=weights.names,
                    dtype=dtype,
                    finish=lambda partial: supporting_files.write(partial, architecture),
                    exist_ok=True,
                )
        except (OSError, UserError) as error:
            weights.discard_rest()
            failure = [f"{output} could not be written: {error}"]
    else:
        weights.serve()
    dist.broadcast_object_list(failure, src=0)
    if failure[0]:
        raise CheckpointError(failure[0])
