"""The bench of FP8's rounding, on a tiny random model."""

from __future__ import annotations

import pytest

from tests.support import run_python

pytestmark = [pytest.mark.slow, pytest.mark.parallel, pytest.mark.command]


def test_every_precision_has_a_row() -> None:
    sizes = ["--hidden", "64", "--layers", "2", "--count", "12", "--seq-length", "128", "--steps", "2"]
    precisions = ["fp32", "tensorwise", "blockwise"]
    done = run_python("tools/bench/fp8_noise.py", *sizes, "--precision", *precisions, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line.startswith("|")
    ]
    found = {name: cells for name, *cells in rows[2:]}
    assert list(found) == ["bf16", *precisions]
    noise = {name: float(cells[0].split(",")[0]) for name, cells in found.items()}
    assert noise["bf16"] == 0 < noise["fp32"] < noise["blockwise"], "rounding to FP8 is coarser than to bf16"
    packing = {name: float(cells[1].split(",")[0]) for name, cells in found.items()}
    assert packing["blockwise"] < packing["tensorwise"], (
        "a scale per block does not depend on the other trajectories of a row"
    )
    own = {name: float(cells[4].split(",")[0]) for name, cells in found.items()}
    assert own["blockwise"] < own["tensorwise"], "weights in the same precision"
    assert all(float(cells[5]) >= 0 and cells[6].count("%") == 2 for cells in found.values()), (
        "training has begun and ended"
    )
