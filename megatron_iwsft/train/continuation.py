"""Continuing a run: what may differ from the run that wrote a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_iwsft.checkpoint.info import AdapterInfo, CheckpointInfo
from megatron_iwsft.checkpoint.names import INFO
from megatron_iwsft.config.data import MixtureCorpus
from megatron_iwsft.config.schema import Config
from megatron_iwsft.config.section import Section
from megatron_iwsft.data.sampler import Sampler
from megatron_iwsft.distributed.parallel_layout import ParallelLayout
from megatron_iwsft.errors import CheckpointError, ConfigError
from megatron_iwsft.train.check import CheckedRun

# What may differ between a run and its continuation. Anything else would make it another run.
_MAY_CHANGE = {
    "run": {
        "name",
        "dir",
        "device",
        "bind_device",
        "hang_timeout_s",
        "max_bad_steps",
        "spike",
        "stop_early",
        "profile",
    },
    "adapter": {"init"},
    "data": {
        "corpus",
        "pad_to",
        "micro_batch_size",
        "global_batch_size",
        "balance",
        "epochs",
        "max_steps",
        "drawn_from",
        "verify",
    },
}
# Of each corpus of a mixture: its content is compared by fingerprint.
_MAY_CHANGE_IN_CORPORA = {"corpus", "name", "appended"}
_MUST_STAY = ("model", "adapter", "data", "objective", "reference", "precision", "run")
_NOT_REPORTED = {"run.name", "run.dir"}
_AFFECTS_LR_SCHEDULE = {
    "data.epochs",
    "data.max_steps",
    "data.global_batch_size",
    *(f"optimizer.{k}" for k in ("lr", "min_lr", "schedule", "warmup_fraction", "decay_fraction")),
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
    found = {".".join(path): (value, before) for path, value, before in _differences(*_alike(config, earlier))}
    text = ", ".join(
        f"{key} {now!r} (was {before!r})"
        for key, (now, before) in found.items()
        if key not in _NOT_REPORTED and not key.endswith(".appended")
    )
    if found.keys() & _AFFECTS_LR_SCHEDULE:
        text += "; the learning-rate schedule was recomputed from the new settings"
    return text


def described_layout(layout: ParallelLayout, earlier: ParallelLayout) -> str:
    """Another number of data-parallel ranks, which no config has, for the log; empty if it is the same."""
    return f"data-parallel degree {layout.data} (was {earlier.data})" if layout.data != earlier.data else ""


def _alike(config: Config, earlier: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
    """Both as mixtures, if one names a single corpus and the other a list."""
    before = earlier.get("data", {})
    if bool(config.data.corpora) == bool(before.get("corpora")):
        return config, earlier
    mixture = [MixtureCorpus(corpus=before["corpus"])] if before.get("corpus") else []
    as_list = [entry.model_dump() for entry in mixture] or before.get("corpora", [])
    data = config.data.model_copy(update={"corpus": None, "corpora": config.data.mixture})
    return config.model_copy(update={"data": data}), earlier | {"data": before | {"corpus": None, "corpora": as_list}}


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
            if not isinstance(before, list) or len(value) < len(before):
                yield (*path, name), [entry.model_dump() for entry in value], before
                continue
            for number, (entry, earlier_entry) in enumerate(zip(value, before, strict=False)):
                yield from _differences(entry, earlier_entry, (*path, name, str(number)))
            for number in range(len(before), len(value)):
                yield (*path, name, str(number), "appended"), value[number].model_dump(exclude_defaults=True), None
        elif value != before:
            yield (*path, name), value, before


def _may_change(path: tuple[str, ...]) -> bool:
    if path[:2] == ("data", "corpora"):
        return path[-1] in _MAY_CHANGE_IN_CORPORA
    return path[0] not in _MUST_STAY or path[1] in _MAY_CHANGE.get(path[0], ())


def _earlier_data(run: CheckedRun, info: CheckpointInfo) -> dict[str, Any]:
    """The sampler's state in a checkpoint; one from before there was any has started at the beginning."""
    corpora = len(info.corpora) or len(run.mixture.corpora)
    at_start = {
        "start": {},
        "global_batch_size": info.config["data"]["global_batch_size"],
        "first_epochs": [0] * corpora,
    }
    return info.host.get("data", at_start)


