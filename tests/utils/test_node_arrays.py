"""Arrays that the processes of a node share: computed once, whoever dies, and nothing is left behind."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, tiny

RANK = """
import os, signal, sys
import numpy as np
from megatron_iwsft.utils.node_arrays import node_arrays

def compute():
    with open("computed", "a") as log:
        log.write(os.environ["LOCAL_RANK"])
    if sys.argv[1] == "killed" and open("computed").read() == os.environ["LOCAL_RANK"]:
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[1] == "fails":
        raise ValueError("no such corpus")
    return {"squares": np.arange(1000) ** 2, "none": np.zeros(0, np.float32), "names": np.array(["a", "bc"])}

arrays = node_arrays("key", compute)
print(arrays["squares"].sum(), len(arrays["none"]), *arrays["names"], arrays["squares"].flags.writeable)
"""
FOUND = "332833500 0 a bc"


def run_ranks(
    directory: Path, how: str, *, count: int = 3, program: str = RANK
) -> tuple[list[tuple[int, str, str]], str]:
    """(status, output, errors) of each rank, and which of them computed, in order. `directory` is their temporary directory too."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(directory / "tmp"),
        "LOCAL_WORLD_SIZE": str(count),
    }
    (directory / "tmp").mkdir(exist_ok=True)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program, how],
            cwd=directory,
            env=environment | {"LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    outcomes = [(*rank.communicate(timeout=120), rank.returncode) for rank in ranks]
    return [(status, out.strip(), err) for out, err, status in outcomes], (directory / "computed").read_text()


PLANNER = """
import os, sys
import megatron_iwsft.data.sampler as sampler
from megatron_iwsft.config.loader import parse_config
from megatron_iwsft.train.sampling import make_sampler, open_mixture

packed = sampler.best_fit
def best_fit(*args, **options):
    with open("computed", "a") as log:
        log.write(os.environ["LOCAL_RANK"])
    return packed(*args, **options)

sampler.best_fit = best_fit
config = parse_config(open(sys.argv[1]).read(), [], where="test")
mixture = open_mixture(config)
packs = make_sampler(config, mixture).epoch(0).packs
arrays = {"lengths": mixture.lengths, "offsets": packs.offsets, "items": packs.items}
print({name: (int(array.sum()), array.flags.writeable) for name, array in arrays.items()})
"""


@pytest.mark.command
def test_one_rank_plans_an_epoch_and_all_map_its_plan(tmp_path: Path) -> None:
    lengths = [20 + i for i in range(40)]
    corpus = tiny.token_corpus(tmp_path, lengths)
    (tmp_path / "config.yaml").write_text(f"""
run: {{name: x, dir: {tmp_path}/run}}
model: {{config: {tiny.model_config()}}}
data: {{corpus: {corpus.directory}, seq_length: 128, global_batch_size: 4, epochs: 1}}
objective: {{name: sft}}
""")
    outcomes, computed = run_ranks(tmp_path, str(tmp_path / "config.yaml"), count=2, program=PLANNER)
    assert [status for status, _, _ in outcomes] == [0, 0], outcomes
    first, second = (ast.literal_eval(out) for _, out, _ in outcomes)
    assert first == second and first["items"][0] == sum(range(40)) and first["lengths"][0] == sum(lengths)
    assert not any(writeable for _, writeable in first.values())
    assert len(computed) == 1
    assert files(tmp_path) == []


def files(directory: Path) -> list[Path]:
    return [path for path in (directory / "tmp").rglob("*") if not path.is_dir()]


@pytest.mark.command
def test_one_rank_computes_and_all_have_its_arrays(tmp_path: Path) -> None:
    outcomes, computed = run_ranks(tmp_path, "well")
    assert [(status, out) for status, out, _ in outcomes] == [(0, f"{FOUND} False")] * 3, outcomes
    assert len(computed) == 1
    assert files(tmp_path) == []


@pytest.mark.command
def test_another_rank_takes_over_from_one_that_is_killed(tmp_path: Path) -> None:
    outcomes, computed = run_ranks(tmp_path, "killed")
    survivors = [out for status, out, _ in outcomes if status == 0]
    assert survivors == [f"{FOUND} False"] * 2, outcomes
    assert len(set(computed)) == 2
    # The killed rank never had them, so they are kept for it until another job starts on the node.
    (job,) = next((tmp_path / "tmp").glob("iwsft-*")).iterdir()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    job.rename(job.with_name(f"{job.name.split('-')[0]}-{gone.pid}"))
    (tmp_path / "computed").unlink()
    run_ranks(tmp_path, "well")
    assert files(tmp_path) == []


@pytest.mark.command
def test_an_error_is_raised_in_every_rank(tmp_path: Path) -> None:
    outcomes, computed = run_ranks(tmp_path, "fails")
    assert all(status == 1 and "no such corpus" in err for status, _, err in outcomes)
    assert sorted(computed) == ["0", "1", "2"]


@pytest.mark.command
@pytest.mark.parametrize("in_the_way", ["a file", "a directory that others can enter"])
def test_without_a_safe_directory_each_rank_keeps_a_copy_and_one_says_why(tmp_path: Path, in_the_way: str) -> None:
    own = tmp_path / "tmp" / f"iwsft-{os.geteuid()}"
    own.parent.mkdir()
    if in_the_way == "a file":
        own.touch()
    else:
        own.mkdir()
        own.chmod(0o777)
    outcomes, computed = run_ranks(tmp_path, "well", count=2)
    assert all(status == 0 and out.endswith(f"{FOUND} True") for status, out, _ in outcomes), outcomes
    assert sorted(computed) == ["0", "1"]
    told = [out for _, out, _ in outcomes if "Each of the 2 processes on this node keeps a copy" in out]
    assert len(told) == 1 and "belongs to this user alone" in told[0]


@pytest.mark.command
def test_a_single_process_writes_nothing(tmp_path: Path) -> None:
    outcomes, _ = run_ranks(tmp_path, "well", count=1)
    assert outcomes[0][:2] == (0, f"{FOUND} True")
    assert list((tmp_path / "tmp").iterdir()) == []
