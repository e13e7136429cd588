"""What `iwsft.json` must say, as far as something reads it: a checkpoint's config may be of another version, and have more or less."""

from __future__ import annotations

from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,  # pydantic asks for this one before Python 3.12
)

from pydantic import Field
from typing_extensions import TypedDict

from megatron_iwsft.utils.json_files import KEEP_UNKNOWN_KEYS

Count = Annotated[int, Field(ge=0, lt=2**53)]
Positive = Annotated[int, Field(ge=1, lt=2**53)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
_Section = dict[str, Any] | None


class _Run(TypedDict):
    __pydantic_config__ = KEEP_UNKNOWN_KEYS  # type: ignore[misc]
    name: NotRequired[str]
    seed: NotRequired[int]


class _Model(TypedDict):
    __pydantic_config__ = KEEP_UNKNOWN_KEYS  # type: ignore[misc]
    hf: NotRequired[str | None]
    checkpoint: NotRequired[str | None]
    config: NotRequired[_Section]


class _Corpus(TypedDict):
    __pydantic_config__ = KEEP_UNKNOWN_KEYS  # type: ignore[misc]
    corpus: str | None
    epochs: NotRequired[Finite | None]
    weight: NotRequired[Finite | None]


class _Data(TypedDict):
    __pydantic_config__ = KEEP_UNKNOWN_KEYS  # type: ignore[misc]
    corpus: NotRequired[str | None]
    corpora: NotRequired[list[_Corpus] | None]
    global_batch_size: NotRequired[Positive]
    pad_to: NotRequired[Positive | None]


class _Objective(TypedDict):
    __pydantic_config__ = KEEP_UNKNOWN_KEYS  # type: ignore[misc]
    name: NotRequired[str]


class _Precision(TypedDict):
    __pydantic_config__ = KEEP_UNKNOWN_KEYS  # type: ignore[misc]
    dtype: NotRequired[Literal["fp32", "bf16", "fp16"]]


class _Parallel(TypedDict):
    __pydantic_config__ = KEEP_UNKNOWN_KEYS  # type: ignore[misc]
    context: NotRequired[Positive]


class _Adapter(TypedDict):
    __pydantic_config__ = KEEP_UNKNOWN_KEYS  # type: ignore[misc]
    rank: NotRequired[Count | None]
    alpha: NotRequired[Finite | None]
    dropout: NotRequired[Finite]
    targets: NotRequired[list[str] | None]


class SavedConfig(TypedDict):
    """The config that a checkpoint was saved with. An imported one has only model and precision."""

    __pydantic_config__ = KEEP_UNKNOWN_KEYS  # type: ignore[misc]
    run: NotRequired[_Run]
    model: NotRequired[_Model]
    data: NotRequired[_Data]
    objective: NotRequired[_Objective]
    precision: NotRequired[_Precision]
    parallel: NotRequired[_Parallel]
    adapter: NotRequired[_Adapter | None]
    reference: NotRequired[_Section]


class _Divergence(TypedDict):
    skipped: NotRequired[Count]
    in_a_row: NotRequired[Count]
    rewinds: NotRequired[Count]
    passed_over: NotRequired[list[Count]]
    losses: NotRequired[list[float]]


class _DataPosition(TypedDict):
    start: dict[Literal["step", "epoch", "pack"], Count]
    global_batch_size: Positive
    first_epochs: list[Annotated[int, Field(ge=0, lt=2**63)]]


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


class HostStates(TypedDict):
    """`TrainState.host`'s states, by name."""

    __pydantic_config__ = KEEP_UNKNOWN_KEYS  # type: ignore[misc]
    divergence: NotRequired[_Divergence]
    data: NotRequired[_DataPosition]
    stop_early: NotRequired[_EarlyStop]
    best: NotRequired[_Best]
