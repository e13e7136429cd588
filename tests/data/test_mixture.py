"""Mixtures of corpora: what epochs and weights mean, and several corpora as one sequence of trajectories."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_iwsft.config.loader import parse_config
from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.data.mixture import Mixture
from megatron_iwsft.data.sampler import Part, Quality, Sampler
from megatron_iwsft.errors import ConfigError, DataError
from tests.support import tiny

SIZES = (40, 10)
NO_QUALITY = Quality()


def sampler(*parts: Part, quality: Quality = NO_QUALITY, packing="none", seed: int = 0, scores=None) -> Sampler:
    n = sum(part.size for part in parts)
    lengths = np.random.default_rng(0).integers(1, 41, n)
    scores = np.full(n, np.nan) if scores is None else scores
    return Sampler(
        lengths,
        scores,
        seq_length=64,
        packing=packing,
        global_batch_size=4,
        quality=quality,
        seed=seed,
        parts=parts,
    )


def times(s: Sampler, epoch: int) -> list[np.ndarray]:
    """How often each trajectory of each part is in an epoch."""
    counts = np.bincount(s.epoch(epoch).packs.items, minlength=len(s.lengths))
    return np.split(counts, np.cumsum([part.size for part in s.parts])[:-1])


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_epochs_are_passes_over_a_corpus(packing: str) -> None:
    first, second = times(sampler(Part("a", 40, epochs=3), Part("b", 10, epochs=2.5), packing=packing), 0)
    assert set(first) == {3}
    assert sorted(second) == [2] * 5 + [3] * 5


def test_a_fraction_of_a_pass_takes_turns_over_the_epochs() -> None:
    s = sampler(Part("a", 40, epochs=1), Part("b", 10, epochs=1.4))
    counts = [times(s, epoch)[1] for epoch in range(5)]
    assert [count.sum() for count in counts] == [14] * 5
    assert all(set(count) == {1, 2} for count in counts)
    assert set(sum(counts)) == {7}, "after five epochs of 1.4 passes, each has been trained on seven times"


def test_which_trajectories_a_fraction_holds_depends_on_the_seed() -> None:
    parts = Part("a", 40), Part("b", 10, epochs=0.5)
    chosen = [times(sampler(*parts, seed=seed), 0)[1].tolist() for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2]


def test_weights_are_shares_of_the_trajectories() -> None:
    """An epoch has as many trajectories as the corpora together: 50, a quarter of them from the first corpus."""
    s = sampler(Part("a", 40, weight=1), Part("b", 10, weight=3))
    counts = [times(s, epoch) for epoch in range(4)]
    drawn = np.array([[part.sum() for part in epoch] for epoch in counts])
    assert np.abs(drawn - [12.5, 37.5]).max() <= 0.5
    assert drawn.sum(0).tolist() == [50, 150]
    assert [set(sum(of_part)) for of_part in zip(*counts, strict=True)] == [{1, 2}, {15}]


def test_weights_have_no_scale() -> None:
    plans = [sampler(Part("a", 40, weight=w), Part("b", 10, weight=3 * w)).epoch(1) for w in (1, 0.1)]
    assert np.array_equal(plans[0].packs.items, plans[1].packs.items)


def test_without_epochs_and_weights_a_mixture_is_all_trajectories_once() -> None:
    mixed, single = sampler(Part("a", 40), Part("b", 10)), sampler(Part("ab", 50))
    assert np.array_equal(mixed.epoch(2).packs.items, single.epoch(2).packs.items)


def test_the_number_of_steps_follows_a_fractions_trajectories() -> None:
    s = sampler(Part("a", 40), Part("b", 10, epochs=0.25))  # 2.5 of the second: 42 or 43 trajectories
    assert [s.steps_in(epoch) for epoch in range(4)] == [-(-len(s.epoch(e).packs) // 4) for e in range(4)]
    assert s.total_steps(4, None) == sum(s.steps_in(epoch) for epoch in range(4))
    end = s.position_at(s.total_steps(2, None))
    assert (end.epoch, end.pack) == (2, 0)


def test_quality_applies_within_each_corpus() -> None:
    scores = np.concatenate([np.repeat([0.0, 1.0], 20), np.repeat([0.0, 5.0], 5)])
    parts = Part("a", 40, epochs=2), Part("b", 10, epochs=3)
    drawn = times(sampler(*parts, quality=Quality("sample"), scores=scores), 0)
    assert [part.sum() for part in drawn] == [80, 30]
    assert drawn[0][:20].sum() == drawn[1][:5].sum() == 0

    reached = times(sampler(*parts, quality=Quality("thresholds", (1.0, 2.0)), scores=scores), 0)
    assert [part.tolist() for part in reached] == [[0] * 20 + [2] * 20, [0] * 5 + [6] * 5]


def test_scores_that_do_not_suit_the_quality_mode_are_refused_by_corpus() -> None:
    parts, scores = (Part("a", 40), Part("b", 10)), np.concatenate([np.ones(40), np.zeros(10)])
    with pytest.raises(DataError, match=r"needs scores ≥ 0 with a positive sum; found 0 … 0 of corpus b"):
        sampler(*parts, quality=Quality("sample"), scores=scores)
    with pytest.raises(DataError, match="no trajectory of corpus b reaches"):
        sampler(*parts, quality=Quality("thresholds", (0.5,)), scores=scores)
    scores[:3] = np.nan
    with pytest.raises(DataError, match="3 of 40 trajectories of corpus a have no score"):
        sampler(*parts, quality=Quality("weight"), scores=scores)


@pytest.mark.parametrize("epochs", [1, 2.5, 0.3])
@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_the_covering_plan_has_every_trajectory_in_rows_of_the_first_epoch(epochs: float, packing: str) -> None:
    s = sampler(Part("a", 40), Part("b", 10, epochs=epochs), packing=packing)
    plan, first = s.covering(), s.epoch(0)
    assert set(plan.packs.items) == set(range(50))
    rows, trained = ({tuple(p.packs[k]) for k in range(len(p.packs))} for p in (plan, first))
    seen = set(first.packs.items.tolist())
    assert {row for row in rows if set(row) & seen} <= trained
    if epochs == 1:
        assert np.array_equal(plan.packs.items, first.packs.items)
        assert np.array_equal(plan.packs.offsets, first.packs.offsets)
    assert max(int(s.lengths[list(row)].sum()) for row in rows) <= 64


# The corpora -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two that fit together, and one of another tokenizer."""
    directory = tmp_path_factory.mktemp("corpora")
    made = {
        "one": tiny.token_corpus(directory / "one", [20, 30, 25], scores=True),
        "two": tiny.token_corpus(directory / "two", [40, 10], seed=5),
        "foreign": tiny.token_corpus(directory / "foreign", [15], vocab_size=280),
    }
    return {name: corpus.directory for name, corpus in made.items()}


