"""Checkpoints of one backend load into the other, and delayed scaling continues: with Transformer Engine's layers, on a CPU."""

from __future__ import annotations

import os
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_iwsft.config.schema import Optimizer
from megatron_iwsft.errors import CheckpointError
from megatron_iwsft.hf.directory import RandomInit
from megatron_iwsft.testing import run_distributed
from tests.model.test_transformer_engine import build
from tests.support.transformer_engine import FAMILIES, architecture, as_on_hopper, packed_row, te


def state_of(platform: Any, family: str, seed: int, *, distributed: bool = True, **settings: Any) -> Any:
    """A model with an optimizer after one update by random gradients."""
    from megatron_iwsft.checkpoint.state import TrainState
    from megatron_iwsft.distributed.mcore_compat import prepare_gradients, update_parameters
    from megatron_iwsft.model.gpt import ModelSettings, build_model
    from megatron_iwsft.model.parameters import load_weights
    from megatron_iwsft.train.optim import build_optimizer, wrap_for_gradients

    arch, parallel = architecture(family), platform.parallel()
    policy = build_model(arch, parallel, platform, ModelSettings(torch.bfloat16, **settings))
    load_weights(policy, RandomInit(arch, seed), parallel)
    options = Optimizer(lr=1e-2, distributed=distributed)
    chunks = wrap_for_gradients(policy, options)
    optimizer = build_optimizer(chunks, options, torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy[0].parameters():
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
    for chunk in chunks:
        chunk.finish_grad_sync()
    update_parameters(optimizer, prepare_gradients(optimizer))
    return TrainState(policy, optimizer, step=seed)


def values(state: Any) -> dict[Any, torch.Tensor]:
    """Parameters and the optimizer's states by the names that both backends share."""
    from megatron_iwsft.distributed.mcore_compat import optimizer_shards
    from megatron_iwsft.model.parameters import checkpoint_name

    (model,) = state.policy
    names = {id(p): checkpoint_name(model, name) for name, p in model.named_parameters()}
    found = {(*names[id(p)], "parameter"): p.detach().flatten() for p in model.parameters()}
    for shard in optimizer_shards(state.optimizer):
        kept = {"main": shard.main, **shard.inner.state[shard.main]}
        for name in ("main", "exp_avg", "exp_avg_sq"):
            found[*names[id(shard.parameter)], name] = kept[name].detach().flatten()
    return found


def save(root: Path, family: str, state: Any) -> Any:
    from megatron_iwsft.checkpoint.info import CheckpointInfo
    from megatron_iwsft.checkpoint.writer import CheckpointWriter

    return CheckpointInfo.read(CheckpointWriter(root, architecture(family)).save(state))


def moved(platform: Any, root: Path, family: str, distributed: bool, source: str, target: str) -> tuple[int, list[Any]]:
    """(number of values, names of those that differ) after a checkpoint of one backend was loaded into the other."""
    from megatron_iwsft.checkpoint.load import load

    with as_on_hopper():
        saved = state_of(platform, family, 1, distributed=distributed, backend=source)
        loaded = state_of(platform, family, 2, distributed=distributed, backend=target)
    load(save(root, family, saved), loaded)
    expected, found = values(saved), values(loaded)
    assert found.keys() == expected.keys() and loaded.step == 1
    return len(found), [name for name in found if not torch.equal(found[name], expected[name])]


@te
@pytest.mark.parametrize("distributed", [True, False], ids=["distributed", "replicated"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("source", "target"), [("local", "transformer_engine"), ("transformer_engine", "local")], ids=["into", "out of"]
)
def test_a_checkpoint_of_one_backend_loads_into_the_other(
    source: str, target: str, family: str, distributed: bool, tmp_path: Path
) -> None:
    count, different = run_distributed(moved, 1, tmp_path, family, distributed, source, target)[0]
    assert different == [] and count == 4 * (17 if family == "dense" else 33)


class Training:
    """A model with parameters in FP8, or what `settings` say, and the losses of its steps."""

    def __init__(self, platform: Any, seed: int, **settings: Any) -> None:
        from megatron_iwsft.checkpoint.state import TrainState
        from megatron_iwsft.objectives.functions import Settings, sft
        from megatron_iwsft.train.optim import build_optimizer, wrap_for_gradients
        from megatron_iwsft.train.step import TrainStep

        parallel, options = platform.parallel(), Optimizer(lr=1e-2)
        policy = build(platform, "dense", parallel, seed=seed, backend="transformer_engine", **settings)
        chunks = wrap_for_gradients(policy, options)
        self.step = TrainStep(chunks, parallel, platform.device, sft, Settings())
        self.state = TrainState(policy, build_optimizer(chunks, options, torch.bfloat16))

    def run(self, steps: range) -> list[float]:
        from megatron_iwsft.distributed.mcore_compat import prepare_gradients, update_parameters

        losses = []
        for number in steps:
            losses.append(self.step.forward_backward([packed_row([20, 13, 31], seed=number)])["loss"])
            update_parameters(self.state.optimizer, prepare_gradients(self.state.optimizer))
            self.state.step = number + 1
        return losses

    def stored(self) -> dict[Any, torch.Tensor]:
        """`values`, of FP8 parameters what they are stored as."""
        found = values(self.state)
        for name, parameter in self.state.policy[0].named_parameters():
            if hasattr(parameter, "_data"):
                found |= {(name, part): getattr(parameter, part) for part in ("_data", "_scale_inv")}
        return found


FP8_PARAMETERS = dict(fp8="tensorwise", fp8_parameters=True)


def interrupted(platform: Any, root: Path) -> dict[str, Any]:
    """Two steps, a checkpoint, two more in another model, beside four steps; and that checkpoint in a model in bf16."""
    from megatron_iwsft.checkpoint.load import load

    with as_on_hopper():
        unbroken, first, second, bf16 = (
            Training(platform, seed, **settings)
            for seed, settings in enumerate([FP8_PARAMETERS, FP8_PARAMETERS, FP8_PARAMETERS, {}], 1)
        )
        load(save(root / "start", "dense", unbroken.state), first.state)
        expected = unbroken.run(range(4))
        losses = first.run(range(2))
        info = save(root / "middle", "dense", first.state)
        load(info, second.state)
        losses += second.run(range(2, 4))
        load(info, bf16.state)
    found, wanted = second.stored(), unbroken.stored()
    assert found.keys() == wanted.keys()
    rounded = values(bf16.state)
    return {
        "losses": (losses, expected),
        "different": [name for name in wanted if not torch.equal(found[name], wanted[name])],
        "count": sum(name[-1] == "_data" for name in wanted),
        "rounded twice": [
            name
            for *name, kind in rounded
            if kind == "main" and not torch.equal(rounded[*name, kind].bfloat16(), rounded[*name, "parameter"])
        ],
    }


@te
def test_training_with_fp8_parameters_resumes_bitwise(tmp_path: Path) -> None:
    """And its checkpoint gives a model in bf16 the optimizer's parameters, not those that were rounded to FP8."""
    found = run_distributed(interrupted, 1, tmp_path)[0]
    losses, expected = found["losses"]
    assert losses == expected and len(set(losses)) == 4
    assert found["different"] == [] and found["count"] == 8, "four matrices in each of two layers"
    assert found["rounded twice"] == []


def with_histories(platform: Any, family: str, seed: int) -> Any:
    """A model whose layers have scaled by history, as after some steps."""
    from megatron.core.fp8_utils import get_fp8_recipe

    state = state_of(platform, family, seed, backend="transformer_engine", fp8="delayed", amax_history=4)
    generator = torch.Generator().manual_seed(seed)
    for layer in layers(state):
        recipe = get_fp8_recipe(state.policy[0].config)
        layer.fp8_meta |= {"fp8_checkpoint": True, "recipe": recipe, "num_gemms": getattr(layer, "num_gemms", 1)}
        layer.init_fp8_meta_tensors(recipe)
        for name in ("scaling_fwd", "scaling_bwd"):
            for tensor in (layer.fp8_meta[name].scale, layer.fp8_meta[name].amax_history):
                tensor.copy_(torch.rand(tensor.shape, generator=generator))
    return state


def layers(state: Any) -> list[Any]:
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    chunks = [*state.policy, *(chunk for frozen in state.frozen.values() for chunk in frozen)]
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, TransformerEngineBaseModule)]


