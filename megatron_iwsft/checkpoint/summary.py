"""What a checkpoint says about itself, for people. Nothing is unpickled."""

from __future__ import annotations

from pathlib import Path

import yaml

from megatron_iwsft.checkpoint.info import LATEST, CheckpointInfo, complete_checkpoints
from megatron_iwsft.errors import CheckpointError


def describe(path: Path, *, verify: bool, config: bool = False) -> tuple[str, bool]:
    """Of a checkpoint, or of all those of a run and its latest in full; and whether all of them are whole.

    verify: hash every file instead of only comparing sizes. Raises CheckpointError if there is none.
    """
    parts, healthy = [], True
    for root in (path / "checkpoints", path):
        found = complete_checkpoints(root)
        if found:
            for directory in found:
                line, whole = _line(directory, verify=verify)
                parts.append(line)
                healthy &= whole
            unfinished = sorted(p.name for p in root.glob("step-*.partial"))
            parts += [f"  {name}: unfinished, of no use" for name in unfinished]
            pointer = root / LATEST
            if not pointer.exists() or pointer.read_text().strip() != found[0].name:
                parts.append(f"  {LATEST} does not name the newest")
            parts.append("")
            break
    info = CheckpointInfo.read(path)
    details, whole = _details(info, verify=verify, config=config)
    return "\n".join([*parts, details]), healthy and whole


def _line(directory: Path, *, verify: bool) -> tuple[str, bool]:
    try:
        info = CheckpointInfo.read(directory)
    except CheckpointError as error:
        return f"  {directory.name}: {error}", False
    damage = info.damage(contents=verify)
    state = f"DAMAGED, {len(damage)} files" if damage else "whole"
    return f"  {directory.name}: {info.size / 1e9:.3f} GB, {state}", not damage


def _details(info: CheckpointInfo, *, verify: bool, config: bool) -> tuple[str, bool]:
    degrees = {name: info.layout.get(name) for name in ("tensor", "pipeline", "context", "expert", "data")}
    kinds: dict[str, int] = {}
    for name, file in info.files.items():
        kind = "tensors and objects (*.distcp)" if name.endswith(".distcp") else "tokenizer" if "/" in name else name
        kinds[kind] = kinds.get(kind, 0) + file["bytes"]
    guard = info.trainer.get("guard", {})
    damage = info.damage(contents=verify)
    lines = [
        f"{info.directory}",
        f"step          {info.step}",
        f"saved at      {' × '.join(f'{name} {size}' for name, size in degrees.items() if size) or 'no layout (an import)'}",
        f"model         {_model(info)}",
        f"objective     {info.config.get('objective', {}).get('name', '–')}, {info.config.get('precision', {}).get('dtype', '–')}",
        f"corpus        {info.corpus or '–'}",
        f"skipped       {guard.get('skipped', 0)} steps not finite; passed over: {guard.get('passed_over') or 'none'}",
        f"size          {info.size / 1e9:.3f} GB in {len(info.files)} files",
        *(f"              {size / 1e9:.3f} GB  {kind}" for kind, size in sorted(kinds.items())),
        f"health        {'; '.join(damage) if damage else 'every file has its checksum' if verify else 'every file has its size'}",
    ]
    if config:
        lines += ["config", yaml.safe_dump(info.config, sort_keys=False, allow_unicode=True)]
    return "\n".join(lines), not damage


def _model(info: CheckpointInfo) -> str:
    hf = info.architecture.hf
    return (
        f"{hf.get('model_type')}, {hf.get('num_hidden_layers')} layers of {hf.get('hidden_size')}, "
        f"vocabulary {hf.get('vocab_size')}"
    )
