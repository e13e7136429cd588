"""Packing and sampling: every trajectory in its place, few and full sequences, quality modes."""

import numpy as np
import pytest

from megatron_iwsft.data.packing import best_fit, efficiency
from megatron_iwsft.data.sampler import Quality, Sampler
from megatron_iwsft.errors import ConfigError, DataError


def lengths(n: int, high: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, high + 1, n)


@pytest.mark.parametrize(("n", "high", "capacity"), [(1, 5, 8), (1000, 300, 2048), (500, 64, 64), (300, 3, 7)])
def test_best_fit_places_every_item_once_and_overfills_no_pack(n: int, high: int, capacity: int) -> None:
    sizes = lengths(n, high)
    packs = best_fit(sizes, capacity)
    assert sorted(packs.items.tolist()) == list(range(n))
    assert all(0 < sizes[packs[p]].sum() <= capacity for p in range(len(packs)))


def naive_best_fit(sizes: np.ndarray, capacity: int) -> int:
    """Textbook best-fit decreasing, one item at a time; the number of bins."""
    free: list[int] = []
    for size in sorted(sizes.tolist(), reverse=True):
        fitting = [f for f in free if f >= size]
        if fitting:
            free[free.index(min(fitting))] -= size
        else:
            free.append(capacity - size)
    return len(free)


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_needs_as_few_packs_as_the_textbook_algorithm(seed: int) -> None:
    sizes = lengths(200, 100, seed)
    assert len(best_fit(sizes, 128)) == naive_best_fit(sizes, 128)


def test_short_trajectories_fill_98_percent_of_the_sequences() -> None:
    sizes = np.random.default_rng(1).gamma(4, 45, 7000).astype(int).clip(20, 600)
    assert efficiency(sizes, best_fit(sizes, 2048), 2048) >= 0.98


def test_best_fit_rejects_an_item_longer_than_the_capacity() -> None:
    with pytest.raises(DataError, match="9 tokens does not fit in a sequence of 8"):
        best_fit(np.array([3, 9]), 8)


NO_QUALITY = Quality()


def sampler(scores=None, *, n=50, quality=NO_QUALITY, packing="best_fit", seed=0, batch=4) -> Sampler:
    sizes = lengths(n, 40)
    scores = np.full(n, np.nan) if scores is None else scores
    return Sampler(sizes, scores, seq_length=64, packing=packing, global_batch_size=batch, quality=quality, seed=seed)


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_each_epoch_contains_every_trajectory_once_in_a_new_order(packing: str) -> None:
    s = sampler(packing=packing)
    seen = [np.concatenate([np.concatenate(s.epoch(e).step(i)) for i in range(s.epoch(e).num_steps)]) for e in (0, 1)]
    assert all(sorted(ids.tolist()) == list(range(50)) for ids in seen)
    assert not np.array_equal(*seen)
    again = sampler(packing=packing).epoch(1)
    assert np.array_equal(again.packs.items, s.epoch(1).packs.items), (
        "the epoch plan must be a pure function of its inputs"
    )


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_grouped_steps_hold_the_same_packs_each_step_of_similar_ones(packing: str) -> None:
    """Without grouping, the packs of a step differ as much as those of the epoch."""
    sizes = np.random.default_rng(0).lognormal(4, 0.7, 1000).astype(int).clip(2, 200)

    def epoch(number: int, *, grouped: bool) -> list[list[np.ndarray]]:
        s = Sampler(
            sizes,
            np.ones(1000),
            seq_length=200,
            packing=packing,
            global_batch_size=8,
            quality=NO_QUALITY,
            seed=1,
            group_by_cost=grouped,
        )
        return [s.epoch(number).step(k) for k in range(s.steps_in(number))]

    def spread(steps: list[list[np.ndarray]]) -> float:
        costs = np.array([[float((sizes[pack] ** 2).sum()) for pack in step] for step in steps[:-1]])
        return float(costs.std(1).mean() / costs.std())

    grouped, plain = epoch(2, grouped=True), epoch(2, grouped=False)
    packs = [sorted(tuple(pack.tolist()) for step in steps for pack in step) for steps in (grouped, plain)]
    assert packs[0] == packs[1]
    assert spread(grouped) < 0.15 < 0.7 < spread(plain)
    of_steps = [float((sizes[np.concatenate(step)] ** 2).sum()) for step in grouped[:-1]]
    assert abs(np.corrcoef(of_steps, np.arange(len(of_steps)))[0, 1]) < 0.5, "steps come in random order"