def histories(state: Any) -> list[torch.Tensor]:
    return [
        tensor
        for layer in layers(state)
        for name in ("scaling_fwd", "scaling_bwd")
        for tensor in (layer.fp8_meta[name].scale, layer.fp8_meta[name].amax_history)
    ]


def continued(platform: Any, root: Path, family: str) -> tuple[int, int, bool]:
    """(number of histories, how many a new model took over, whether loading into the same model again did too)."""
    from megatron_iwsft.checkpoint.load import load

    with as_on_hopper():
        saved = with_histories(platform, family, 1)
        saved.frozen = {"reference": with_histories(platform, family, 3).policy}
        expected = [tensor.clone() for tensor in histories(saved)]
        info = save(root, family, saved)
        delayed: dict[str, Any] = dict(backend="transformer_engine", fp8="delayed", amax_history=4)
        resumed = state_of(platform, family, 2, **delayed)
        resumed.frozen = {"reference": state_of(platform, family, 4, **delayed).policy}
        load(info, resumed)
        for tensor in histories(saved):
            tensor.zero_()
        load(info, saved)  # a rewind
    found, rewound = (sum(map(torch.equal, histories(state), expected)) for state in (resumed, saved))
    return len(expected), found, rewound == len(expected)


@te
@pytest.mark.parametrize("family", FAMILIES)
def test_delayed_scaling_resumes_and_rewinds(family: str, tmp_path: Path) -> None:
    """The policy's and a live reference's, which would be quantised at scale 1 for a step otherwise."""
    count, resumed, rewound = run_distributed(continued, 1, tmp_path, family)[0]
    assert count >= 48 and resumed == count and rewound


