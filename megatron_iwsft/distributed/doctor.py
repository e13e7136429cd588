"""Report this machine's hardware and packages, what they enable, and what else to install."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform as machine
import resource
import shutil
from dataclasses import dataclass

from megatron_iwsft.distributed.capabilities import (
    broken_transformer_engine,
    fp8_refusal,
    has_gradient_accumulation_fusion,
    transformer_engine,
    untested_transformer_engine,
    variable_length_attention,
)
from megatron_iwsft.distributed.descriptors import largest_world
from megatron_iwsft.distributed.fp8_recipes import FP8_RECIPES


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was checked, what was found, what it means. ok: False if installing something would help."""

    what: str
    found: str
    means: str
    ok: bool = True


def examine() -> list[Finding]:
    """Check the interpreter, devices and packages. Imports torch; starts no process group."""
    return [*_base(), *_gpu(), *_kernels(), *_optional()]


def paths() -> list[Finding]:
    """Which implementation a run on this machine uses for each part, and why. Imports torch and Megatron-Core."""
    import torch

    from megatron_iwsft.ops.logits import triton_refusal

    on_cpu = os.environ.get("IWSFT_DEVICE") == "cpu"
    gpu = torch.cuda.is_available() and not on_cpu
    no_gpu = "IWSFT_DEVICE is cpu" if on_cpu else "torch sees no GPU"
    engine, why = transformer_engine()
    fused = gpu and engine is not None
    refused = gpu and broken_transformer_engine() is not None
    no_engine = no_gpu if not gpu else f"Transformer Engine is {why}"
    no_triton = triton_refusal(torch.device("cuda", 0)) if gpu else no_gpu
    fusion = fused or has_gradient_accumulation_fusion(torch.device("cuda" if gpu else "cpu"))
    recipes = {recipe: fp8_refusal(recipe, on_cpu=on_cpu) for recipe in FP8_RECIPES}
    allowed = [recipe for recipe, refusal in recipes.items() if refusal is None]
    return [
        Finding("layers", "none: training is refused", no_engine, ok=False)
        if refused
        else Finding("layers", "Transformer Engine" if fused else "torch", "" if fused else no_engine),
        _attention(gpu, fused, no_gpu, no_engine),
        Finding(
            "log-probs",
            "torch" if no_triton else "Triton",
            no_triton or "one pass over the logits",
        ),
        _optimizer(gpu),
        Finding(
            "weight gradients",
            "accumulated in the matmul" if fusion else "accumulated after the matmul",
            "" if fusion else "fusion needs a GPU, and Transformer Engine or an extension of NVIDIA's apex",
        ),
        Finding("FP8", ", ".join(allowed) or "none", "" if allowed else str(recipes["delayed"])),
    ]


def _attention(gpu: bool, fused: bool, no_gpu: str, no_engine: str) -> Finding:
    variable_length, why_not = variable_length_attention() if gpu else (False, no_gpu)
    if fused:
        return Finding("attention", "Transformer Engine, over packed rows", "it chooses FlashAttention or cuDNN")
    if variable_length:
        limits = "bf16, head sizes up to 256 in steps of 8, no context parallelism; otherwise one call per segment"
        return Finding("attention", "torch's variable-length FlashAttention", f"{no_engine}; {limits}")
    return Finding("attention", "torch, one call per segment", why_not)


def _optimizer(gpu: bool) -> Finding:
    import torch

    try:
        from megatron.core.optimizer import Adam
    except Exception as error:  # a broken Transformer Engine makes Megatron-Core raise anything
        return Finding(
            "optimizer", "none", f"Megatron-Core cannot be imported: {type(error).__name__}: {error}", ok=False
        )
    optimizer = Adam if gpu else torch.optim.AdamW  # on CPU, distributed/cpu_backend.py replaces Adam by AdamW
    library = optimizer.__module__.partition(".")[0]
    not_fused = "neither Transformer Engine nor NVIDIA's apex is installed" if gpu else "no GPU"
    means = "fused" if library != "torch" else not_fused
    return Finding("optimizer", f"{library}'s {optimizer.__name__}", means)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _base() -> list[Finding]:
    import torch

    version = _version("megatron-core")
    lines = "0.16 for Python before 3.12, 0.19 for 3.12 and newer"
    return [
        Finding("Python", machine.python_version(), machine.machine()),
        Finding("torch", torch.__version__, f"CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"),
        Finding("megatron-core", version or "missing", lines if version else "pip install -e .", version is not None),
        _descriptors(),
    ]


