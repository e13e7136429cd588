"""What this machine has, what that enables, and what to install for the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform as machine
import shutil
from dataclasses import dataclass

from megatron_iwsft.platform.capabilities import fp8_refusal, has_gradient_accumulation_fusion, transformer_engine


@dataclass(frozen=True)
class Finding:
    """One line: what was looked for, what is there, and what follows from it. ok: False where something could be gained."""

    what: str
    found: str
    means: str
    ok: bool = True


def examine() -> list[Finding]:
    """Look at interpreter, devices and packages. Imports torch; starts no process group."""
    return [*_base(), *_gpu(), *_kernels(), *_optional()]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _base() -> list[Finding]:
    import torch

    version = _version("megatron-core")
    lines = "0.16 for Python below 3.12, 0.19 from there on"
    return [
        Finding("Python", machine.python_version(), machine.machine()),
        Finding("torch", torch.__version__, f"CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"),
        Finding("megatron-core", version or "missing", lines if version else "pip install -e .", version is not None),
    ]


def _gpu() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        why = "this torch is a CPU build" if torch.version.cuda is None else "torch finds no GPU or no driver"
        return [Finding("CUDA", why, "runs on CPU over gloo, one process a core; IWSFT_DEVICE=cpu says so on purpose")]
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
        Finding("NCCL", found, "collectives between GPUs" if nccl else "a torch built with NCCL is needed", bool(nccl))
    )
    return out


def _kernels() -> list[Finding]:
    engine, why = transformer_engine()
    triton = _version("triton")
    apex, apex_means, apex_ok = _apex()
    return [
        Finding(
            "Transformer Engine",
            engine or why,
            "fused layers, attention over packed rows, FP8, fused AdamW"
            if engine
            else "layers in plain torch, no FP8; pip install 'transformer-engine[pytorch]' on a machine with CUDA",
            engine is not None,
        ),
        Finding("apex", apex, apex_means, apex_ok),
        Finding(
            "Triton",
            triton or "missing",
            "one pass over the logits in the log-prob operator, on a GPU" if triton else "that operator in plain torch",
        ),
    ]


def _apex() -> tuple[str, str, bool]:
    import torch

    if importlib.util.find_spec("apex") is None:
        return "missing", "not needed where Transformer Engine is", True
    if importlib.util.find_spec("amp_C") is None and importlib.util.find_spec("apex.optimizers") is None:
        return (
            "another project of that name",
            "pip uninstall apex; NVIDIA's is built from github.com/NVIDIA/apex",
            False,
        )
    fused = has_gradient_accumulation_fusion(torch.device("cuda"))
    return "NVIDIA's", "fused optimizer" + (", gradient-accumulation fusion" if fused else ""), True


def _optional() -> list[Finding]:
    out = []
    for package, extra, means in (
        ("gigatoken", "", "fast tokenization, where its ids are the tokenizer's own"),
        ("rensa", "curation", "near-duplicate removal"),
        ("vllm", "evaluation", "fast sampling in tools/evaluate.py"),
        ("lm-eval", "evaluation", "tools/evaluate.py --tasks"),
        ("gymnasium", "control", "tools/control.py"),
        ("tensorboard", "", "logging.tensorboard"),
    ):
        version = _version(package)
        install = f"pip install -e '.[{extra}]'" if extra else f"pip install {package}"
        out.append(Finding(package, version or "missing", means if version else f"{means}: {install}"))
    slurm = shutil.which("sbatch")
    out.append(Finding("Slurm", slurm or "missing", "slurm/README.md" if slurm else "needed on clusters only"))
    return out
