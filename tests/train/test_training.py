"""The main job on two processes: SFT, reference, iw-SFT cached and live, resume, other layouts, export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_iwsft.checkpoint.info import CheckpointInfo
from megatron_iwsft.checkpoint.tensors import CheckpointTensors
from megatron_iwsft.config.loader import parse_config
from megatron_iwsft.config.schema import Config
from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.errors import CheckpointError, ConfigError, DataError, UserError
from megatron_iwsft.testing import comparable_metrics as metrics
from megatron_iwsft.testing import run_distributed
from megatron_iwsft.utils.files import sha256_file
from tests.support import tiny

pytestmark = pytest.mark.parallel

LENGTHS = [30 + (i * 37) % 90 for i in range(40)]


def config(tmp: Path, name: str, *overrides: str, start: str = "sft") -> Config:
    """An iw-SFT run from the SFT run's checkpoint unless overridden; TP 2."""
    text = f"""
run: {{name: {name}, dir: {tmp}/{name}, seed: 7}}
model: {{checkpoint: {tmp}/{start}}}
data: {{corpus: {tmp}/corpus, seq_length: 128, global_batch_size: 4, epochs: 2}}
objective: {{name: iw_sft, temperature: 2.0}}
parallel: {{tensor: 2, sequence: true}}
precision: {{dtype: fp32}}
optimizer: {{lr: 3.0e-3, weight_decay: 0.1}}
checkpoint: {{every: 3, keep: 9}}
"""
    return parse_config(text, list(overrides), where=name)


SFT = (
    "objective.name=sft",
    "model.checkpoint=null",
    f"model.config={json.dumps(tiny.model_config(tie_word_embeddings=True))}",
)
LAYOUTS = {
    "pp2": ("parallel.tensor=1", "parallel.sequence=false", "parallel.pipeline=2"),
    "dp2": ("parallel.tensor=1", "parallel.sequence=false"),
    "cp2": ("parallel.tensor=1", "parallel.sequence=false", "parallel.context=2"),
    "plain-optimizer": ("optimizer.distributed=false",),
    "async": ("checkpoint.asynchronous=true", "parallel.tensor=1", "parallel.sequence=false"),
    "vp2": ("parallel.tensor=1", "parallel.sequence=false", "parallel.pipeline=2", "parallel.virtual_pipeline=2"),
    "overlap": (
        "parallel.tensor=1",
        "parallel.sequence=false",
        "optimizer.overlap_grad_reduce=true",
        "optimizer.overlap_param_gather=true",
        "export={every: 7, at_end: true}",
    ),
}


# a run that is interrupted → the unbroken one that it must repeat
RESUMED = {
    "resumed": "cached",
    "resumed-plain": "plain-optimizer",
    "resumed-async": "async",
    "resumed-vp2": "vp2",
    "resumed-dp2": "dp2",
    "resumed-at-pp2": "cached",
    "resumed-at-dp2": "cached",
    "resumed-dp2-at-pp2": "dp2",
}