def load_incomplete(platform: Any, root: Path) -> str:
    """What loading says of a checkpoint whose state of delayed scaling lacks a history."""
    from megatron_iwsft.checkpoint.load import load

    with as_on_hopper():
        saved = with_histories(platform, "dense", 1)
        for layer in layers(saved)[:1]:
            state = pickle.loads(layer.get_extra_state().numpy().tobytes())
            del state["amax_history_bwd"]
            layer.get_extra_state = partial(torch.frombuffer, bytearray(pickle.dumps(state)), dtype=torch.uint8)
        info = save(root, "dense", saved)
        try:
            load(info, with_histories(platform, "dense", 2))
        except CheckpointError as error:
            return str(error)
    return "loaded"


@te
def test_an_incomplete_state_of_delayed_scaling_is_one_sentence(tmp_path: Path) -> None:
    message = run_distributed(load_incomplete, 1, tmp_path)[0]
    assert "does not fit this model: " in message and "amax_history_bwd" in message
    assert "Use a checkpoint of this model" in message


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["MARK"],)


def load_planted(platform: Any, root: Path) -> str:
    """What loading says of a checkpoint whose state of delayed scaling would run code."""
    from megatron_iwsft.checkpoint.load import load

    os.environ["MARK"] = str(root / "mark")
    with as_on_hopper():
        saved = with_histories(platform, "dense", 1)
        for layer in layers(saved)[:1]:
            layer.fp8_meta["margin"] = (RunsCode(),)  # of the values that Transformer Engine saves as they are
        info = save(root, "dense", saved)
        try:
            load(info, saved)
        except CheckpointError as error:
            return str(error)
    return "loaded"


@te
def test_a_state_of_delayed_scaling_that_runs_code_is_refused(tmp_path: Path) -> None:
    message = run_distributed(load_planted, 1, tmp_path)[0]
    assert "refers to posix.mkdir, which no state of delayed scaling needs" in message
    assert not (tmp_path / "mark").exists()
