"""The log of a run that is continued with other settings."""

from __future__ import annotations

from megatron_iwsft.config.loader import parse_config
from megatron_iwsft.train.continuation import described_changes

CONFIG = """
run: {name: r, dir: runs/r}
model: {hf: m}
data: {corpus: c, seq_length: 64, epochs: 1}
"""


def config(*overrides: str):
    return parse_config(CONFIG, list(overrides), where="c.yaml")


def test_changed_settings_are_described() -> None:
    earlier = config().model_dump()
    assert described_changes(config("run.dir=elsewhere"), earlier) == ""
    assert described_changes(config("parallel.tensor=2", "logging.wandb.mode=offline"), earlier) == (
        "parallel.tensor 2 (was 1), logging.wandb.mode 'offline' (was 'disabled')"
    )
    for change in ("optimizer.lr=1e-4", "data.epochs=2", "optimizer.schedule=constant"):
        assert "; the learning-rate schedule was recomputed" in described_changes(config(change), earlier)


def test_a_setting_missing_in_the_checkpoint_counts_as_unchanged() -> None:
    earlier = config().model_dump()
    del earlier["checkpoint"]["keep_every"], earlier["data"]["quality"]["normalize"], earlier["export"]
    new = config("checkpoint.keep_every=5", "data.quality.normalize=true", "export.at_end=true")
    assert described_changes(new, earlier) == ""
