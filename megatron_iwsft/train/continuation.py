"""Continuing a run: what may differ from the run that wrote a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_iwsft.checkpoint.info import AdapterInfo, CheckpointInfo
from megatron_iwsft.config.schema import Config
from megatron_iwsft.config.section import Section
from megatron_iwsft.errors import ConfigError
from megatron_iwsft.train.check import CheckedRun

# What may differ between a run and its continuation. Anything else would make it another run.
_MAY_CHANGE = {
    "run": {"name", "dir", "device", "bind_device", "hang_timeout_s", "max_bad_steps", "spike"},
    "adapter": {"init"},
    "data": {"corpus", "pad_to", "micro_batch_size", "balance", "epochs", "max_steps", "drawn_from", "verify"},
}
# Of each corpus of a mixture: its content is compared by fingerprint.
_MAY_CHANGE_IN_CORPORA = {"corpus", "name"}
_MUST_STAY = ("model", "adapter", "data", "objective", "reference", "precision", "run")
_NOT_REPORTED = {"run.name", "run.dir"}
_AFFECTS_LR_SCHEDULE = {
    "data.epochs",
    "data.max_steps",
    *(f"optimizer.{k}" for k in ("lr", "min_lr", "schedule", "warmup_fraction")),
}


def _check_packing(run: CheckedRun, info: CheckpointInfo) -> None:
    """Raise ConfigError if trajectories would be packed in another way: as multiples of another number of tokens."""
    data, context = info.config["data"], info.config.get("parallel", {}).get("context", 1)
    by_default = 2 * context if context > 1 and "pad_to" in data else 1  # before there was pad_to: 1
    earlier, now = data.get("pad_to") or by_default, run.config.packed_multiple
    if run.config.data.packing == "best_fit" and now != earlier:
        raise ConfigError(
            f"with data.pad_to {run.config.data.pad_to} and parallel.context {run.config.parallel.context}, trajectories are packed as "
            f"multiples of {now} tokens, but {info.directory} was trained with multiples of {earlier}. Set data.pad_to: {earlier} to "
            "continue that run, or choose another run.dir for a new one."
        )


def _check_adapter(run: CheckedRun, info: CheckpointInfo, now: AdapterInfo | None) -> None:
    """Raise ConfigError if a checkpoint of weights would be continued with adapters, or adapters on other weights than theirs."""
    earlier = info.adapter
    if (earlier is None) != (now is None):
        raise ConfigError(
            f"adapter.rank is {run.config.adapter.rank}, but {info.directory} holds {'weights' if earlier is None else 'adapters'}. "
            "Set it back to continue that run, or choose another run.dir for a new one."
        )
    if earlier is not None and now is not None and earlier["base"] != now["base"]:
        raise ConfigError(
            f"the base model {run.policy.described} has changed since {info.directory} was written: its fingerprint is {now['base'][:12]}, "
            f"not {earlier['base'][:12]}, and the adapters belong to the earlier one. Restore it, or choose another run.dir for a new run."
        )


def described_changes(config: Config, earlier: dict[str, Any]) -> str:
    """How `config` differs from the one that a checkpoint was saved with, for the log; empty if it does not."""
    found = {".".join(path): (value, before) for path, value, before in _differences(config, earlier)}
    text = ", ".join(
        f"{key} {now!r} (was {before!r})" for key, (now, before) in found.items() if key not in _NOT_REPORTED
    )
    if found.keys() & _AFFECTS_LR_SCHEDULE:
        text += "; the learning-rate schedule was recomputed from the new settings"
    return text


def _differences(
    settings: Section, earlier: Any, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """(key, value, earlier value) of every setting that differs. One that is missing in the earlier config does not count."""
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        before = earlier.get(name, value) if isinstance(earlier, dict) else value
        if isinstance(value, Section):
            yield from _differences(value, before, (*path, name))
        elif isinstance(value, list) and any(isinstance(entry, Section) for entry in value):
            if len(value) == len(before):
                for number, (entry, earlier_entry) in enumerate(zip(value, before, strict=True)):
                    yield from _differences(entry, earlier_entry, (*path, name, str(number)))
            else:
                yield (*path, name), [entry.model_dump() for entry in value], before
        elif value != before:
            yield (*path, name), value, before


def _may_change(path: tuple[str, ...]) -> bool:
    if path[:2] == ("data", "corpora"):
        return path[-1] in _MAY_CHANGE_IN_CORPORA
    return path[0] not in _MUST_STAY or path[1] in _MAY_CHANGE.get(path[0], ())


def check_same_run(run: CheckedRun, info: CheckpointInfo, adapter: AdapterInfo | None = None) -> None:
    """Raise ConfigError naming the first thing that differs and may not. adapter: what this run's checkpoints say about adapters."""
    for path, value, earlier in _differences(run.config, info.config):
        if not _may_change(path):
            raise ConfigError(
                f"{'.'.join(path)} is {value!r}, but {info.directory} was trained with {earlier!r}. Set it back to continue that run, or "
                "choose another run.dir for a new one."
            )
    _check_packing(run, info)
    _check_adapter(run, info, adapter)
    if info.objective != run.objective_source:
        raise ConfigError(
            f"the file of objective.name {run.config.objective.name} has changed since {info.directory} was written, so earlier and later "
            "steps would use different objectives. Restore the earlier file, or choose another run.dir for a new run."
        )
    for corpus, earlier in zip(
        run.mixture.corpora, info.corpora.values(), strict=False
    ):  # none of an imported checkpoint
        if corpus.fingerprint != earlier:
            raise ConfigError(
                f"data.corpus {corpus.directory} is not the corpus that {info.directory} was trained on: its fingerprint is "
                f"{corpus.fingerprint[:12]}, not {earlier[:12]}. Restore the earlier corpus, or choose another run.dir for a new run."
            )