def _descriptors() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    means = (
        f"a job raises it to the hard limit: if this machine hosts its store, up to {largest_world(hard):,} processes"
    )
    return Finding("open files", f"{soft:,}, at most {hard:,}", means, largest_world(hard) >= 1024)


def _gpu() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        why = "this torch is a CPU build" if torch.version.cuda is None else "torch finds no GPU or no driver"
        means = "runs on CPU over gloo, one process per core; set IWSFT_DEVICE=cpu to make this explicit"
        return [Finding("CUDA", why, means)]
    out = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        fp8 = fp8_refusal("delayed") is None
        out.append(
            Finding(
                f"GPU {i}",
                f"{p.name}, {p.total_memory / 1e9:.0f} GB, compute capability {p.major}.{p.minor}",
                "bf16" + (", FP8" if fp8 else ""),
            )
        )
    nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else None
    found = ".".join(map(str, nccl)) if nccl else "missing"
    out.append(
        Finding("NCCL", found, "collectives between GPUs" if nccl else "install a torch built with NCCL", bool(nccl))
    )
    return out


def _kernels() -> list[Finding]:
    engine, why = transformer_engine()
    broken, untested = broken_transformer_engine() is not None, untested_transformer_engine()
    triton = _version("triton")
    apex, apex_means, apex_ok = _apex()
    return [
        Finding(
            "Transformer Engine",
            engine or why,
            f"fused layers, attention over packed rows, FP8, fused AdamW{f'; {untested}' if untested else ''}"
            if engine
            else "training on a GPU is refused: reinstall or uninstall it"
            if broken
            else "layers in plain torch, no FP8; pip install 'transformer-engine[pytorch]' on a machine with CUDA",
            engine is not None,
        ),
        Finding("apex", apex, apex_means, apex_ok),
        Finding(
            "Triton",
            triton or "missing",
            "log-prob kernels with one pass over the logits, on a GPU"
            if triton
            else "log-prob operator in plain torch",
        ),
    ]


def _apex() -> tuple[str, str, bool]:
    import torch

    if importlib.util.find_spec("apex") is None:
        return "missing", "not needed with Transformer Engine", True
    if importlib.util.find_spec("amp_C") is None and importlib.util.find_spec("apex.optimizers") is None:
        return "another project of that name", "pip uninstall apex; build NVIDIA's from github.com/NVIDIA/apex", False
    fused = has_gradient_accumulation_fusion(torch.device("cuda"))
    return "NVIDIA's", "fused optimizer" + (", gradient-accumulation fusion" if fused else ""), True


def _optional() -> list[Finding]:
    out = []
    for package, extra, means in (
        ("gigatoken", "", "fast tokenization, if its ids equal the tokenizer's"),
        ("plotly", "report", "iwsft report"),
        ("rensa", "curation", "near-duplicate removal"),
        ("vllm", "evaluation", "fast sampling in iwsft evaluate"),
        ("lm-eval", "evaluation", "iwsft evaluate --tasks"),
        ("gymnasium", "control", "iwsft control"),
        ("tensorboard", "", "logging.tensorboard"),
    ):
        version = _version(package)
        install = f"pip install -e '.[{extra}]'" if extra else f"pip install {package}"
        out.append(Finding(package, version or "missing", means if version else f"{means}: {install}"))
    slurm = shutil.which("sbatch")
    out.append(Finding("Slurm", slurm or "missing", "see slurm/README.md" if slurm else "only needed on clusters"))
    return out
