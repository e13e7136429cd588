"""The method against its theory, through the trainer's own loss: fixed points of a bandit, and bounds on models that can be enumerated.

The bandit is the paper's example (arXiv 2507.12856): a trajectory of T tokens whose first chooses an arm and whose others follow from it.
The reference pulls arm k with probability π_k and the filter keeps the trajectory with probability r_k. The data are these expectations
themselves, so nothing is sampled.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_iwsft.objectives.fixed_point import exponent
from megatron_iwsft.objectives.functions import (
    LEVELS,
    Clip,
    Objective,
    Origin,
    Settings,
    Trajectories,
    dft,
    iw_sft,
    local_segment_sum,
    psft,
    sft,
)
from megatron_iwsft.objectives.loss import micro_batch_loss, reported_metrics, sum_names
from megatron_iwsft.objectives.metrics import summarize

UNCLIPPED = (0.0, 1e9)
# (π, r) of each arm.
PAPER = ((0.5, 0.5), (0.5, 1.0))  # pulling left succeeds half of the time, pulling right always
BIASED = ((0.8, 0.2), (0.5, 1.0))  # the same, by a reference that prefers the worse arm
THREE = ((0.6, 0.3, 0.1), (0.3, 0.6, 0.9))
Arms = tuple[tuple[float, ...], tuple[float, ...]]


def trajectories(policy: Tensor, proposal: Tensor, reference: Tensor, segment: Tensor, quality: Tensor) -> Trajectories:
    """Of per-token log-probs [T], all trained on, and quality [S]."""
    policy, proposal, reference = policy.float(), proposal.float(), reference.float()
    return Trajectories(
        logprobs=policy,
        proposal=proposal,
        reference=reference,
        mask=torch.ones(len(segment)),
        segment=segment,
        lengths=torch.bincount(segment, minlength=len(quality)).float(),
        quality=quality.float(),
        segment_sum=local_segment_sum(segment, len(quality)),
    )


def trained(
    arms: Arms,
    tokens: int | tuple[int, ...],
    objective: Objective,
    settings: Settings,
    *,
    steps: int = 800,
    rate: float = 0.5,
    refresh: bool = False,
) -> list[float]:
    """The policy on a bandit after natural-gradient steps on the expected loss, from the reference.

    tokens: of the trajectories of every arm, or of each
    rate: of learning; small where a clip ends a gradient, so that no step jumps over it
    refresh: after each step the reference becomes the policy, while the data stay those of the first reference.
    """
    first_reference, kept = (torch.tensor(x, dtype=torch.float64) for x in arms)
    curated = first_reference * kept / (first_reference * kept).sum()
    lengths = torch.tensor(tokens).expand(len(kept))
    segment = torch.arange(len(kept)).repeat_interleave(lengths)
    first = lengths.cumsum(0) - lengths
    chooses = torch.zeros(len(segment), dtype=torch.float64).index_fill(0, first, 1.0)
    logits = first_reference.log()
    for _ in range(steps):
        policy = torch.softmax(logits, 0)
        reference = policy if refresh else first_reference
        x = logits.clone().requires_grad_()
        logprobs = torch.log_softmax(x, 0)[segment] * chooses
        t = trajectories(logprobs, logprobs.detach(), reference.log()[segment] * chooses, segment, curated)
        out = micro_batch_loss(objective, t, settings)
        (gradient,) = torch.autograd.grad(out.loss, x)
        # In units of one trajectory's log-prob, and relative to the policy: the choice of N only rescales this.
        scale = (curated * objective.function(t, settings).weight[chooses == 1]).sum()
        before, logits = logits, torch.log_softmax(logits - rate * gradient / scale / policy, 0).clamp(min=-60.0)
        if (logits - before).abs().max() < 3e-7:  # what 800 steps would still add is below every tolerance
            break
    return torch.softmax(logits, 0).tolist()


def fixed_point(arms: Arms, power: float) -> list[float]:
    """p ∝ π · r^power; with power inf all on the arm that the filter keeps most often."""
    reference, kept = (np.array(x) for x in arms)
    p = (kept == kept.max()).astype(float) if math.isinf(power) else reference * kept**power
    return (p / p.sum()).tolist()


CASES = [
    (arms, tokens, temperature)
    for arms in (PAPER, BIASED, THREE)
    for tokens, temperatures in {
        1: (0.5, 1.0),
        4: (1.0, 2.0, 4.0),
        20: (1.0, 10.0, 20.0),
        250: (1.0, 10.0, 200.0),
    }.items()
    for temperature in temperatures
]


@pytest.mark.parametrize(("arms", "tokens", "temperature"), CASES)
def test_mean_log_ratios_lead_to_the_reference_times_a_power_of_the_reward(
    arms: Arms, tokens: int, temperature: float
) -> None:
    power = exponent("sequence", temperature, tokens)
    assert power == pytest.approx(tokens / (tokens - temperature) if temperature < tokens else math.inf)
    found = trained(arms, tokens, iw_sft, Settings("sequence", temperature, UNCLIPPED, "tokens"))
    assert found == pytest.approx(fixed_point(arms, power), abs=1e-3)


@pytest.mark.parametrize("tokens", [1, 20, 250])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("arms", [PAPER, BIASED, THREE])
def test_summed_log_ratios_lead_there_at_any_length(arms: Arms, tokens: int, temperature: float) -> None:
    power = exponent("trajectory", temperature, tokens)
    found = trained(arms, tokens, iw_sft, Settings("trajectory", temperature, UNCLIPPED, "tokens"))
    assert found == pytest.approx(fixed_point(arms, power), abs=1e-3)


@pytest.mark.parametrize("lengths", [(20, 60, 40), (60, 20, 40)])
def test_with_means_over_unequal_lengths_the_power_depends_on_the_length(lengths: tuple[int, ...]) -> None:
    """p/π = (r/c)^(1/(1−τ/T)) with one c; sums have no such effect."""
    reference, kept = (np.array(x) for x in THREE)
    powers = np.array([exponent("sequence", 15.0, n) for n in lengths])

    def policy(c: float) -> np.ndarray:
        return reference * (kept / c) ** powers

    low, high = 1e-3, 1.0
    for _ in range(60):
        low, high = ((low + high) / 2, high) if policy((low + high) / 2).sum() > 1 else (low, (low + high) / 2)
    found = trained(THREE, lengths, iw_sft, Settings("sequence", 15.0, UNCLIPPED, "tokens"))
    assert found == pytest.approx(policy(low).tolist(), abs=1e-3)
    summed = trained(THREE, lengths, iw_sft, Settings("trajectory", 0.5, UNCLIPPED, "tokens"))
    assert summed == pytest.approx(fixed_point(THREE, 2.0), abs=1e-3)


def test_sft_learns_the_curated_distribution() -> None:
    for arms in (PAPER, BIASED, THREE):
        assert trained(arms, 20, sft, Settings()) == pytest.approx(fixed_point(arms, 1.0), abs=1e-3)


def test_the_authors_temperatures_hardly_move_the_optimum_of_long_trajectories() -> None:
    assert exponent("sequence", 10.0, 250) == pytest.approx(250 / 240)  # continuous control
    assert exponent("sequence", 1.0, 4000) < 1.001  # s1K
    assert exponent("token", 1.0, 250) is None
    found = trained(PAPER, 250, iw_sft, Settings("sequence", 10.0, (0.0, 1000.0)))
    assert found == pytest.approx(fixed_point(PAPER, 1.0), abs=0.01)  # that of SFT


def test_a_clean_filter_leaves_nothing_to_weight() -> None:
    """Where the filter keeps exactly the right answers, every objective but DFT and PSFT has the optimum of SFT."""
    arms = ((0.5, 0.3, 0.2), (0.0, 1.0, 1.0))
    for level in LEVELS:
        found = trained(arms, 4, iw_sft, Settings(level, 0.5, UNCLIPPED))
        assert found == pytest.approx([0.0, 0.6, 0.4], abs=1e-3)


def test_dft_prefers_what_the_data_have_most_of() -> None:
    """With a reference that prefers the worse arm, most of the curated data are of that arm; rewards are not what decides."""
    assert fixed_point(BIASED, 1.0) == pytest.approx([2 / 3, 1 / 3])
    assert trained(BIASED, 4, dft, Settings())[1] < 1e-3
    assert trained(BIASED, 4, iw_sft, Settings("trajectory", 1.0, UNCLIPPED))[1] > 0.999
    assert trained(PAPER, 4, dft, Settings())[1] > 0.999  # here the better arm is also the more frequent one


@pytest.mark.parametrize("arms", [PAPER, BIASED])
def test_psft_stops_where_the_ratio_to_the_reference_reaches_its_clip(arms: Arms) -> None:
    """No arm becomes more than 1.28 times as likely as under the reference, however long it trains."""
    found = trained(arms, 4, psft, Settings(), rate=0.01)
    assert found[1] == pytest.approx(1.28 * arms[0][1], rel=0.02) and fixed_point(arms, 1.0)[1] > 1.3 * arms[0][1]


def test_the_clip_ends_the_improvement() -> None:
    """p ∝ π r clip(p/π): with a ratio of at most 1.8 and at least 0.2, both arms of the paper's example end at their bounds."""
    for level in ("trajectory", "token"):
        found = trained(PAPER, 4, iw_sft, Settings(level, 1.0, (0.2, 1.8)))
        assert found == pytest.approx([0.2 / 3.8, 3.6 / 3.8], abs=1e-3)


