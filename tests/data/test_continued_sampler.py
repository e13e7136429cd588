"""A sampler that takes up a run with another global batch size, or with a corpus more: nothing is left out or repeated."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_iwsft.data.sampler import Part, Position, Quality, Sampler

LENGTHS = np.array([5 + (i * 7) % 40 for i in range(70)], np.int32)


def sampler(*parts: Part, size: int = 4, **options) -> Sampler:
    n = sum(part.size for part in parts)
    settings = {"seq_length": 64, "packing": "best_fit", "quality": Quality(), "seed": 3, **options}
    return Sampler(LENGTHS[:n], np.ones(n), global_batch_size=size, parts=parts, **settings)


def trained(s: Sampler, steps: range) -> list[tuple[int, ...]]:
    return [tuple(pack.tolist()) for step in steps for pack in s.packs_at(step) if len(pack)]


def stored(s: Sampler) -> dict:
    return json.loads(json.dumps(s.state()))


@pytest.mark.parametrize("step", [1, 3, 5, 6, 9])
@pytest.mark.parametrize("mode", ["none", "sample"])
def test_another_batch_size_continues_at_the_same_sequence(step: int, mode: str) -> None:
    """And a third one after that, in the middle and at the end of an epoch."""
    options = {"quality": Quality(mode), "packing": "none"} if mode == "sample" else {}
    part, epochs = Part("a", 50), 3
    one, *more = sampler(part, **options), sampler(part, size=6, **options), sampler(part, size=2, **options)
    runs = trained(one, range(step))
    expected = [tuple(pack.tolist()) for epoch in range(epochs) for pack in map(np.asarray, packs_of(one, epoch))]
    for s in more:
        at = s.continue_with(stored(one), step)
        assert at == one.position_at(step) == s.start
        assert s.position_at(s.total_steps(epochs, None)).epoch == epochs
        runs += trained(s, range(step, step + 2))
        one, step = s, step + 2
    runs += trained(one, range(step, one.total_steps(epochs, None)))
    assert runs == expected


def packs_of(s: Sampler, epoch: int) -> list[np.ndarray]:
    packs = s.epoch(epoch).packs
    return [packs[k] for k in range(len(packs))]


def test_epochs_whose_packs_are_known_are_not_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"quality": Quality("sample"), "seed": 5}
    one, again, without = (sampler(Part("a", 50), **options) for _ in range(3))
    step = one.total_steps(3, None) + 1
    at, state = one.position_at(step), stored(one)
    assert at.epoch == 3 and set(state["packs"]) == {"0", "1", "2", "3"}
    drawn: list[int] = []
    counted = Sampler._count_packs
    monkeypatch.setattr(Sampler, "_count_packs", lambda self, epoch: drawn.append(epoch) or counted(self, epoch))
    assert again.continue_with(state, step) == at and drawn == []
    del state["packs"]  # of a checkpoint that does not have them
    assert without.continue_with(state, step) == at and drawn == [0, 1, 2, 3]


def test_the_same_settings_change_nothing() -> None:
    one, again = sampler(Part("a", 50)), sampler(Part("a", 50))
    again.continue_with(stored(one), 7)
    assert again.start == Position() and trained(again, range(20)) == trained(one, range(20))


@pytest.mark.parametrize("weights", [(None, None, None), (1.0, 2.0, 3.0)])
@pytest.mark.parametrize("step", [2, "epoch"])
def test_an_appended_corpus_joins_with_the_first_epoch_that_has_not_begun(step: int | str, weights: tuple) -> None:
    """The epoch in progress ends as it began; then all trajectories of all corpora, each once without weights."""
    a, b, c = (Part(name, n, weight=w) for (name, n), w in zip((("a", 40), ("b", 10), ("c", 20)), weights, strict=True))
    before, after = sampler(a, b), sampler(a, b, c)
    at_epoch = before.steps_in(0)
    step = at_epoch if step == "epoch" else int(step)
    after.continue_with(stored(before), step)
    assert trained(after, range(step, at_epoch)) == trained(before, range(step, at_epoch))
    assert [part.first_epoch for part in after.parts] == [0, 0, 1]
    seen = [np.bincount(np.concatenate(packs_of(after, epoch)), minlength=70) for epoch in (1, 2, 3)]
    if weights[0] is None:
        assert all((epoch == 1).all() for epoch in seen)
    else:
        shares = np.array([[epoch[:40].sum(), epoch[40:50].sum(), epoch[50:].sum()] for epoch in seen])
        assert np.abs(shares - 70 * np.array([1, 2, 3]) / 6).max() <= 1
        assert shares.sum(0).tolist() == [35, 70, 105]
    again = sampler(a, b, c)
    again.continue_with(stored(after), at_epoch + 3)
    assert trained(again, range(at_epoch + 3, at_epoch + 30)) == trained(after, range(at_epoch + 3, at_epoch + 30))