def all_runs(platform, tmp: Path) -> None:
    from megatron_iwsft.train.precompute import precompute_reference
    from megatron_iwsft.train.trainer import train

    train(config(tmp, "sft", *SFT, "data.max_steps=4", "checkpoint.keep=1"))
    precompute_reference(config(tmp, "cached"))
    train(config(tmp, "cached"))
    train(config(tmp, "live", "reference.source=live"))
    for name, overrides in LAYOUTS.items():
        train(config(tmp, name, *overrides))
    train(config(tmp, "live-pp2", *LAYOUTS["pp2"], "reference.source=live"))
    evaluation = ("evaluation.every=2", f"evaluation.corpus={tmp}/corpus")
    train(config(tmp, "evaluated", *evaluation))
    train(config(tmp, "unpacked", "data.packing=none", "data.micro_batch_size=2", "reference.source=live", *evaluation))

    # Interrupted after step 6, the epoch ending with step 7, and continued.
    for name, whole in RESUMED.items():
        overrides = LAYOUTS.get(whole, ())
        if platform.rank == 0:
            shutil.copytree(tmp / whole, tmp / name)
            for later in sorted((tmp / name / "checkpoints").glob("step-*"))[2:]:
                shutil.rmtree(later)
        torch.distributed.barrier()
        train(config(tmp, name, *overrides, *LAYOUTS.get(name.partition("-at-")[2], ())))

    # The newest checkpoint is damaged: the one before it is used.
    if platform.rank == 0:
        shutil.copytree(tmp / "cached", tmp / "damaged")
        newest = sorted((tmp / "damaged" / "checkpoints").glob("step-*"))[-1]
        for file in newest.glob("*.distcp"):
            file.write_bytes(b"")
        for name in ("common.pt", "metadata.json"):  # and of the one before, a part that ranks read on their own
            (sorted((tmp / "damaged" / "checkpoints").glob("step-*"))[-2] / name).write_bytes(b"")
    torch.distributed.barrier()
    train(config(tmp, "damaged"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    tmp = tmp_path_factory.mktemp("runs")
    corpus = tiny.token_corpus(tmp, LENGTHS, scores=True)
    assert corpus.directory == tmp / "corpus"
    run_distributed(all_runs, 2, tmp)
    return tmp


def close(
    found: list[dict],
    expected: list[dict],
    tolerance: float,
    keys=("loss", "nll", "grad_norm", "weight_mean", "weight_ess"),
) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        for key in keys:
            assert a[key] == pytest.approx(b[key], rel=tolerance), (a["step"], key)


def test_it_learns(runs: Path) -> None:
    nll = [m["nll"] for m in metrics(runs / "cached")]
    assert nll[-1] < nll[0] - 0.1
    assert "weight_mean" not in metrics(runs / "sft")[0]


def test_every_trajectory_is_trained_on_once_an_epoch(runs: Path) -> None:
    corpus = Corpus.open(runs / "corpus")
    lines = metrics(runs / "cached")
    for epoch in (0, 1):
        of_epoch = [m for m in lines if m["epoch"] == epoch]
        assert sum(m["sequences"] for m in of_epoch) == len(corpus)
        assert sum(m["tokens"] for m in of_epoch) == corpus.lengths.sum()
        assert sum(m["trained_tokens"] for m in of_epoch) == corpus.num_trained.sum()


def test_weights_are_one_before_the_first_update(runs: Path) -> None:
    for run in ("cached", "live", "pp2", "dp2", "cp2", "live-pp2"):
        first = metrics(runs / run)[0]
        assert abs(first["weight_max"] - 1) <= 1e-6, run
        assert abs(first["weight_mean"] - 1) <= 1e-6, run
    assert metrics(runs / "live")[0]["abs_log_ratio"] == 0


def test_weights_move_away_from_one(runs: Path) -> None:
    assert metrics(runs / "cached")[-1]["weight_max"] > 1.05


def test_cached_and_live_references_are_equal(runs: Path) -> None:
    assert metrics(runs / "cached") == metrics(runs / "live")


@pytest.mark.parametrize("layout", [*LAYOUTS, "live-pp2"])
def test_curves_agree_at_every_layout(runs: Path, layout: str) -> None:
    close(metrics(runs / layout), metrics(runs / "cached"), 1e-4)


@pytest.mark.parametrize("run", [*(run for run in RESUMED if "-at-" not in run), "damaged"])
def test_a_resumed_run_repeats_the_unbroken_one_bit_for_bit(runs: Path, run: str) -> None:
    whole = RESUMED.get(run, "cached")
    assert metrics(runs / run) == metrics(runs / whole)
    same_weights(runs / run, runs / whole)


def same_weights(a: Path, b: Path) -> None:
    """The latest checkpoints of two runs hold the same weights and optimizer states, bit for bit."""
    infos = [CheckpointInfo.read(run) for run in (a, b)]
    assert infos[0].step == infos[1].step
    stored = FileSystemReader(str(infos[0].directory)).read_metadata().state_dict_metadata
    names = [name for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)]
    assert any(".exp_avg_sq." in name for name in names)
    first, second = (CheckpointTensors(info.directory) for info in infos)
    assert [name for name in names if not torch.equal(first.read(name), second.read(name))] == []


def test_overlapped_communication_saves_the_weights_that_were_trained(runs: Path) -> None:
    same_weights(runs / "overlap", runs / "dp2")


@pytest.mark.parametrize("run", [run for run in RESUMED if "-at-" in run])
def test_a_run_resumes_at_another_layout(runs: Path, run: str) -> None:
    close(metrics(runs / run), metrics(runs / RESUMED[run]), 1e-5)


def test_evaluation_does_not_touch_training(runs: Path) -> None:
    evaluated = [{k: v for k, v in line.items() if k != "eval_nll"} for line in metrics(runs / "evaluated")]
    assert evaluated == metrics(runs / "cached")


def test_unpacked_micro_batches_and_evaluation(runs: Path) -> None:
    lines = metrics(runs / "unpacked")
    assert len(lines) == 2 * len(LENGTHS) // 4
    assert [("eval_nll" in m) for m in lines] == [i % 2 == 1 for i in range(len(lines))]
    assert lines[-1]["eval_nll"] < lines[1]["eval_nll"]


def test_checkpoints_are_kept_as_configured(runs: Path) -> None:
    kept = sorted(p.name for p in (runs / "cached" / "checkpoints").iterdir())
    assert kept == ["latest", *(f"step-{step:08d}" for step in (3, 6, 9, 12, 14))]
    assert len(sorted((runs / "sft" / "checkpoints").glob("step-*"))) == 1, "keep is 1 there"


def test_the_exported_model_gives_the_log_probs_that_training_reported(runs: Path, tmp_path: Path) -> None:
    from megatron_iwsft.convert.export import export_checkpoint
    from megatron_iwsft.evaluate.score import score_corpus

    reported = metrics(runs / "unpacked")[-1]["eval_nll"]
    score = score_corpus(export_checkpoint(runs / "unpacked", tmp_path / "hf"), runs / "corpus")
    assert score.nll == pytest.approx(reported, abs=1e-4)
    assert score.trajectories == len(LENGTHS)


def test_a_running_job_exports_what_its_checkpoints_hold(runs: Path, tmp_path: Path) -> None:
    from megatron_iwsft.convert.export import export_checkpoint

    exports = runs / "overlap" / "hf"
    assert sorted(p.name for p in exports.iterdir()) == ["step-00000007", "step-00000014"]
    offline = export_checkpoint(runs / "overlap", tmp_path / "hf")
    for file in offline.iterdir():
        assert (exports / "step-00000014" / file.name).read_bytes() == file.read_bytes(), file.name
    card = (offline / "README.md").read_text()
    assert Corpus.open(runs / "corpus").fingerprint in card
    assert "run: overlap" in card


def train_only(platform, settings: Config) -> None:
    from megatron_iwsft.train.trainer import train

    train(settings)


def mistakes(platform, tmp: Path) -> dict[str, tuple[type, str]]:
    """What each wrong setup says."""
    from megatron_iwsft.train.trainer import train

    own = (f"objective.name={tmp}/own.py:mine", "reference.source=live", "data.max_steps=1")
    train(config(tmp, "own", *own))
    if platform.rank == 0:
        (tmp / "own.py").write_text((tmp / "own.py").read_text().replace("2.0", "3.0"))
    torch.distributed.barrier()

    found = {}
    cases = {
        "an edited objective": config(tmp, "own", *own[:2], "data.max_steps=2"),
        "no sidecar": config(tmp, "x", f"model.checkpoint={tmp}/cached"),
        "live reference of another size": config(tmp, "x", "reference.source=live", f"reference.model={tmp}/other"),
        "never resumes": config(tmp, "cached", "checkpoint.resume=never"),
        "another objective": config(tmp, "cached", "objective.temperature=1.0"),
        "another corpus": config(tmp, "sft", *SFT, "data.max_steps=4", f"data.corpus={tmp}/another/corpus"),
        "experts": config(tmp, "x", "parallel.expert=2"),
        "evaluated with another tokenizer": config(
            tmp, "x", f"evaluation.corpus={tmp}/foreign/corpus", "evaluation.every=1"
        ),
        "unfinished sidecar": config(tmp, "x", f"data.corpus={tmp}/unfinished"),
        "stale sidecar": config(tmp, "x", f"data.corpus={tmp}/stale"),
        "truncated sidecar": config(tmp, "x", f"data.corpus={tmp}/truncated"),
        "flipped sidecar": config(tmp, "x", f"data.corpus={tmp}/flipped"),
        "wrong values": config(tmp, "wrong", f"data.corpus={tmp}/wrong"),
        "other tokenizer": config(tmp, "x", f"data.corpus={tmp}/foreign/corpus"),
        "too many layers": config(
            tmp,
            "x",
            "parallel.pipeline=2",
            "parallel.tensor=1",
            "parallel.sequence=false",
            "parallel.virtual_pipeline=4",
        ),
        "too many ranks": config(tmp, "x", "parallel.tensor=4"),
        "no checkpoint": config(tmp, "x", f"model.checkpoint={tmp}/corpus"),
        "no corpus": config(tmp, "x", "data.corpus=/nowhere"),
    }
    for name, settings in cases.items():
        try:
            train(settings)
        except UserError as error:
            found[name] = (type(error), str(error))
    return found


def test_mistakes_are_told(runs: Path) -> None:
    sidecar = next((runs / "corpus").glob("reference-*")).name
    for name in ("unfinished", "stale", "truncated", "flipped", "wrong"):
        shutil.copytree(runs / "corpus", runs / name)
    (runs / "unfinished" / sidecar / "manifest.json").unlink()
    manifest = runs / "stale" / sidecar / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"corpus": "', '"corpus": "0'))
    binary = runs / "truncated" / sidecar / "shard-00000.bin"
    binary.write_bytes(binary.read_bytes()[:-4])
    values = np.fromfile(runs / "wrong" / sidecar / "shard-00000.bin", np.float32)
    (values * 1.1).tofile(runs / "wrong" / sidecar / "shard-00000.bin")
    manifest = runs / "wrong" / sidecar / "manifest.json"
    said = json.loads(manifest.read_text())
    said["files"]["shard-00000.bin"] = sha256_file(runs / "wrong" / sidecar / "shard-00000.bin")
    manifest.write_text(json.dumps(said))
    binary = runs / "flipped" / sidecar / "shard-00000.bin"
    binary.write_bytes(binary.read_bytes()[:-1] + b"\x01")
    (runs / "own.py").write_text(
        "import torch\nfrom megatron_iwsft.objectives.functions import Weighted\n\n\ndef mine(t, s):\n"
        "    w = torch.sigmoid(2.0 * (t.proposal - t.reference)) * t.mask\n"
        "    return Weighted(loss=-w * t.logprobs, weight=w, clipped=torch.zeros_like(w))\n"
    )
    tiny.token_corpus(runs / "foreign", [20] * 4, vocab_size=280)
    tiny.token_corpus(runs / "another", LENGTHS, seed=1)
    other = tiny.model_config(hidden_size=32)
    run_distributed(
        train_only, 2, config(runs, "other", SFT[0], SFT[1], f"model.config={json.dumps(other)}", "data.max_steps=1")
    )

    found = run_distributed(mistakes, 2, runs)[0]
    expected = {
        "an edited objective": (ConfigError, "own.py:mine has changed since"),
        "no sidecar": (DataError, "has no reference log-probs of this reference model"),
        "live reference of another size": (ConfigError, "needs a reference with the policy's hidden size"),
        "never resumes": (ConfigError, "checkpoint.resume is never, but"),
        "another objective": (ConfigError, "objective.temperature is 1.0, but"),
        "another corpus": (ConfigError, "is not the corpus that"),
        "experts": (ConfigError, "the qwen2 family has no experts"),
        "evaluated with another tokenizer": (DataError, "evaluation.corpus"),
        "unfinished sidecar": (DataError, "are unfinished. Run tools/precompute_reference.py"),
        "stale sidecar": (DataError, "was computed for another version of the corpus"),
        "truncated sidecar": (DataError, "but its index says"),
        "flipped sidecar": (DataError, "shard-00000.bin is damaged: its checksum"),
        "wrong values": (DataError, "policy and reference are the same model, yet their log-probs differ by"),
        "other tokenizer": (DataError, "was made with a different tokenizer than"),
        "too many layers": (ConfigError, "4 layers do not divide into 8 pipeline stages"),
        "too many ranks": (ConfigError, "does not divide the world size of 2 processes"),
        "no checkpoint": (CheckpointError, "holds no complete checkpoint"),
        "no corpus": (DataError, "there is no corpus at /nowhere"),
    }
    for name, (kind, message) in expected.items():
        assert name in found, f"{name}: no error"
        assert found[name][0] is kind, name
        assert message in found[name][1], found[name][1]