@pytest.mark.parametrize(("preferred", "clip"), [(0.9, (0.2, 5.0)), (0.97, (0.2, 5.0)), (0.97, (0.05, 20.0))])
def test_a_clip_multiplies_the_odds_of_sft_by_its_own_ratio_at_most(preferred: float, clip: Clip) -> None:
    """A reference that prefers a wrong arm, of which the filter lets half through: from odds of 2 r/w to odds of 2 r/w · hi/lo."""
    arms = ((1 - preferred, preferred), (1.0, 0.5))
    right, wrong = trained(arms, 4, iw_sft, Settings("trajectory", 1.0, clip))
    most = 2 * (1 - preferred) / preferred * clip[1] / clip[0]
    both_bind = right / arms[0][0] > clip[1] and wrong / arms[0][1] < clip[0]
    assert right / wrong <= most * 1.01
    assert not both_bind or right / wrong == pytest.approx(most, rel=0.01)


def test_a_refreshed_reference_undoes_the_weights() -> None:
    """The data were drawn from the first reference; weights relative to another are those of SFT."""
    settings = Settings("trajectory", 1.0, UNCLIPPED)
    assert trained(BIASED, 4, iw_sft, settings, refresh=True) == pytest.approx(fixed_point(BIASED, 1.0), abs=1e-3)


