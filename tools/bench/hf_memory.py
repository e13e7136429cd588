"""Peak memory of Hugging Face import and export: tools/bench/hf_memory.py [--layers N]

Creates a random model (0.99 GB in fp32 by default), imports it with tools/convert_hf.py in one process and with tensor-parallel 2,
exports both checkpoints, and runs the same commands on a tiny model of the same family. The tiny model's peak is the base
(interpreter, libraries, process groups); the difference between the two is the memory for the weights.

An import starts one process per rank; the rank with the most memory counts. Memory is the proportional set size of a process and
its children, sampled every 5 ms, or the peak of the largest single process as counted by the kernel, whichever is larger. Fails if
import needs more than 1.3 × a rank's own share of the weights, or export more than 1.5 × the largest tensor.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from megatron_iwsft.errors import CheckpointError
from megatron_iwsft.utils.cli import run_command

_TOOL = str(Path(__file__).parents[1] / "convert_hf.py")
_IMPORT_BOUND, _EXPORT_BOUND = 1.3, 1.5
_BLOCK = (
    16e6  # bytes that an export writes at once; added to the base, because the tiny model is smaller than one block
)
_MB = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    args = parser.parse_args()

    from megatron_iwsft.hf.architecture import Architecture
    from megatron_iwsft.hf.mapping import shapes

    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory)
        large, tiny = _model(out / "large", layers=args.layers), _model(out / "tiny", layers=2, scale=32)
        sizes = [_bytes(shape) for shape in shapes(Architecture.from_directory(large)).values()]
        print(f"model: {sum(sizes) / _MB:,.0f} MB in fp32, largest tensor {max(sizes) / _MB:,.0f} MB")
        failed = []
        for name, degree in (("import", 1), ("import, TP 2, each rank", 2)):
            peaks = [_import(model, degree) for model in (large, tiny)]
            failed += _report(name, *peaks, sum(sizes) / degree, "own share", _IMPORT_BOUND)
        for degree in (1, 2):
            peaks = [_export(large, degree), _export(tiny, degree) + _BLOCK]
            failed += _report(f"export, saved at TP {degree}", *peaks, max(sizes), "largest tensor", _EXPORT_BOUND)
    if failed:
        raise CheckpointError(f"peak memory above the bound: {', '.join(failed)}.")


def _model(path: Path, *, layers: int, scale: int = 1) -> Path:
    """Write a random Llama with untied embeddings; `scale` divides every size."""
    from megatron_iwsft.hf.architecture import Architecture
    from megatron_iwsft.hf.directory import DTYPES, RandomInit, write_directory
    from megatron_iwsft.hf.mapping import shapes

    architecture = Architecture.from_hf(
        {
            "model_type": "llama",
            "hidden_size": 1024 // scale,
            "intermediate_size": 2816 // scale,
            "num_hidden_layers": layers,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "vocab_size": 32768 // scale,
        },
        where="the benchmark",
    )
    source, every = RandomInit(architecture, seed=0), shapes(architecture)
    write_directory(
        path, architecture, lambda n: source.read(n, (0, 0, every[n][0])), names=every, dtype=DTYPES["fp32"]
    )
    return path


def _bytes(shape: tuple[int, ...]) -> int:
    size = 4
    for n in shape:
        size *= n
    return size


def _checkpoint(model: Path, degree: int) -> Path:
    return model.with_name(f"{model.name}-tp{degree}")


def _import(model: Path, degree: int) -> float:
    command = [sys.executable, _TOOL, "import", "--hf", str(model), "--output", str(_checkpoint(model, degree))]
    return _peak([*command, "--tensor", str(degree)], ranks=True)


def _export(model: Path, degree: int) -> float:
    output = model.with_name(f"{model.name}-exported-{degree}")
    return _peak(
        [sys.executable, _TOOL, "export", "--checkpoint", str(_checkpoint(model, degree)), "--output", str(output)]
    )


def _report(name: str, peak: float, base: float, unit: float, unit_name: str, bound: float) -> list[str]:
    ratio = (peak - base) / unit
    print(
        f"{name}: base {base / _MB:,.0f} MB + {(peak - base) / _MB:,.0f} MB = {ratio:.2f} × {unit_name} of {unit / _MB:,.0f} MB "
        f"(bound {bound})",
        flush=True,
    )
    return [name] if ratio > bound else []


def _peak(command: list[str], *, ranks: bool = False) -> float:
    """Peak bytes of a command and its children; with `ranks`, of the process it starts per rank, the largest of them."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    sampled = [0.0]
    sampler = threading.Thread(target=_sample, args=(process, ranks, sampled))
    sampler.start()
    assert process.stdout is not None
    output = process.stdout.read()
    sampler.join()
    if process.wait():
        raise CheckpointError(f"{' '.join(command)} failed:\n{output.decode(errors='replace')}")
    if not sampled[0]:
        raise CheckpointError(f"{' '.join(command)} started no process whose memory could be measured.")
    return sampled[0]


def _sample(process: subprocess.Popen, ranks: bool, peak: list[float]) -> None:
    import psutil

    root = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            workers = [p for p in root.children() if _is_rank(p)] if ranks else [root]
            for worker in workers:
                family = [worker, *worker.children(recursive=True)]
                peak[0] = max(peak[0], sum(p.memory_full_info().pss for p in family), *map(_high_water, family))
        except (psutil.Error, FileNotFoundError, ProcessLookupError):
            pass  # one of them has just exited
        time.sleep(0.005)


def _is_rank(process: Any) -> bool:
    """Whether it is a worker of multiprocessing, as opposed to its resource tracker."""
    return any("spawn_main" in argument for argument in process.cmdline())


def _high_water(process: Any) -> float:
    """Peak resident memory since the process started (VmHWM). getrusage's ru_maxrss would include the parent's."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    run_command(main)
