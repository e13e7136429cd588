"""Write the files of a Hugging Face directory other than weights and config: tokenizer, chat template, generation config, model card."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import (
    Any,
    NotRequired,  # pydantic asks for this one before Python 3.12
)

from typing_extensions import TypedDict

from megatron_iwsft.data.chat_template import ChatTemplate
from megatron_iwsft.data.tokenizer import CHAT_TEMPLATE, load_tokenizer
from megatron_iwsft.errors import CheckpointError, DataError
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.hf.directory import GENERATION
from megatron_iwsft.utils.files import write_json, write_text
from megatron_iwsft.utils.json_files import check_json, read_json
from megatron_iwsft.utils.text import printable_line
from megatron_iwsft.version import __version__


class _TokenIds(TypedDict):
    eos_token_id: NotRequired[int | list[int] | None]


@dataclass(frozen=True)
class Provenance:
    """How the weights were trained. config: the run's resolved config; corpora: name → fingerprint of each training corpus."""

    step: int
    config: dict[str, Any]
    corpora: dict[str, str] = field(default_factory=dict)
    template_hash: str | None = None


@dataclass(frozen=True)
class SupportingFiles:
    """The files that go with exported weights. chat_template: replaces the tokenizer's own template, unless None. library: reads them."""

    tokenizer_files: list[Path]
    provenance: Provenance
    chat_template: str | None = None
    library: str = "transformers"

    def write(self, directory: Path, architecture: Architecture) -> None:
        for file in self.tokenizer_files:
            shutil.copyfile(file, directory / file.name)
        if self.chat_template is not None:
            write_text(directory / CHAT_TEMPLATE, self.chat_template)
        write_json(directory / GENERATION, _generation_config(directory, architecture), indent=2, sort_keys=True)
        write_text(directory / "README.md", _model_card(self.provenance, self.library))


def _generation_config(directory: Path, architecture: Architecture) -> dict[str, Any]:
    """The base model's generation config, with every token that ends an answer added to `eos_token_id`.

    A base model lists only end-of-text; a model trained with a chat template ends its turns with another token.
    """
    path = directory / GENERATION
    advice = "Fix or remove the base model's file."
    config = read_json(path, dict[str, Any], CheckpointError, advice=advice) if path.exists() else {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if config.get(key) is None and architecture.hf.get(key) is not None:
            config[key] = architecture.hf[key]
    check_json(config, _TokenIds, CheckpointError, where="the base model's generation config", advice=advice)
    stops = config.get("eos_token_id")
    stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
    stops = list(dict.fromkeys([*stops, *_turn_ends(directory)]))
    if stops:
        config["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    return {k: v for k, v in config.items() if k not in ("transformers_version", "_from_model_config")}


def _turn_ends(directory: Path) -> list[int]:
    """Ids of the end-of-text token and of the token that ends an assistant turn in the chat template, if there are any."""
    try:
        tokenizer = load_tokenizer(directory)
    except DataError:
        return []
    texts = [tokenizer.eos_token] if tokenizer.eos_token else []
    if tokenizer.chat_template is not None:
        try:
            template = ChatTemplate(tokenizer)
        except DataError:
            return []
        turn = template.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        texts.append(turn[: tokenizer.ends_with_special(turn)])
    return [ids[-1] for ids in (tokenizer.encode_pieces([text])[0] for text in texts) if ids]


def _model_card(provenance: Provenance, library: str) -> str:
    config = provenance.config
    run, objective, data, model = (config.get(key) or {} for key in ("run", "objective", "data", "model"))
    facts = {
        "run": run.get("name"),
        "step": provenance.step,
        "objective": _objective(objective),
        **_corpora(data, provenance.corpora),
        "trained from": next((v for v in model.values() if isinstance(v, str)), None),
        "reference": (config.get("reference") or {}).get("model"),
        "adapters": _adapters(config.get("adapter") or {}),
        "chat template hash": provenance.template_hash,
        "exported by": f"megatron_iwsft {__version__}",
    }
    lines = ["---", f"library_name: {library}", "---", f"# {_literally(run.get('name', 'model'))}", ""]
    facts_given = (f"- {name}: {_literally(value)}" for name, value in facts.items() if value is not None)
    return "\n".join([*lines, *facts_given]) + "\n"


def _adapters(adapter: dict[str, Any]) -> str | None:
    if not adapter.get("rank"):
        return None
    return (
        f"rank {adapter['rank']}, alpha {adapter['alpha']:g}, on {', '.join(adapter['targets'] or ['all projections'])}"
    )


def _literally(value: object) -> str:
    """A Markdown code span: nothing in it is taken for a link, HTML or emphasis."""
    text = printable_line(str(value))
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if not text or text[0] in "` " or text[-1] in "` " else ""
    return f"{fence}{space}{text}{space}{fence}"


def _corpora(data: dict[str, Any], fingerprints: dict[str, str]) -> dict[str, Any]:
    """Directories and hashes of the training corpora; of a mixture, with the amount of each."""
    entries = data.get("corpora") or [{"corpus": data.get("corpus")}]
    facts: dict[str, Any] = {}
    for number, entry in enumerate(entries):
        which = f"corpus {number + 1}" if len(entries) > 1 else "corpus"
        amount = next((f" ({key} {entry[key]:g})" for key in ("epochs", "weight") if entry.get(key)), "")
        facts[which] = f"{entry['corpus']}{amount}" if entry["corpus"] else None
        facts[f"{which} hash (SHA-256 of its manifest)"] = dict(enumerate(fingerprints.values())).get(number)
    return facts


def _objective(objective: dict[str, Any]) -> str | None:
    """`iw_sft (level sequence, temperature 1.0, …)`: the objective with all its settings."""
    if not objective:
        return None
    relevant = {k: v for k, v in objective.items() if k != "name" and v is not None}
    if objective.get("name") == "sft":
        relevant = {"normalize": objective.get("normalize")}
    described = ", ".join(f"{k} {v['kind'] if isinstance(v, dict) and 'kind' in v else v}" for k, v in relevant.items())
    return f"{objective.get('name')} ({described})"
