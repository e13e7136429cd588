"""What is said of a run that goes on with other settings."""

from __future__ import annotations

from megatron_iwsft.config_file import parse_config
from megatron_iwsft.resume import changes

CONFIG = """
run: {name: r, dir: runs/r}
model: {hf: m}
data: {corpus: c, seq_length: 64, epochs: 1}
"""


def config(*overrides: str):
    return parse_config(CONFIG, list(overrides), where="c.yaml")


def test_what_changed_is_said() -> None:
    earlier = config().model_dump()
    assert changes(config("run.dir=elsewhere"), earlier) == ""
    assert changes(config("optimizer.lr=1e-4", "parallel.tensor=2"), earlier) == (
        "parallel.tensor 2 (was 1), optimizer.lr 0.0001 (was 1e-05)"
    )
    longer = changes(config("data.epochs=2"), earlier)
    assert longer.startswith("data.epochs 2 (was 1); the cosine schedule is stretched")
    constant = config("optimizer.schedule=constant")
    assert (
        changes(config("data.epochs=2", "optimizer.schedule=constant"), constant.model_dump())
        == "data.epochs 2 (was 1)"
    )


def test_a_setting_that_the_checkpoint_does_not_know_has_not_changed() -> None:
    earlier = config().model_dump()
    del earlier["checkpoint"]["keep_every"], earlier["export"]
    assert changes(config("checkpoint.keep_every=5", "export.at_end=true"), earlier) == ""