class Enumerated:
    """Two policies over sequences of at most three tokens out of three, the first of which ends a sequence.

    The reference's probabilities are 1/4, 1/4 and 1/2 in some order, so that 64 draws can represent it exactly.
    """

    def __init__(self, seed: int, spread: float = 0.6) -> None:
        rng = np.random.default_rng(seed)
        prefixes = [p for n in range(3) for p in itertools.product((1, 2), repeat=n)]
        self._reference = {p: np.log(rng.permutation([0.25, 0.25, 0.5])) for p in prefixes}
        self._policy = {p: self._near(rng, self._reference[p], spread) for p in prefixes}
        self._lagged = {p: self._near(rng, self._reference[p], spread) for p in prefixes}
        ended = [(*p, 0) for p in prefixes]
        self.all = ended + [(*p, token) for p in prefixes if len(p) == 2 for token in (1, 2)]
        self.reward = (rng.random(len(self.all)) < 0.5).astype(float)
        self.reward[rng.integers(len(self.all))] = 1.0

    @staticmethod
    def _near(rng: np.random.Generator, logprobs: np.ndarray, spread: float) -> np.ndarray:
        logits = logprobs + spread * rng.normal(size=3)
        return logits - np.log(np.exp(logits).sum())

    def logprobs(self, table: str, which: list[int]) -> Tensor:
        """Per-token log-probs of trajectories, end to end, float64."""
        values = getattr(self, f"_{table}")
        return torch.tensor([values[self.all[i][:k]][token] for i in which for k, token in enumerate(self.all[i])])

    def probability(self, table: str) -> np.ndarray:
        return np.array([self.logprobs(table, [i]).sum().exp() for i in range(len(self.all))])

    def metrics(self, which: list[int], quality: np.ndarray, *, lagged: bool = False, origin: Origin) -> dict:
        """Of iw-SFT on trajectories with a quality each; lagged: with another proposal than the policy."""
        segment = torch.cat([torch.full((len(self.all[i]),), k) for k, i in enumerate(which)])
        policy = self.logprobs("policy", which).requires_grad_()
        proposal = self.logprobs("lagged", which) if lagged else policy.detach()
        t = trajectories(policy, proposal, self.logprobs("reference", which), segment, torch.from_numpy(quality))
        # τ and the clip are the objective's: the bounds must not depend on them.
        out = micro_batch_loss(iw_sft, t, Settings(temperature=3.0, clip=(0.5, 1.5)))
        sums = dict(zip(sum_names(iw_sft), out.sums.tolist(), strict=True)) | {"weight_max": float(out.weight_max)}
        return summarize(sums, reported_metrics(iw_sft, origin))