def test_trajectories_are_numbered_corpus_after_corpus(corpora: dict[str, Path]) -> None:
    names = ("two", "one")
    mixture = Mixture.open({name: corpora[name] for name in names})
    two, one = (Corpus.open(corpora[name]) for name in names)
    assert mixture.lengths.tolist() == [40, 10, 20, 30, 25]
    assert [mixture.locate(i) for i in range(5)] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    for i, (corpus, k) in enumerate([(two, 0), (two, 1), (one, 0), (one, 1), (one, 2)]):
        assert np.array_equal(mixture.tokens(i), corpus.tokens(k))
        assert np.array_equal(mixture.mask(i), corpus.mask(k))
    assert np.array_equal(mixture.scores[2:], one.scores) and np.isnan(mixture.scores[:2]).all()
    ids = {name: Corpus.open(corpora[name]).meta(["id"])["id"].to_pylist() for name in names}
    assert mixture.ids([4, 0]) == [f"one/{ids['one'][2]}", f"two/{ids['two'][0]}"]
    assert mixture.fingerprints == {"two": two.fingerprint, "one": one.fingerprint}


def test_a_mixture_of_one_is_its_corpus(corpora: dict[str, Path]) -> None:
    mixture, corpus = Mixture.open({"one": corpora["one"]}), Corpus.open(corpora["one"])
    assert mixture.ids([1]) == [corpus.meta(["id"])["id"][1].as_py()]
    assert mixture.counts == corpus.manifest["counts"]


