"""Run the experiment: data, reference and methods for each seed, then one table over all seeds.

The data and the result of a seed are files in `run.dir`. Existing files of the same settings are not recomputed.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from megatron_iwsft.errors import ConfigError
from megatron_iwsft.evaluate.statistics import student_interval
from megatron_iwsft.experiments.control.config import ControlObjective, Experiment, Method
from megatron_iwsft.experiments.control.environment import (
    Actor,
    evaluate,
    make_environment,
    mean_action,
    random_action,
    sizes,
)
from megatron_iwsft.experiments.control.learner import Learned, learn
from megatron_iwsft.experiments.control.policy import GaussianPolicy
from megatron_iwsft.experiments.control.replay import Replay
from megatron_iwsft.experiments.control.tuning import log_probs, tune
from megatron_iwsft.utils.files import partial_path, publish, write_text

_CLONING = ControlObjective(name="sft", normalize="sequences")
_EVALUATION_SEEDS, _CLONING_SEEDS = 1_000_000, 2_000_000


@dataclass(frozen=True)
class SeedResult:
    """Results of one seed; returns are not normalised.

    random, learner, replay: mean returns of random actions, of the final learner, and of the recorded episodes
    returns: mean return of each method's policy with mean actions
    curated: per method the number of episodes, their mean return and the nll
    weights: per iw-SFT method the effective sample size, fraction clipped, and mean
    """

    seed: int
    episodes: int
    steps: int
    random: float
    learner: float
    replay: float
    returns: dict[str, float]
    curated: dict[str, dict[str, float]]
    weights: dict[str, dict[str, float]]


def run_experiment(experiment: Experiment) -> list[SeedResult]:
    """Run all seeds, `run.workers` in parallel, one thread each. Raises ConfigError if run.dir has results of other settings."""
    make_environment(experiment.task)  # report errors once, before starting the workers
    Path(experiment.run.dir).mkdir(parents=True, exist_ok=True)
    done = {seed: _load(experiment, seed) for seed in experiment.run.seeds}
    missing = [seed for seed, result in done.items() if result is None]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(experiment.run.workers, mp_context=context) as pool:
        futures = [pool.submit(run_seed, experiment, seed) for seed in missing]
        for future in tqdm(as_completed(futures), total=len(futures), unit="seed", disable=None):
            result = future.result()
            done[result.seed] = result
    return [result for result in done.values() if result is not None]


def run_seed(experiment: Experiment, seed: int) -> SeedResult:
    """Run one seed (data, reference, methods) and write its result. The same seed gives the same numbers."""
    torch.set_num_threads(1)

    def mean_return(policy: GaussianPolicy) -> float:
        return _evaluate(experiment, mean_action(policy), seed)

    learned = _learned(experiment, seed)
    replay = learned.replay
    cloned = _clone(experiment, replay, seed)
    reference = log_probs(cloned, replay)

    returns, curated, weights = {"BC": mean_return(cloned)}, {}, {}
    for name, method in experiment.methods.items():
        chosen = replay.select(method.percentiles)
        tuned = tune(
            cloned,
            replay,
            chosen,
            method.objective,
            experiment.tuning,
            reference=reference,
            generator=torch.Generator().manual_seed(seed),  # the same batches for all methods
        )
        returns[name] = mean_return(tuned.policy)
        curated[name] = {"episodes": len(chosen), "return": float(replay.returns[chosen].mean()), "nll": tuned.nll}
        if method.objective.name == "iw_sft":
            weights[name] = {"ess": tuned.ess, "clipped": tuned.clipped, "mean": tuned.weight}
    result = SeedResult(
        seed=seed,
        episodes=len(replay.returns),
        steps=len(replay.observations),
        random=_evaluate(experiment, random_action(experiment.task, seed), seed),
        learner=mean_return(learned.policy),
        replay=float(replay.returns.mean()),
        returns=returns,
        curated=curated,
        weights=weights,
    )
    stored = {"settings": _settings(experiment), "result": result.__dict__}
    write_text(_result_path(experiment, seed), json.dumps(stored))
    return result


def _clone(experiment: Experiment, replay: Replay, seed: int) -> GaussianPolicy:
    """Train the reference: behaviour cloning of all replay episodes, from random weights."""
    generator = torch.Generator().manual_seed(_CLONING_SEEDS + seed)  # other initial weights than the learner's
    policy = GaussianPolicy(
        replay.observations.shape[1],
        replay.actions.shape[1],
        hidden=experiment.policy.hidden,
        layers=experiment.policy.layers,
        generator=generator,
    )
    policy.shift.copy_(replay.observations.mean(0))
    policy.scale.copy_(replay.observations.std(0).clamp(min=1e-4))
    everything = torch.arange(len(replay.returns))
    return tune(policy, replay, everything, _CLONING, experiment.cloning, generator=generator).policy


def _evaluate(experiment: Experiment, actor: Actor, seed: int) -> float:
    """Mean return from initial states that are the same for all methods, and differ between seeds and from the data."""
    first = _EVALUATION_SEEDS + seed * experiment.evaluation.episodes
    return evaluate(actor, experiment.task, episodes=experiment.evaluation.episodes, seed=first)


def _settings(experiment: Experiment) -> dict[str, Any]:
    return experiment.model_dump(exclude={"run"})


def _result_path(experiment: Experiment, seed: int) -> Path:
    return Path(experiment.run.dir) / f"seed-{seed}.json"


def _other_settings(path: Path) -> ConfigError:
    return ConfigError(
        f"{path} was computed with other settings than this config; choose another run.dir, or remove the file."
    )


def _load(experiment: Experiment, seed: int) -> SeedResult | None:
    path = _result_path(experiment, seed)
    if not path.exists():
        return None
    stored = json.loads(path.read_text(encoding="utf-8"))
    if stored["settings"] != _settings(experiment):
        raise _other_settings(path)
    return SeedResult(**stored["result"])


def _learned(experiment: Experiment, seed: int) -> Learned:
    """The seed's data and the learner that produced them, from their file if it exists, else by training."""
    path = Path(experiment.run.dir) / f"replay-{seed}.safetensors"
    settings = json.dumps(experiment.model_dump(include={"task", "policy", "learner"}))
    shape = dict(hidden=experiment.policy.hidden, layers=experiment.policy.layers)
    if path.exists():
        with safe_open(path, "pt") as file:
            if file.metadata()["settings"] != settings:
                raise _other_settings(path)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is not a mapping
        replay = Replay(**{name: tensors.pop(name) for name in Replay.__annotations__})
        policy = GaussianPolicy(*sizes(experiment.task), **shape, generator=torch.Generator())
        policy.load_state_dict(tensors)
        return Learned(replay, policy)
    learned = learn(experiment.task, experiment.learner, **shape, seed=seed)
    partial = partial_path(path)
    save_file({**vars(learned.replay), **learned.policy.state_dict()}, partial, {"settings": settings})
    publish(partial, path)
    return learned