@pytest.mark.parametrize("seed", range(5))
def test_the_bounds_are_lower_bounds_on_the_exact_objective(seed: int) -> None:
    model = Enumerated(seed)
    curated = model.probability("reference") * model.reward
    everything = list(range(len(model.all)))
    objective = (model.probability("policy") * model.reward).sum() / curated.sum()  # J(θ)/P(D+)
    found = model.metrics(everything, curated, origin="reference_filtered")
    lagged = model.metrics(everything, curated, lagged=True, origin="reference_filtered")
    assert found["bound_sft"] == pytest.approx(lagged["bound_sft"]) and found["bound_sft"] < objective
    assert found["bound_iw"] == pytest.approx(objective, rel=1e-6)  # the proposal is the policy: the bound is tight
    assert lagged["bound_iw"] < objective
    sums = [float((model.logprobs("policy", [i]) - model.logprobs("reference", [i])).sum()) for i in everything]
    assert found["bound_sft"] == pytest.approx((curated * (1 + np.array(sums))).sum() / curated.sum(), rel=1e-6)


def test_standard_errors_are_those_of_the_sampled_bounds() -> None:
    model, rng = Enumerated(3), np.random.default_rng(0)
    curated = model.probability("reference") * model.reward
    draws = rng.choice(len(model.all), (300, 64), p=curated / curated.sum())
    found = [
        model.metrics(row.tolist(), rng.choice([1.0, 2.0], 64), lagged=True, origin="reference_filtered")
        for row in draws
    ]
    for bound in ("bound_sft", "bound_iw"):
        spread = np.std([f[bound] for f in found])
        assert np.mean([f[f"{bound}_se"] for f in found]) == pytest.approx(spread, rel=0.1)  # its own error: 4 %
    assert math.isnan(model.metrics([0], np.ones(1), origin="reference_filtered")["bound_iw_se"])


@pytest.mark.parametrize("seed", range(3))
def test_the_kl_estimate_is_exact_on_all_of_the_references_samples(seed: int) -> None:
    model = Enumerated(seed)
    reference = model.probability("reference")
    draws = np.repeat(np.arange(len(model.all)), np.rint(64 * reference).astype(int)).tolist()
    assert len(draws) == 64
    kl = (reference * np.log(reference / model.probability("policy"))).sum()
    tokens = sum(len(model.all[i]) for i in draws) / len(draws)
    found = model.metrics(draws, np.ones(64), origin="reference")
    assert found["kl_from_reference"] == pytest.approx(kl / tokens, rel=1e-5)


def test_means_over_tokens_are_no_bounds_and_a_weighted_log_ratio_is_no_kl() -> None:
    """What these metrics must not be: the first can exceed the objective, and the second can be negative."""
    model = Enumerated(0)
    ratios = [model.logprobs("policy", [i]) - model.logprobs("reference", [i]) for i in range(len(model.all))]
    # The filter keeps one trajectory: J(θ)/P(D+) is its ratio.
    found = [model.metrics([i], np.ones(1), origin="reference_filtered") for i in range(len(ratios))]
    objective = np.array([float(r.sum().exp()) for r in ratios])
    of_means = np.array([1.0 + float(r.mean()) for r in ratios])
    assert (of_means > objective).any()
    assert (np.array([f["bound_sft"] for f in found]) <= objective + 1e-6).all()
    assert np.array([f["bound_iw"] for f in found]) == pytest.approx(objective, rel=1e-6)
    assert min(f["weighted_log_ratio"] for f in found) < 0.0


BOUNDS = {"bound_sft", "bound_sft_se", "bound_iw", "bound_iw_se"}


@pytest.mark.parametrize(
    ("origin", "names"),
    [("other", set()), ("reference_filtered", BOUNDS), ("reference", {*BOUNDS, "kl_from_reference"})],
)
def test_bounds_and_kl_are_reported_only_where_they_are_defined(origin: Origin, names: set[str]) -> None:
    model = Enumerated(0)
    found = model.metrics([0, 1, 2], np.ones(3), origin=origin)
    assert {*BOUNDS, "kl_from_reference"} & found.keys() == names
    assert {name for name in found if name.startswith(("bound", "kl"))} == names
