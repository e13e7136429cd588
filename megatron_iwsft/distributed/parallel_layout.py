"""`ParallelLayout`: the parallel degrees of a run, what follows from them, and every rule they must keep. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron_iwsft.errors import ConfigError
from megatron_iwsft.hf.architecture import Architecture


@dataclass(frozen=True)
class ParallelLayout:
    """Parallel degrees.

    tensor, pipeline, context, data   their product is the world size
    virtual_pipeline  model chunks per pipeline stage for an interleaved schedule; None is not interleaved
    expert            expert-parallel degree within a pipeline stage, over its tensor-, context- and data-parallel ranks
    sequence          Megatron's sequence parallelism, over the tensor-parallel ranks
    layers_per_stage  layers of each (virtual) stage in order; None splits them evenly
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    context: int = 1
    expert: int = 1
    data: int = 1
    sequence: bool = False
    layers_per_stage: tuple[int, ...] | None = None

    @staticmethod
    def for_world(world_size: int, **degrees: Any) -> ParallelLayout:
        """The layout of `world_size` processes under `degrees`; the rest is data parallel.

        Raises ConfigError if the degrees do not divide the world, or break a rule that holds for every model.
        """
        layout = ParallelLayout(**degrees)
        product = layout.tensor * layout.pipeline * layout.context
        if world_size % product:
            raise ConfigError(
                f"parallel: tensor {layout.tensor} × pipeline {layout.pipeline} × context {layout.context} = {product} does not divide "
                f"the world size of {world_size} processes. Start a multiple of {product} processes, or change the degrees."
            )
        layout = ParallelLayout(**degrees | {"data": world_size // product})
        broken = layout.broken_rule()
        if broken:
            raise ConfigError(f"parallel: {broken}.")
        return layout

    @staticmethod
    def from_json(values: dict[str, Any]) -> ParallelLayout:
        """From `to_json`; keys of other versions are ignored."""
        known = {f.name: values[f.name] for f in fields(ParallelLayout) if f.name in values}
        if known.get("layers_per_stage") is not None:
            known["layers_per_stage"] = tuple(known["layers_per_stage"])
        return ParallelLayout(**known)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def chunks_per_stage(self) -> int:
        """Model chunks that each rank holds."""
        return self.virtual_pipeline or 1

    @property
    def stages(self) -> int:
        """Pipeline stages, virtual ones counted."""
        return self.pipeline * self.chunks_per_stage

    @property
    def ranks_per_stage(self) -> int:
        """Tensor-, context- and data-parallel ranks of a pipeline stage, over which experts are distributed."""
        return self.tensor * self.context * self.data

    def place_of(self, rank: int) -> tuple[int, int]:
        """(pipeline stage, data-parallel rank) of a global rank, in Megatron-Core's order: tensor, context, data, pipeline."""
        stage, within = divmod(rank, self.ranks_per_stage)
        return stage, within // (self.tensor * self.context)

    def describe(self) -> str:
        """As people write it: TP 2 × PP 1 × CP 1 × DP 4, SP."""
        text = f"TP {self.tensor} × PP {self.pipeline} × CP {self.context} × DP {self.data}"
        text += f", EP {self.expert}" if self.expert > 1 else ""
        text += ", SP" if self.sequence else ""
        return text + (f", {self.virtual_pipeline} virtual stages" if self.virtual_pipeline else "")

    def broken_rule(self, arch: Architecture | None = None) -> str | None:
        """The first rule that the layout breaks, in one sentence; None if it breaks none. Without a model: rules for every model."""
        return (
            self._broken_degree_rule()
            or self._broken_expert_group_rule()
            or (self._broken_model_rule(arch) if arch is not None else None)
        )

    def _broken_degree_rule(self) -> str | None:
        if self.virtual_pipeline == 1:
            return "virtual_pipeline is 1; use null for a pipeline that is not interleaved, or 2 and more"
        if self.virtual_pipeline is not None and self.pipeline < 2:
            return f"virtual_pipeline {self.virtual_pipeline} needs pipeline ≥ 2; it is {self.pipeline}"
        if self.layers_per_stage is not None and self.pipeline < 2:
            return f"layers_per_stage needs pipeline ≥ 2; it is {self.pipeline}"
        if self.layers_per_stage is not None and len(self.layers_per_stage) != self.stages:
            return (
                f"layers_per_stage names {len(self.layers_per_stage)} stages, but pipeline {self.pipeline} × "
                f"virtual_pipeline {self.chunks_per_stage} makes {self.stages}; give one number per stage"
            )
        if self.sequence and self.tensor < 2:
            return f"sequence: true needs tensor ≥ 2; it is {self.tensor}"
        return None

    def _broken_expert_group_rule(self) -> str | None:
        """Depends on the data-parallel degree."""
        ranks = self.ranks_per_stage
        if ranks % self.expert:
            divisors = ", ".join(map(str, _divisors(ranks)))
            return (
                f"expert {self.expert} does not divide the {ranks} ranks of a pipeline stage (tensor × context × data parallel); "
                f"with these, expert can be {divisors}"
            )
        return None

    def _broken_model_rule(self, arch: Architecture) -> str | None:
        return self._broken_layer_rule(arch) or self._broken_tensor_rule(arch) or self._broken_expert_rule(arch)

    def _broken_layer_rule(self, arch: Architecture) -> str | None:
        if self.layers_per_stage is not None:
            if sum(self.layers_per_stage) != arch.num_layers:
                return (
                    f"layers_per_stage adds up to {sum(self.layers_per_stage)} layers, but the model has {arch.num_layers}; "
                    "change its numbers"
                )
        elif arch.num_layers % self.stages:
            return (
                f"{arch.num_layers} layers do not divide into {self.stages} pipeline stages (pipeline {self.pipeline} × "
                f"virtual_pipeline {self.chunks_per_stage}); name an uneven split with layers_per_stage"
            )
        return None

    def _broken_tensor_rule(self, arch: Architecture) -> str | None:
        columns = arch.ffn_size if arch.experts is None else self.tensor  # tensor parallelism does not cut experts
        for name, size in (("attention heads", arch.num_heads), ("feed-forward columns", columns)):
            if size % self.tensor:
                return f"tensor {self.tensor} does not divide the model's {size} {name}; use a divisor of it"
        if arch.num_groups % self.tensor and self.tensor % arch.num_groups:
            return f"tensor {self.tensor} and the model's {arch.num_groups} key-value heads: one must divide the other"
        return None

    def _broken_expert_rule(self, arch: Architecture) -> str | None:
        if arch.experts is None:
            return (
                f"expert {self.expert}, but the {arch.family} family has no experts; set expert to 1"
                if self.expert > 1
                else None
            )
        if arch.experts.count % self.expert:
            return f"expert {self.expert} does not divide the model's {arch.experts.count} experts; use a divisor of it"
        if self.tensor > 1 and not self.sequence:
            return "a mixture of experts with tensor ≥ 2 needs `sequence: true`: each rank routes its own tokens"
        return None

    def micro_batches(self, *, global_batch_size: int, micro_batch_size: int) -> int:
        """Micro-batches per step and pipeline. Raises ConfigError if the sizes do not fit the layout."""
        step = micro_batch_size * self.data
        if global_batch_size % step:
            raise ConfigError(
                f"data.global_batch_size {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size} × data parallel "
                f"{self.data} = {step}. Change one of them."
            )
        count = global_batch_size // step
        if self.virtual_pipeline is not None and count % self.pipeline:
            raise ConfigError(
                f"parallel.virtual_pipeline needs the {count} micro-batches of a step to be a multiple of pipeline {self.pipeline}. "
                "Change data.global_batch_size or micro_batch_size."
            )
        return count


def valid_layouts(
    arch: Architecture, gpus: int, *, gpus_per_node: int = 8, max_virtual: int = 4
) -> Iterator[ParallelLayout]:
    """Every layout of `gpus` that can hold a model, with tensor parallelism inside a node and sequence parallelism along with it."""
    for tensor in _divisors(min(gpus, gpus_per_node)):
        for pipeline in _divisors(gpus // tensor):
            for context in _divisors(gpus // (tensor * pipeline)):
                for virtual in range(1, max_virtual + 1 if pipeline > 1 else 2):
                    for expert in _divisors(gpus // pipeline) if arch.experts else [1]:
                        layout = ParallelLayout(
                            tensor=tensor,
                            pipeline=pipeline,
                            virtual_pipeline=virtual if virtual > 1 else None,
                            context=context,
                            expert=expert,
                            data=gpus // (tensor * pipeline * context),
                            sequence=tensor > 1,
                        )
                        if layout.broken_rule(arch) is None:
                            yield layout


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
