"""Several corpora as one sequence of trajectories, numbered corpus after corpus. A single corpus is a mixture of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.data.metadata import Sources
from megatron_iwsft.data.template_defaults import reads_clock, with_defaults
from megatron_iwsft.errors import DataError
from megatron_iwsft.utils.node_arrays import node_arrays


def rendering_of(corpus: Corpus) -> dict[str, Any]:
    """The options of `iwsft shard` on which the text of a prompt depends beside its template, by name. date: None without a clock."""
    rendering = corpus.manifest["settings"].get("record", {}).get("rendering", {})
    clock = corpus.manifest["template"] is not None and reads_clock(corpus.manifest["template"]["source"])
    return {
        "--date": rendering.get("date") if clock else None,
        "--template-option": rendering.get("options", []),
        "--thinking-tags": rendering.get("thinking"),
    }


def _shown(value: Any) -> str:
    return " ".join(f"{name}={v}" for name, v in value) if value and isinstance(value[0], list) else repr(value)


@dataclass(frozen=True)
class Mixture:
    """Open corpora of one tokenizer. Trajectory starts[c] + k of the mixture is trajectory k of corpora[c].

    names    of the corpora, in metrics and messages
    starts   int64   [corpora + 1]
    lengths  int32   [n]  tokens per trajectory
    scores   float64 [n]  NaN where a trajectory has no score
    """

    names: list[str]
    corpora: list[Corpus]
    starts: np.ndarray
    lengths: np.ndarray
    scores: np.ndarray

    @staticmethod
    def open(directories: Mapping[str, str | Path]) -> Mixture:
        """Open corpora, given as name → directory.

        Raises DataError if one cannot be opened (`Corpus.open`), is empty or listed twice, or was made with another tokenizer, chat
        template, date for it, variables for it or thinking tags than those before it.
        """
        mixture = Mixture.of({name: Corpus.open(directory) for name, directory in directories.items()})
        mixture._check_corpora()
        return mixture

    @staticmethod
    def of(corpora: Mapping[str, Corpus]) -> Mixture:
        """Of open corpora, unchecked."""
        opened = list(corpora.values())
        if len(opened) == 1:
            joined = {"lengths": opened[0].lengths, "scores": opened[0].scores}
        else:
            joined = node_arrays(
                f"mixture of {[corpus.fingerprint for corpus in opened]}",
                lambda: {
                    "lengths": np.concatenate([corpus.lengths for corpus in opened]),
                    "scores": np.concatenate([corpus.scores for corpus in opened]),
                },
            )
        return Mixture(names=list(corpora), corpora=opened, starts=np.cumsum([0, *map(len, opened)]), **joined)

    def _check_corpora(self) -> None:
        first, seen = self.corpora[0], dict[str, Path]()
        rendered: Corpus | None = None
        for corpus in self.corpora:
            if not len(corpus):
                raise DataError(
                    f"{corpus.directory} contains no trajectories. "
                    "Shard records that are kept, or leave the corpus out."
                )
            if corpus.fingerprint in seen:
                raise DataError(
                    f"data.corpora: {seen[corpus.fingerprint]} and {corpus.directory} are the same corpus. List it once, with more epochs "
                    "or a larger weight."
                )
            seen[corpus.fingerprint] = corpus.directory
            if corpus.manifest["tokenizer"] != first.manifest["tokenizer"]:
                raise DataError(
                    f"data.corpora: {corpus.directory} was made with a different tokenizer than {first.directory}. Shard its records again "
                    "with the same one."
                )
            template = corpus.manifest["template"]
            if template is None:  # records that came tokenized
                continue
            rendered = rendered or corpus
            if template["hash"] != rendered.manifest["template"]["hash"]:
                raise DataError(
                    f"data.corpora: {corpus.directory} was made with a different chat template than {rendered.directory}. Shard its "
                    "records again with the same one."
                )
            for option, value in rendering_of(corpus).items():
                if (before := rendering_of(rendered)[option]) != value:
                    raise DataError(
                        f"data.corpora: {corpus.directory} was rendered with {option} {_shown(value)}, {rendered.directory} with "
                        f"{_shown(before)}. Shard its records again with the same."
                    )

    def __len__(self) -> int:
        return len(self.lengths)

    def locate(self, i: int) -> tuple[int, int]:
        """(corpus, index within the corpus) of trajectory i."""
        corpus = int(np.searchsorted(self.starts, i, side="right")) - 1
        return corpus, i - int(self.starts[corpus])

    def tokens(self, i: int) -> np.ndarray:
        """As `Corpus.tokens`."""
        corpus, k = self.locate(i)
        return self.corpora[corpus].tokens(k)

    def mask(self, i: int) -> np.ndarray:
        """As `Corpus.mask`."""
        corpus, k = self.locate(i)
        return self.corpora[corpus].mask(k)

    def token_weights(self, i: int) -> np.ndarray | None:
        """As `Corpus.token_weights`."""
        corpus, k = self.locate(i)
        return self.corpora[corpus].token_weights(k)

    @property
    def has_turn_weights(self) -> bool:
        """Whether any trajectory has turns of different weights."""
        return any(corpus.has_turn_weights for corpus in self.corpora)

    def sources(self) -> Sources:
        return Sources.joined([corpus.sources() for corpus in self.corpora])

    def ids(self, trajectories: Sequence[int]) -> list[str]:
        """The ids of some trajectories; in a mixture of several corpora, CORPUS/ID. Reads the metadata of their shards."""
        columns: dict[tuple[int, int], Any] = {}
        out = []
        for i in trajectories:
            number, k = self.locate(i)
            corpus = self.corpora[number]
            shard, row = corpus.locate(k)
            if (number, shard) not in columns:
                columns[number, shard] = corpus.shard_meta(corpus.shards[shard], ["id"])["id"]
            prefix = f"{self.names[number]}/" if len(self.corpora) > 1 else ""
            out.append(f"{prefix}{columns[number, shard][row]}")
        return out

    @property
    def fingerprints(self) -> dict[str, str]:
        """Name → fingerprint of each corpus."""
        return {name: corpus.fingerprint for name, corpus in zip(self.names, self.corpora, strict=True)}

    @property
    def identity(self) -> str:
        """What its arrays depend on."""
        return " ".join(corpus.fingerprint for corpus in self.corpora)

    @property
    def counts(self) -> dict[str, int]:
        """The manifests' counts, summed over corpora."""
        return {key: sum(c.manifest["counts"][key] for c in self.corpora) for key in self.corpora[0].manifest["counts"]}

    @property
    def template(self) -> dict[str, Any] | None:
        """The manifest's entry about the chat template; None if all records came tokenized."""
        return self._rendered.manifest["template"]

    @property
    def exported_template(self) -> str | None:
        """The chat template for a model trained on this, with the date and the variables of the training's prompts.

        None if it is the tokenizer's own.
        """
        if self.template is None:
            return None
        source: str = self.template["source"]
        rendering = rendering_of(self._rendered)
        fixed = with_defaults(source, date=rendering["--date"], options=dict(rendering["--template-option"]))
        named = self._rendered.manifest["settings"]["template"] != "tokenizer"
        return fixed if named or fixed != source else None

    @property
    def _rendered(self) -> Corpus:
        """The first corpus that a chat template rendered, if there is one."""
        return next((c for c in self.corpora if c.manifest["template"] is not None), self.corpora[0])

    @property
    def tokenizer_files(self) -> list[Path]:
        return self.corpora[0].tokenizer_files

    @property
    def described(self) -> str:
        """The directories, for messages."""
        return ", ".join(str(corpus.directory) for corpus in self.corpora)