def table(experiment: Experiment, results: list[SeedResult]) -> str:
    """The results as a Markdown table. Returns are normalised: 0 is uniformly random actions, 100 is the final learner.

    Both are means over the seeds, so that all seeds are normalised alike.
    """
    random = statistics.fmean(r.random for r in results)
    learner = statistics.fmean(r.learner for r in results)
    methods = ["BC", *experiment.methods]
    scores = {m: [100.0 * (r.returns[m] - random) / (learner - random) for r in results] for m in methods}
    baseline = next((m for m, method in experiment.methods.items() if _is_filtered_cloning(method)), None)
    lines = [
        f"{experiment.task.name}, {len(results)} seeds. Return: random {random:.0f} (= 0), replay "
        f"{statistics.fmean(r.replay for r in results):.0f}, final learner {learner:.0f} (= 100).",
        f"Replay: {min(r.episodes for r in results)} to {max(r.episodes for r in results)} episodes per seed.",
        "",
        f"| method | normalised return, 95 % interval | per seed | minus {baseline} | curated | nll | ESS | clipped |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in methods:
        mean, half = student_interval(scores[method])
        seeds = " ".join(f"{score:.0f}" for score in scores[method])
        cells = [method, f"{mean:.1f} ± {half:.1f}", seeds, "", "", "", "", ""]
        if baseline and method != baseline:
            difference, half = student_interval([a - b for a, b in zip(scores[method], scores[baseline], strict=True)])
            cells[3] = f"{difference:+.1f} ± {half:.1f}"
        if method in experiment.methods:
            cells[4] = f"{statistics.fmean(r.curated[method]['episodes'] for r in results):.0f}"
            cells[5] = f"{statistics.fmean(r.curated[method]['nll'] for r in results):.2f}"
        if method in results[0].weights:
            cells[6] = f"{statistics.fmean(r.weights[method]['ess'] for r in results):.2f}"
            cells[7] = f"{statistics.fmean(r.weights[method]['clipped'] for r in results):.0%}"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _is_filtered_cloning(method: Method) -> bool:
    return method.objective.name == "sft" and len(method.percentiles) == 1