def test_a_corpus_of_another_tokenizer_is_refused_by_name(corpora: dict[str, Path]) -> None:
    with pytest.raises(
        DataError, match=f"{corpora['foreign']} was made with a different tokenizer than {corpora['one']}"
    ):
        Mixture.open(corpora)


def test_a_corpus_of_another_template_is_refused_by_name(corpora: dict[str, Path]) -> None:
    opened = {name: Corpus.open(corpora[name]) for name in ("one", "two")}
    for corpus, template in zip(opened.values(), ("a", "b"), strict=True):
        corpus.manifest["template"] = {"hash": template, "source": template}
    with pytest.raises(
        DataError, match=f"{corpora['two']} was made with a different chat template than {corpora['one']}"
    ):
        Mixture.of(opened)._check_corpora()


RENDERINGS = {
    "--date": ({"date": "2024-07-26"}, {"date": "2025-01-02"}),
    "--template-option": ({"options": []}, {"options": [["enable_thinking", "false"]]}),
    "--thinking-tags": ({"thinking": ["<think>", "</think>"]}, {"thinking": ["<t>", "</t>"]}),
}


@pytest.mark.parametrize("option", RENDERINGS)
def test_a_corpus_that_was_rendered_otherwise_is_refused_by_name(option: str, corpora: dict[str, Path]) -> None:
    opened = {name: Corpus.open(corpora[name]) for name in ("one", "two")}
    for corpus, rendering in zip(opened.values(), RENDERINGS[option], strict=True):
        corpus.manifest["template"] = {"hash": "a", "source": "{{ strftime_now('%Y') }}"}
        corpus.manifest["settings"]["record"] = {"rendering": rendering}
    with pytest.raises(DataError, match=f"{corpora['two']} was rendered with {option} .*, {corpora['one']} with"):
        Mixture.of(opened)._check_corpora()
    if option == "--date":  # without a clock it changes nothing
        for corpus in opened.values():
            corpus.manifest["template"]["source"] = "x"
        Mixture.of(opened)._check_corpora()


def test_a_corpus_listed_twice_is_refused(corpora: dict[str, Path]) -> None:
    with pytest.raises(DataError, match="are the same corpus"):
        Mixture.open({"a": corpora["one"], "b": corpora["one"]})


# The config --------------------------------------------------------------------------------------------------------------------

CONFIG = "{run: {name: r, dir: r}, model: {hf: m}, data: {seq_length: 64, epochs: 1, ...}}"


def data(**settings):
    return parse_config(CONFIG.replace(", ...", f", {json.dumps(settings)[1:-1]}"), [], where="c.yaml").data


def test_the_short_form_is_a_mixture_of_one() -> None:
    (only,) = data(corpus="corpora/s1k").mixture
    assert (only.label, only.corpus, only.epochs, only.weight) == ("s1k", "corpora/s1k", None, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needs corpus (one directory) or corpora (a list), not both"),
        ({"corpus": "a", "corpora": [{"corpus": "b"}]}, "needs corpus (one directory) or corpora (a list), not both"),
        ({"corpora": [{"corpus": "a", "weight": 1}, {"corpus": "b"}]}, "a has a weight, b has none"),
        ({"corpora": [{"corpus": "a", "weight": 1}, {"corpus": "b", "epochs": 2}]}, "a has a weight, b has epochs"),
        ({"corpora": [{"corpus": "x/a"}, {"corpus": "y/a"}]}, "two have the name a. Set name for one of them"),
        ({"corpora": [{"corpus": "a", "wieght": 1}]}, "data.corpora.0.wieght is not a known key. Did you mean weight?"),
        ({"corpora": [{"corpus": "a", "epochs": 0}]}, "data.corpora.0.epochs"),
    ],
)
def test_a_mixture_that_makes_no_sense_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        data(**settings)
    assert message in str(error.value)
