"""A checkpoint described for people. Nothing is unpickled."""

from __future__ import annotations

from pathlib import Path

import yaml

from megatron_iwsft.checkpoint.info import CheckpointInfo, complete_checkpoints, read_latest
from megatron_iwsft.checkpoint.names import CHECKPOINTS, LATEST
from megatron_iwsft.errors import CheckpointError
from megatron_iwsft.utils.files import PARTIAL


def describe(path: Path, *, verify: bool, config: bool = False) -> tuple[str, bool]:
    """A checkpoint, or a line for each of a run's and the newest in full; and whether all of them are undamaged.

    verify: hash every file instead of comparing sizes only. Raises CheckpointError if there is none.
    """
    parts, healthy = [], True
    for root in (path / CHECKPOINTS, path):
        found = complete_checkpoints(root)
        if found:
            for directory in found:
                line, undamaged = _line(directory, verify=verify)
                parts.append(line)
                healthy &= undamaged
            unfinished = sorted(p.name for p in root.glob(f"step-*{PARTIAL}"))
            parts += [f"  {name}: incomplete" for name in unfinished]
            if read_latest(root) != found[0].name:
                parts.append(f"  {LATEST} does not point at the newest")
            parts.append("")
            break
    info = CheckpointInfo.read(path)
    details, undamaged = _details(info, verify=verify, config=config)
    return "\n".join([*parts, details]), healthy and undamaged


def _line(directory: Path, *, verify: bool) -> tuple[str, bool]:
    try:
        info = CheckpointInfo.read(directory)
    except CheckpointError as error:
        return f"  {directory.name}: {error}", False
    damage = info.damage(contents=verify)
    state = f"DAMAGED, {len(damage)} files" if damage else "complete"
    return f"  {directory.name}: {info.size / 1e9:.3f} GB, {state}", not damage


def _details(info: CheckpointInfo, *, verify: bool, config: bool) -> tuple[str, bool]:
    kinds: dict[str, int] = {}
    for name, file in info.files.items():
        kind = "tensors and objects (*.distcp)" if name.endswith(".distcp") else "tokenizer" if "/" in name else name
        kinds[kind] = kinds.get(kind, 0) + file["bytes"]
    divergence = info.host.get("divergence", {})
    damage = info.damage(contents=verify)
    lines = [
        f"{info.directory}",
        f"step          {info.step}",
        f"saved at      {info.layout.describe()}",
        f"model         {_model(info)}",
        *_adapters(info),
        f"objective     {info.config.get('objective', {}).get('name', '–')}, {info.config.get('precision', {}).get('dtype', '–')}",
        *_corpora(info),
        f"skipped       {divergence.get('skipped', 0)} steps not finite; after rewinds: {divergence.get('passed_over') or 'none'}",
        f"size          {info.size / 1e9:.3f} GB in {len(info.files)} files",
        *(f"              {size / 1e9:.3f} GB  {kind}" for kind, size in sorted(kinds.items())),
        f"health        {'; '.join(damage) if damage else 'all checksums match' if verify else 'all sizes match'}",
    ]
    if config:
        lines += ["config", yaml.safe_dump(info.config, sort_keys=False, allow_unicode=True)]
    return "\n".join(lines), not damage


def _corpora(info: CheckpointInfo) -> list[str]:
    if len(info.corpora) < 2:
        return [f"corpus        {next(iter(info.corpora.values()), '–')}"]
    return [f"{'' if k else 'corpora':13} {name}: {sha}" for k, (name, sha) in enumerate(info.corpora.items())]


def _adapters(info: CheckpointInfo) -> list[str]:
    """What a checkpoint of adapters holds, and of which base; no line for one of weights."""
    if info.adapter is None:
        return []
    held = info.adapter
    on = ", ".join(held["targets"])
    return [f"adapters      rank {held['rank']}, alpha {held['alpha']:g}, on {on}; base {held['base'][:12]}"]


def _model(info: CheckpointInfo) -> str:
    hf = info.architecture.hf
    return (
        f"{hf.get('model_type')}, {hf.get('num_hidden_layers')} layers of {hf.get('hidden_size')}, "
        f"vocabulary {hf.get('vocab_size')}"
    )