def _check_steps_ahead(run: CheckedRun, info: CheckpointInfo) -> None:
    """Raise ConfigError if the data that are left cannot be continued with this batch size or these corpora."""
    data, earlier = run.config.data, _earlier_data(run, info)
    appended = run.mixture.names[len(earlier["first_epochs"]) :]
    if appended and (data.quality.normalize or any(isinstance(c, str) for c in data.quality.thresholds)):
        key = "normalize" if data.quality.normalize else "thresholds in per cent"
        raise ConfigError(
            f"data.corpora: {appended[0]} was appended, but with data.quality.{key} it would change which trajectories of the earlier "
            "corpora are used, and how. Use another run.dir for a new run on all of them."
        )
    if data.group_by_cost and data.global_batch_size != earlier["global_batch_size"]:
        raise ConfigError(
            f"data.global_batch_size is {data.global_batch_size}, but with data.group_by_cost an epoch's order depends on it: set it to "
            f"{earlier['global_batch_size']}, as in {info.directory}, or choose another run.dir for a new run."
        )
    ahead = [step for step in info.host.get("divergence", {}).get("passed_over", []) if step > info.step]
    if ahead and (appended or data.global_batch_size != earlier["global_batch_size"]):
        what = (
            f"data.corpora: {appended[0]} was appended"
            if appended
            else f"data.global_batch_size is {data.global_batch_size}"
        )
        raise ConfigError(
            f"{what}, but a rewind has set aside the batches of steps {ahead[0]} to {ahead[-1]}, which would then hold other trajectories. "
            f"Set it back until step {ahead[-1]} is done."
        )


@dataclass(frozen=True)
class DataPosition:
    """The sampler's state in every checkpoint. `continue_data` takes it over when a run starts; a rewind stays within that plan."""

    sampler: Sampler

    def state(self) -> dict[str, Any]:
        return self.sampler.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Nothing: see above."""


def continue_data(run: CheckedRun, info: CheckpointInfo) -> list[str]:
    """Have the run's sampler continue where a checkpoint is in its data; returns what changes from there on, for the log.

    Raises ConfigError if an appended corpus would join after the run's end, CheckpointError if the checkpoint is of more corpora.
    """
    earlier, sampler = _earlier_data(run, info), run.sampler
    if len(earlier["first_epochs"]) > len(sampler.parts):
        raise CheckpointError(
            f"{info.directory}/{INFO} is damaged: it is of {len(earlier['first_epochs'])} corpora, and the run has {len(sampler.parts)}. "
            "Use another checkpoint."
        )
    at = sampler.continue_with(earlier, info.step)
    found = []
    if sampler.global_batch_size != earlier["global_batch_size"]:
        found.append(
            f"{sampler.global_batch_size} sequences per step from sequence {at.pack} of epoch {at.epoch} on, none left out or repeated"
        )
    for part in sampler.parts[len(earlier["first_epochs"]) :]:
        total = run.total_steps
        if total <= info.step or sampler.position_at(total - 1).epoch < part.first_epoch:
            raise ConfigError(
                f"data.corpora: {part.name} joins with epoch {part.first_epoch}, the first that has not begun, but the run ends before "
                "that. Raise data.epochs or data.max_steps."
            )
        found.append(f"corpus {part.name} joins with epoch {part.first_epoch}")
    return found


def check_same_run(run: CheckedRun, info: CheckpointInfo, adapter: AdapterInfo | None = None) -> None:
    """Raise ConfigError naming the first thing that differs and may not, CheckpointError for a checkpoint of no run.

    adapter: what this run's checkpoints say about adapters.
    """
    if "global_batch_size" not in info.config.get("data", {}):
        raise CheckpointError(
            f"{info.directory} was not saved by a training run: its config names no data. Choose another run.dir; to start from its "
            "weights, name it as model.checkpoint."
        )
    for path, value, earlier in _differences(*_alike(run.config, info.config)):
        if not _may_change(path):
            raise ConfigError(
                f"{'.'.join(path)} is {value!r}, but {info.directory} was trained with {earlier!r}. Set it back to continue that run, or "
                "choose another run.dir for a new one."
            )
    _check_packing(run, info)
    _check_adapter(run, info, adapter)
    _check_steps_ahead(run, info)
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
