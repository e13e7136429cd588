"""Export: a checkpoint, or a model in training, as a Hugging Face directory."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_iwsft.checkpoint.info import CheckpointInfo
from megatron_iwsft.checkpoint.names import TOKENIZER
from megatron_iwsft.checkpoint.tensors import hugging_face_reader
from megatron_iwsft.convert.gather import RunningWeights
from megatron_iwsft.distributed.agreement import on_first_rank
from megatron_iwsft.distributed.context import ParallelContext
from megatron_iwsft.errors import CheckpointError, UserError
from megatron_iwsft.hf.directory import DTYPES, write_directory
from megatron_iwsft.hf.model_card import Provenance, SupportingFiles
from megatron_iwsft.model.gpt import PolicyModel


def export_checkpoint(
    source: str | Path, output: str | Path, *, dtype: str | None = None, exist_ok: bool = False
) -> Path:
    """Write a checkpoint made at any layout as a Hugging Face directory; returns `output`.

    Holds one parameter in memory at a time. dtype: fp32, bf16 or fp16; None is the run's. Vocabulary padding is removed; tokenizer,
    chat template and generation config are included. exist_ok: if another process completes `output` first, keep that.
    Raises CheckpointError, and then leaves no partial directory.
    """
    info = CheckpointInfo.read(source)
    _return_freed_memory()
    read, names = hugging_face_reader(info.directory, info.architecture)
    supporting_files = SupportingFiles(
        sorted((info.directory / TOKENIZER).glob("*")),
        Provenance(info.step, info.config, info.corpora, info.template_hash),
    )
    write_directory(
        Path(output),
        info.architecture,
        read,
        names=names,
        dtype=DTYPES[dtype or info.config.get("precision", {}).get("dtype", "fp32")],
        finish=lambda partial: supporting_files.write(partial, info.architecture),
        exist_ok=exist_ok,
    )
    return Path(output)


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
) -> None:
    """Write a model in training, at any layout, as a Hugging Face directory; leaves an existing `output` as it is.

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
