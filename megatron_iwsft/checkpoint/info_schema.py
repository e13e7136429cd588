"""What `iwsft.json` must say, as far as something reads it: a checkpoint's config may be of another version, and have more or less."""

from __future__ import annotations

from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    Required,  # pydantic asks for this one before Python 3.12
)

from pydantic import Field
from typing_extensions import TypedDict

from megatron_iwsft.utils.json_files import KEEP_UNKNOWN_KEYS, Count, Positive

Finite = Annotated[float, Field(allow_inf_nan=False)]
_Section = dict[str, Any] | None


class _Run(TypedDict, total=False):
    __pydantic_config__ = KEEP_UNKNOWN_KEYS  # type: ignore[misc]
    name: str
    seed: int


class _Model(TypedDict, total=False):
    __pydantic_config__ = KEEP_UNKNOWN_KEYS  # type: ignore[misc]
    hf: str | None
    checkpoint: str | None
    config: _Section


class _Corpus(TypedDict, total=False):
    __pydantic_config__ = KEEP_UNKNOWN_KEYS  # type: ignore[misc]
    corpus: Required[str | None]
    epochs: Finite | None
    weight: Finite | None


class _Data(TypedDict, total=False):
    __pydantic_config__ = KEEP_UNKNOWN_KEYS  # type: ignore[misc]
    corpus: str | None
    corpora: list[_Corpus] | None
    global_batch_size: Positive
    pad_to: Positive | None


class _Objective(TypedDict, total=False):
    __pydantic_config__ = KEEP_UNKNOWN_KEYS  # type: ignore[misc]
    name: str


class _Precision(TypedDict, total=False):
    __pydantic_config__ = KEEP_UNKNOWN_KEYS  # type: ignore[misc]
    dtype: Literal["fp32", "bf16", "fp16"]


class _Parallel(TypedDict, total=False):
    __pydantic_config__ = KEEP_UNKNOWN_KEYS  # type: ignore[misc]
    context: Positive


class _Adapter(TypedDict, total=False):
    __pydantic_config__ = KEEP_UNKNOWN_KEYS  # type: ignore[misc]
    rank: Count | None
    alpha: Finite | None
    dropout: Finite
    targets: list[str] | None


class SavedConfig(TypedDict, total=False):
    """The config that a checkpoint was saved with. An imported one has only model and precision."""

    __pydantic_config__ = KEEP_UNKNOWN_KEYS  # type: ignore[misc]
    run: _Run
    model: _Model
    data: _Data
    objective: _Objective
    precision: _Precision
    parallel: _Parallel
    adapter: _Adapter | None
    reference: _Section


class _Divergence(TypedDict, total=False):
    skipped: Count
    in_a_row: Count
    rewinds: Count
    passed_over: list[Count]
    losses: list[float]


class _DataPosition(TypedDict):
    start: dict[Literal["step", "epoch", "pack"], Count]
    global_batch_size: Positive
    first_epochs: list[Annotated[int, Field(ge=0, lt=2**63)]]
    packs: NotRequired[
        dict[Annotated[str, Field(pattern=r"^\d{1,18}$")], Positive]
    ]  # of epochs, in quality mode sample


class _EarlyStop(TypedDict):
    metric: str
    mode: str | None  # None: by the metric
    best: float | None
    best_step: Count
    without_improvement: Count


class _Best(TypedDict):
    metric: str
    mode: str | None  # None: by the metric
    entries: list[Annotated[list[float], Field(min_length=2, max_length=2)]]


class HostStates(TypedDict, total=False):
    """`TrainState.host`'s states, by name."""

    __pydantic_config__ = KEEP_UNKNOWN_KEYS  # type: ignore[misc]
    divergence: _Divergence
    data: _DataPosition
    stop_early: _EarlyStop
    best: _Best
