"""The prompts of evaluation are those of training, whatever the day: a template's date and variables go with the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_iwsft.data.chat_template import Rendering
from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.data.mixture import Mixture
from megatron_iwsft.data.prepare.records import RecordFormat
from megatron_iwsft.data.prepare.shard import ShardSettings, shard_corpus
from megatron_iwsft.data.template_defaults import TemplateVariables, defaults_of, with_defaults
from megatron_iwsft.errors import ConfigError
from megatron_iwsft.hf.transformers_models import ChatPrompts
from tests.support import tiny

# As Llama 3.2's, with a variable as Qwen3's.
TEMPLATE = (
    "  {%- if not date_string is defined %}\n{%- set date_string = strftime_now('%d %b %Y') %}\n{%- endif %}\n"
    "<|im_start|>system\nToday is {{ date_string }}{% if tone is defined %}, be {{ tone }}{% endif %}<|im_end|>\n"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("rendering", "written"),
    [
        (Rendering(), "Today is 26 Jul 2024<"),
        (
            Rendering(date="2025-01-02", options=(("tone", '"it\'s \\"brief\\""'),)),
            'Today is 02 Jan 2025, be it\'s "brief"<',
        ),
    ],
)
def test_prompts_of_an_export_are_those_of_the_corpus(tmp_path: Path, rendering: Rendering, written: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = tiny.hf_tokenizer(tmp_path / "tokenizer", template=TEMPLATE)
    corpus = shard(tmp_path / "corpus", tokenizer, rendering)
    (answer,) = [i for i in range(1, len(corpus.mask(0))) if corpus.mask(0)[i] > corpus.mask(0)[i - 1]]
    prompt = corpus.tokenizer().decode(corpus.tokens(0)[:answer].tolist())
    assert written in prompt
    exported = Mixture.of({"c": corpus}).exported_template
    assert exported is not None
    (tokenizer / "chat_template.jinja").write_text(exported)
    theirs = AutoTokenizer.from_pretrained(tokenizer)
    question = [{"role": "user", "content": "a?"}]
    assert ChatPrompts(theirs)(question) == prompt
    assert theirs.apply_chat_template(question, tokenize=False, add_generation_prompt=True) == prompt


def test_a_published_template_is_evaluated_with_the_date_of_training(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = tiny.hf_tokenizer(tmp_path / "tokenizer", template=TEMPLATE)
    assert "Today is 26 Jul 2024<" in ChatPrompts(AutoTokenizer.from_pretrained(tokenizer))([])


def test_prompts_take_a_date_and_variables_where_there_is_no_corpus(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    directory = tiny.hf_tokenizer(tmp_path / "tokenizer", template=TEMPLATE)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    variables = TemplateVariables("2025-01-02", (("tone", '"dry"'),))
    assert "Today is 02 Jan 2025, be dry<" in ChatPrompts(tokenizer, variables)([])
    tokenizer.chat_template = with_defaults(TEMPLATE, date="2025-01-02", options={"tone": '"dry"', "n": "[1, null]"})
    assert defaults_of(tokenizer.chat_template) == {"tone": "dry", "n": [1, None]} and defaults_of(TEMPLATE) == {}
    assert "be dry<" in ChatPrompts(tokenizer, TemplateVariables(options=(("tone", '"dry"'),)))([])
    for contradicting, message in (
        (TemplateVariables("2025-01-03"), "--date 2025-01-03: .* does not ask for a date.* Leave out --date"),
        (
            TemplateVariables(options=(("tone", '"wet"'),)),
            'tone="wet": .* was trained with tone="dry".* Leave the option out',
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            ChatPrompts(tokenizer, contradicting)


def test_date_and_variables_are_part_of_the_corpus(tmp_path: Path) -> None:
    tokenizer = tiny.hf_tokenizer(tmp_path / "tokenizer", template=TEMPLATE)
    renderings = [Rendering(), Rendering(date="2025-01-02"), Rendering(options=(("tone", '"dry"'),))]
    corpora = [shard(tmp_path / f"corpus{k}", tokenizer, rendering) for k, rendering in enumerate(renderings)]
    assert len({corpus.manifest["run"] for corpus in corpora}) == len({c.fingerprint for c in corpora}) == 3


def test_a_template_without_a_clock_stays_the_tokenizers_own(tmp_path: Path) -> None:
    corpus = shard(tmp_path / "corpus", tiny.hf_tokenizer(tmp_path / "tokenizer"), Rendering())
    assert Mixture.of({"c": corpus}).exported_template is None
    assert with_defaults("a", date="2025-01-02", options={"not a name": "1"}) == "a"


def shard(output: Path, tokenizer: Path, rendering: Rendering) -> Corpus:
    records = tiny.write_jsonl(output.with_suffix(".jsonl"), [{"prompt": "a?", "response": "b"}])
    settings = ShardSettings(str(tokenizer), record=RecordFormat(rendering=rendering))
    shard_corpus([records], output, settings, show_progress=False)
    return Corpus.open(output)
