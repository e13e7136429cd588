"""Every config that ships: says what it is for, restates no default, and passes `--dry-run` for its number of GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_iwsft.config.describe import section_of
from megatron_iwsft.config.loader import load_config
from megatron_iwsft.config.schema import Config
from megatron_iwsft.config.section import Section
from megatron_iwsft.train.plan import plan
from tests.support import ROOT

CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if not path.name.startswith("control-"))
GEOMETRY = ROOT / "configs" / "models"
GPU_MEMORY = 80e9
MARGIN = 8e9  # logits, communication buffers, the CUDA context
# Says what a config is about, whatever the default is.
MAY_RESTATE = {"objective.name"}


def restated(schema: type[Section], given: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Keys of `given` with the value that they have by default."""
    for key, value in given.items():
        field = schema.model_fields[key]
        section = section_of(field)
        if section is not None:
            yield from restated(section, value, f"{prefix}{key}.")
        elif not field.is_required() and field.get_default(call_default_factory=True) == value:
            yield f"{prefix}{key}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_says_what_it_is_for_and_restates_no_default(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    # PyYAML reads 1e-5 as text; the configs write 1.0e-5.
    assert set(restated(Config, yaml.safe_load(text))) - MAY_RESTATE == set()
    assert load_config(path).parallel.world_size is not None


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("command", ["train", "reference"])
def test_it_passes_a_dry_run(path: Path, command: Any) -> None:
    config = load_config(path)
    geometry = GEOMETRY / f"{Path(config.model.hf).name}.json" if config.model.hf else None
    found = plan(
        command,
        config,
        world_size=config.parallel.world_size or 0,
        model_config=None if geometry is None else str(geometry),
        allow_missing=True,
    )
    print(found)
    if geometry is not None:
        assert found.memory is not None and found.memory.total <= GPU_MEMORY - MARGIN