def test_the_last_batch_is_filled_up_with_empty_packs() -> None:
    s = sampler(packing="none", batch=8)
    last = s.epoch(0).step(s.epoch(0).num_steps - 1)
    assert [len(pack) for pack in last] == [1, 1, 0, 0, 0, 0, 0, 0]


def test_locate_finds_the_epoch_of_a_step() -> None:
    s = sampler(packing="none")
    assert s.steps_in(0) == 13
    assert [(at.epoch, at.pack) for at in map(s.position_at, (0, 12, 13, 27))] == [
        (0, 0),
        (0, 12 * s.global_batch_size),
        (1, 0),
        (2, s.global_batch_size),
    ]
    assert s.total_steps(3, None) == 39
    assert s.total_steps(3, 20) == 20
    assert s.total_steps(None, 100) == 100


def test_quality_thresholds_repeats_trajectories_once_per_threshold() -> None:
    scores = np.linspace(0, 1, 50)
    s = sampler(scores, quality=Quality("thresholds", (0.5, 0.9)))
    counts = np.bincount(s.epoch(0).packs.items, minlength=50)
    assert np.array_equal(counts, (scores >= 0.5).astype(int) + (scores >= 0.9))


def test_quality_sample_draws_in_proportion_to_score() -> None:
    scores = np.zeros(50)
    scores[:10] = 1.0
    s = sampler(scores, quality=Quality("sample"))
    drawn = np.concatenate([s.epoch(e).packs.items for e in range(20)])
    assert set(drawn.tolist()) == set(range(10))
    assert np.bincount(drawn).min() > 60  # of 100 expected


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_steps_are_counted_without_planning_an_epoch(packing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that resumes in its fifth epoch makes the plan of that epoch only, in the quality mode sample too."""
    scores = np.linspace(0, 1, 50)
    planned = sampler(scores, quality=Quality("sample"), packing=packing)
    steps = [planned.epoch(epoch).num_steps for epoch in range(6)]
    counts = [np.bincount(planned.epoch(epoch).packs.items, minlength=50) for epoch in range(6)]

    plans, make_plan = [], Sampler._epoch
    monkeypatch.setattr(Sampler, "_epoch", lambda self, epoch: (plans.append(epoch), make_plan(self, epoch))[1])
    resumed = sampler(scores, quality=Quality("sample"), packing=packing)
    assert [resumed.steps_in(epoch) for epoch in range(6)] == steps
    assert resumed.total_steps(6, None) == sum(steps)
    assert np.array_equal(resumed.appearances(3), counts[3])
    assert plans == []
    resumed.continue_with(planned.state(), sum(steps[:4]))
    packs = resumed.packs_at(sum(steps[:4]))
    assert plans == [4] and all(map(np.array_equal, packs, planned.epoch(4).step(0)))


def test_quality_weight_uses_the_score_as_weight() -> None:
    scores = np.linspace(0, 1, 50)
    s = sampler(scores, quality=Quality("weight"))
    assert np.array_equal(s.trajectory_weights(np.array([3, 7])), scores[[3, 7]].astype(np.float32))


def test_scores_that_do_not_suit_the_quality_mode_are_rejected() -> None:
    with pytest.raises(DataError, match="50 of 50 trajectories have no score"):
        sampler(quality=Quality("weight"))
    with pytest.raises(DataError, match="needs scores ≥ 0"):
        sampler(np.linspace(-1, 1, 50), quality=Quality("sample"))
    with pytest.raises(DataError, match=r"no trajectory reaches the lowest of data.quality.thresholds, 2"):
        sampler(np.linspace(0, 1, 50), quality=Quality("thresholds", (2.0, 3.0)))


def test_trajectories_longer_than_a_sequence_are_rejected() -> None:
    with pytest.raises(
        ConfigError, match=r"data.seq_length is 16, but 1 of 2 trajectories are longer \(up to 30 tokens\)"
    ):
        Sampler(
            np.array([5, 30]),
            np.zeros(2),
            seq_length=16,
            packing="none",
            global_batch_size=1,
            quality=Quality(),
            seed=0,
        )
