"""Adapters in Hugging Face PEFT's format: adapter_config.json and adapter_model.safetensors, read slice by slice and written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_iwsft.errors import CheckpointError, DataError
from megatron_iwsft.hf.adapter_mapping import adapter_shapes
from megatron_iwsft.hf.adapters import AdapterSettings, projections
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.hf.directory import new_directory
from megatron_iwsft.hf.mapping import Span
from megatron_iwsft.hf.safetensors import SafetensorsFile, write_safetensors
from megatron_iwsft.utils.files import write_json
from megatron_iwsft.utils.json_files import read_json

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_BASE = "iwsft_base"  # in the safetensors file's metadata
# Keys that do not change what a finished adapter computes; `init_lora_weights` is judged by its value.
_NEUTRAL = set(
    "auto_mapping base_model_name_or_path exclude_modules inference_mode layers_pattern layers_to_transform lora_alpha lora_dropout "
    "megatron_core peft_type peft_version qalora_group_size r revision runtime_config target_modules task_type".split()
)


@dataclass(frozen=True)
class Description:
    """What the files say. base: fingerprint of the weights that the adapters belong to; base_name: their Hugging Face directory."""

    settings: AdapterSettings
    base: str
    base_name: str | None = None
    dropout: float = 0.0


def refuse_experts(settings: AdapterSettings) -> None:
    """Raise CheckpointError for adapters that PEFT has no format for."""
    if "experts" in settings.targets:
        raise CheckpointError(
            "adapters of experts cannot be written for PEFT: transformers stores a layer's experts as one tensor, to which PEFT's adapters "
            "of single projections do not apply. Merge them into the weights: iwsft export --merge."
        )


def write_adapter(
    output: Path,
    architecture: Architecture,
    described: Description,
    read: Callable[[str], Tensor],
    *,
    dtype: torch.dtype,
    finish: Callable[[Path], None] = lambda partial: None,
    exist_ok: bool = False,
) -> None:
    """Write a PEFT directory. read, finish and exist_ok, and what is raised: as in `write_directory`."""
    settings = described.settings
    refuse_experts(settings)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": described.base_name,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": described.dropout,
        "target_modules": sorted(name for target in settings.targets for name in projections(architecture, target)),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with new_directory(output, exist_ok=exist_ok) as partial:
        tensors = adapter_shapes(architecture, settings)
        write_safetensors(partial / _TENSORS, tensors, read, dtype, metadata={_BASE: described.base})
        write_json(partial / _CONFIG, config, indent=2, sort_keys=True)
        finish(partial)


class PeftDirectory:
    """A PEFT adapter of a model, as a source of its tensors.

    The constructor checks that it holds the adapters of `settings`, and no others. base: the fingerprint of the weights they belong to,
    where this program wrote it.
    """

    def __init__(self, directory: str | Path, architecture: Architecture, settings: AdapterSettings) -> None:
        self.directory, self.architecture = Path(directory), architecture
        refuse_experts(settings)
        try:
            config = read_json(self.directory / _CONFIG, dict[str, Any], CheckpointError, advice="Export it again.")
            self._file = SafetensorsFile(self.directory / _TENSORS)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"adapter.init {self.directory} is not a PEFT adapter: it has no {Path(error.filename).name}. Give the directory of one."
            ) from None
        self.base = self._file.metadata.get(_BASE)
        self._check_config(config, settings)
        self._check_tensors(adapter_shapes(architecture, settings), settings)

    def _check_config(self, config: dict[str, Any], settings: AdapterSettings) -> None:
        path = self.directory / _CONFIG
        if config.get("peft_type") != "LORA":
            raise CheckpointError(
                f"{path} has peft_type {config.get('peft_type')!r}; only LORA is supported. Use a LoRA adapter."
            )
        for key, field, value in (("r", "rank", settings.rank), ("lora_alpha", "alpha", settings.alpha)):
            if config.get(key) != value:
                raise CheckpointError(
                    f"{path} has {key} {config.get(key)!r}, but adapter.{field} is {value!r}. Set adapter.{field} to the former."
                )
        for key, value in config.items():
            if key == "init_lora_weights":
                is_neutral = isinstance(value, bool | None) or value in ("gaussian", "orthogonal")
            else:
                is_neutral = key in _NEUTRAL or not value or value == "none"
            if not is_neutral:
                raise CheckpointError(
                    f"{path} has {key} {value!r}, which is not supported. Merge the adapter into its model with PEFT (merge_and_unload), "
                    "and use the result as model.hf."
                )

    def _check_tensors(self, expected: dict[str, tuple[int, ...]], settings: AdapterSettings) -> None:
        found, targets = self._file.shapes, f"adapter.targets {', '.join(settings.targets)}"
        for name, shape in expected.items():
            if name not in found:
                raise CheckpointError(
                    f"{self.directory} has no tensor {name}, which {targets} implies. Change adapter.targets."
                )
            if found[name] != shape:
                raise CheckpointError(
                    f"{self.directory}: tensor {name} has shape {found[name]}, but this model's would be {shape}: it is an adapter of "
                    "another base. Use the base that it was trained on."
                )
        extra = sorted(set(found) - set(expected))
        if extra:
            raise CheckpointError(
                f"{self.directory} has the tensor {extra[0]}, which is not among {targets}. Change adapter.targets."
            )

    def read(self, name: str, span: Span) -> Tensor:
        part = self._file.read(name, *span)
        if not bool(torch.isfinite(part).all()):
            raise DataError(f"{self.directory}: {name} contains values that are not finite. Use another adapter.")
        return part
