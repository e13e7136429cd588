"""Evaluation with `transformers` on CPU: generation, result files, resuming after an interruption, comparing two models."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_iwsft.cli import main as cli
from megatron_iwsft.data import template_engine
from megatron_iwsft.data.template_defaults import TemplateVariables
from megatron_iwsft.errors import CheckpointError, ConfigError, DataError
from megatron_iwsft.evaluate.benchmark import read_benchmark
from megatron_iwsft.evaluate.chat import Chat
from megatron_iwsft.evaluate.generate import PromptFormat, Sampling, TransformersGenerator, make_generator
from megatron_iwsft.evaluate.run import EvaluatedModel, Result, evaluate_model, find_models, table, write_summary
from megatron_iwsft.hf.transformers_models import ChatPrompts, load_in_transformers
from megatron_iwsft.utils.locks import exclusive
from tests.convert.test_round_trip import hf_directory
from tests.support import tiny
from tests.support.damage import edit_json

QUESTIONS = [
    (1, "What is 12 plus 30?"),
    (2, "7?"),
    (3, "Ein Zug fährt 120 km in 2 Stunden. How fast?"),
    (4, "Add 7 and 8."),
]
SAMPLED = Sampling(samples=3, temperature=1.0, top_p=0.9, max_new_tokens=12, seed=5)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = hf_directory(tmp_path_factory.mktemp("models") / "a")
    tiny.hf_tokenizer(path, vocab_size=300)
    return path


def test_greedy_answers_do_not_depend_on_the_batch(model: Path) -> None:
    """Compared with one forward pass per token, without a cache, one prompt at a time."""
    theirs, tokenizer = load_in_transformers(model)
    stops = {tokenizer.eos_token_id}
    expected = []
    for _, question in QUESTIONS:
        ids = PromptFormat(tokenizer)(question)
        assert tokenizer.decode(ids) == f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        answer: list[int] = []
        with torch.no_grad():
            while len(answer) < 12 and not stops & set(answer):
                answer.append(int(theirs(torch.tensor([ids + answer])).logits[0, -1].argmax()))
        expected.append(tokenizer.decode([t for t in answer if t not in stops], skip_special_tokens=True))
    for batch_size in (1, 3, 4):
        generator = TransformersGenerator(model, Sampling(max_new_tokens=12), batch_size=batch_size)
        assert [a.text for (a,) in generator.answer(QUESTIONS)] == expected, batch_size


def test_a_sampled_answer_depends_only_on_its_seed(model: Path) -> None:
    found = [
        [[a.text for a in own] for own in TransformersGenerator(model, SAMPLED, batch_size=size).answer(QUESTIONS)]
        for size in (2, 12)
    ]
    assert found[0] == found[1]
    assert len({text for own in found[0] for text in own}) == 12
    other = TransformersGenerator(model, Sampling(3, 1.0, 0.9, 12, seed=6), batch_size=12).answer(QUESTIONS)
    assert all(a.text != b for own, texts in zip(other, found[0], strict=True) for a, b in zip(own, texts, strict=True))


def test_a_chat_streams_what_greedy_decoding_gives_and_remembers(model: Path) -> None:
    chat, pieces = Chat(model, max_new_tokens=12), list[str]()
    answer = chat.say("7?", pieces.append)
    (expected,) = TransformersGenerator(model, Sampling(max_new_tokens=12), batch_size=1).answer([(0, "7?")])
    assert answer == "".join(pieces) == expected[0].text and len(pieces) > 1
    chat.say("8?", pieces.append)
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "user", "assistant"]
    assert chat.messages[1]["content"] == answer


def test_generate_takes_a_conversation_from_standard_input(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("7?\n\n8?\n"))
    cli.run(["generate", "--model", str(model), "--chat", "--max-new-tokens", "4"])
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("> ")] == ["> 7?", "> 8?"]
    with pytest.raises(ConfigError, match="needs a PROMPT, or --chat"):
        cli.run(["generate", "--model", str(model)])


def test_sampling_follows_the_models_distribution(model: Path) -> None:
    """First tokens of 3,000 answers, compared with the top-p softmax at that temperature."""
    theirs, tokenizer = load_in_transformers(model)
    ids = PromptFormat(tokenizer)("7?")
    with torch.no_grad():
        chances = torch.softmax(theirs(torch.tensor([ids])).logits[0, -1].double() / 0.7, -1)
    order = chances.argsort(descending=True)
    before = chances[order].cumsum(0) - chances[order]
    nucleus = {int(t) for t in order[before < 0.8]}
    kept = torch.zeros_like(chances)
    kept[list(nucleus)] = chances[list(nucleus)]
    kept /= kept.sum()

    generator = TransformersGenerator(model, Sampling(3000, 0.7, 0.8, max_new_tokens=1), batch_size=1000)
    counts = torch.zeros_like(chances)
    prompt = torch.tensor([ids] * 1000)
    for at in range(0, 3000, 1000):
        seeds = [generator._sampling.seed_of(1, s) for s in range(at, at + 1000)]
        out = generator._model.generate(
            input_ids=prompt, generation_config=generator._options, logits_processor=generator._samplers(seeds)
        )
        counts += torch.bincount(out[:, -1], minlength=len(chances))
    assert {int(t) for t in counts.nonzero()} <= nucleus
    assert float((counts / 3000 - kept).abs().max()) < 4 * (0.25 / 3000) ** 0.5


def evaluated(model: Path, benchmark: Path, output: Path, **changes):
    problems = read_benchmark(benchmark)
    settings = vars(SAMPLED) | changes
    made = []

    def make(directory: Path):
        made.append(directory)
        return make_generator(directory, SAMPLED, batch_size=6)

    return (
        evaluate_model(EvaluatedModel(model.name, model), problems, output, settings=settings, samples=3, make=make),
        len(made),
    )


def write_benchmark(directory: Path) -> Path:
    return tiny.write_jsonl(directory / "b.jsonl", [{"question": q, "answer": f"#### {n}"} for n, q in QUESTIONS])


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    return write_benchmark(tmp_path)


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory) -> tuple[bytes, Result]:
    """The result file of an uninterrupted evaluation, and its result."""
    home = tmp_path_factory.mktemp("finished")
    result, _ = evaluated(model, write_benchmark(home), home)
    return (home / "a.jsonl").read_bytes(), result


def test_the_result_file_has_every_answer(finished: tuple[bytes, Result]) -> None:
    content, result = finished
    header, *lines = map(json.loads, content.splitlines())
    assert header["settings"]["temperature"] == 1.0
    assert header["backend"] == "transformers"
    assert [line["prompt"] for line in lines] == [q for _, q in QUESTIONS]
    assert all(len(line["answers"]) == 3 for line in lines)
    assert result.correct == [sum(a["correct"] for a in line["answers"]) for line in lines]


@pytest.mark.parametrize("kept", ["nothing", "part of the header", "the header", "half", "everything"])
def test_an_interrupted_evaluation_is_resumed(
    kept: str, model: Path, benchmark: Path, finished: tuple[bytes, Result], tmp_path: Path
) -> None:
    content, result = finished
    sizes = {
        "nothing": 0,
        "part of the header": 40,
        "the header": len(content.splitlines(keepends=True)[0]),
        "half": len(content) // 2,
        "everything": len(content),
    }
    file = tmp_path / "a.jsonl"
    file.write_bytes(content[: sizes[kept]])
    resumed, generators = evaluated(model, benchmark, tmp_path)
    assert resumed == result
    assert generators == (sizes[kept] < len(content))
    assert file.read_bytes() == content


def test_two_commands_do_not_answer_the_same_problems(model, benchmark, finished, tmp_path: Path) -> None:
    with (
        exclusive(tmp_path, DataError, name="a.jsonl"),
        pytest.raises(DataError, match=r"a\.jsonl is in use by another"),
    ):
        evaluated(model, benchmark, tmp_path)
    with exclusive(tmp_path, DataError, name="b.jsonl"):  # another model
        assert evaluated(model, benchmark, tmp_path) == (finished[1], 1)


def test_answers_with_other_settings_are_rejected(model, benchmark, finished, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(finished[0])
    with pytest.raises(DataError, match="was written with different settings"):
        evaluated(model, benchmark, tmp_path, temperature=0.5)


def test_a_damaged_result_file_keeps_its_valid_lines(model, benchmark, finished, tmp_path: Path, capsys) -> None:
    content, result = finished
    damaged = content.replace(b'"number": 2', b'"n": 2')
    (tmp_path / "a.jsonl").write_bytes(damaged)
    assert evaluated(model, benchmark, tmp_path) == (result, 1)
    assert "line 3 does not have the expected fields" in capsys.readouterr().err
    assert (tmp_path / "a.jsonl").read_bytes() == content
    assert (tmp_path / "a.jsonl.damaged-1").read_bytes() == damaged


def test_answers_to_another_benchmark_are_rejected(model, benchmark, finished, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(finished[0])
    benchmark.write_text(benchmark.read_text().replace("#### 2", "#### 5"))
    with pytest.raises(DataError, match="another problem in line 2"):
        evaluated(model, benchmark, tmp_path)


def test_two_models_are_compared(model: Path, finished: tuple[bytes, Result], tmp_path: Path) -> None:
    a = replace(finished[1], correct=[0, 0, 0, 0])
    b = type(a)(EvaluatedModel("b", model), 3, [3, 3, 3, 3], cut_off=0, tokens=12)
    text = table([a, b], [1, 2])
    assert "pass@1" in text
    assert "b − a: pass@1 +100.0 points" in text
    assert "exact paired test p = 0.125 (4 problems better, 0 worse, 0 equal)" in text
    write_summary(tmp_path / "summary.json", [a, b], [1, 2], {})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["models"]["b"]["pass@2"]["mean"] == 1
    assert summary["comparisons"][0]["p_value"] == 0.125


def test_models_are_labelled_by_directory(model: Path, tmp_path: Path) -> None:
    assert [m.label for m in find_models([model])] == ["a"]
    exported = tmp_path / "run" / "hf" / "step-00000014"
    exported.mkdir(parents=True)
    (exported / "config.json").write_text("{}")
    assert find_models([exported])[0].label == "run-step-00000014"


def test_two_models_with_the_same_name_are_rejected(model: Path) -> None:
    with pytest.raises(ConfigError, match="these are not unique: a, a"):
        find_models([model, model])


def test_a_missing_model_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model found at"):
        find_models([tmp_path / "nothing"])


def test_a_directory_without_a_checkpoint_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        find_models([tmp_path])


def test_a_prompt_format_without_the_question_is_rejected(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no \{prompt\}"):
        make_generator(model, SAMPLED, wrapper="Answer:")


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
TEMPLATES = {
    "{{ raise_exception('no system role') }}": "no system role",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ messages[99].role.x }}": "has no element 99",
    "{{ 2 ** 99999999999 }}": "OverflowError",
    "{{ 'a' * 10000000000000 }}": "OverflowError",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{{ " + "(" * 9000: "is not valid Jinja",
    LOOPS: "took longer than 0.5 seconds",
}


@pytest.mark.parametrize("source", TEMPLATES)
def test_a_malicious_chat_template_is_refused(source: str, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_engine, "_SECONDS", 0.5)
    edit_json(copy / "tokenizer_config.json", chat_template=source)
    with pytest.raises(CheckpointError, match=TEMPLATES[source]):
        cli.run(["generate", "--model", str(copy), "--system", "Be brief.", "7?"])
    with pytest.raises(CheckpointError, match=TEMPLATES[source]):
        make_generator(copy, SAMPLED, batch_size=4).answer(QUESTIONS)


def test_prompts_are_rendered_as_transformers_does(model: Path) -> None:
    tokenizer = load_in_transformers(model)[1]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " 7? "}]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ChatPrompts(tokenizer)(messages) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 2**31}, "num_hidden_layers must be at most 2,048"),
        ({"hidden_size": 2**40}, "hidden_size must be at most"),
        ({"text_config": {"num_hidden_layers": 2**31}}, "num_hidden_layers must be at most 2,048"),
        ({"vocab_size": 10**4000}, "vocab_size must be at most"),
        ({"hidden_size": []}, "transformers can load: Validation error"),
    ],
)
def test_an_absurd_model_is_refused(config: dict, message: str, copy: Path) -> None:
    edit_json(copy / "config.json", **config)
    with pytest.raises(CheckpointError, match=message):
        cli.run(["generate", "--model", str(copy), "7?"])


def test_a_prompt_beyond_the_context_is_refused(model: Path) -> None:
    with pytest.raises(DataError, match=r"a prompt has [\d,]+ tokens, but the context of .* has 256"):
        cli.run(["generate", "--model", str(model), "7" * 2000])
    with pytest.raises(DataError, match="Shorten the prompt"):
        TransformersGenerator(model, SAMPLED, batch_size=4).answer([*QUESTIONS, (5, "7" * 2000)])


@pytest.mark.parametrize("stops", [10**9, [-1, 10**9], [2, 10**9]])
def test_stop_tokens_that_the_model_cannot_write(stops: object, copy: Path) -> None:
    """Nor does a padding token that it has no embedding for do harm."""
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    expected = TransformersGenerator(copy, Sampling(max_new_tokens=4), batch_size=1).answer(QUESTIONS)
    assert TransformersGenerator(copy, Sampling(max_new_tokens=4), batch_size=4).answer(QUESTIONS) == expected


@pytest.mark.parametrize("stops", ["2", [[2]], {"a": 1}, 2.5, True])
def test_stop_tokens_of_no_type_are_refused(stops: object, copy: Path) -> None:
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    with pytest.raises(CheckpointError, match=r"eos_token_id|cannot be loaded by transformers"):
        cli.run(["generate", "--model", str(copy), "7?"])


def test_prompts_that_are_no_text_are_answered(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["generate", "--model", str(model), "--max-new-tokens", "2", "a\udcff", "\ud800b \x1b[2J"])
    assert "\x1b" not in capsys.readouterr().out
    (tmp_path / "b.jsonl").write_text('{"question": "a\\ud800", "answer": "1"}\n')
    assert evaluated(model, tmp_path / "b.jsonl", tmp_path)[0].samples == 3


@pytest.fixture
def base_model(model: Path, tmp_path: Path) -> Path:
    """A model whose tokenizer has no chat template."""
    (path := tmp_path / "base").mkdir()
    for file in model.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    tiny.hf_tokenizer(path, vocab_size=300, template=None)
    return path


def test_a_model_without_a_chat_template_needs_raw(base_model: Path) -> None:
    with pytest.raises(CheckpointError, match="has no chat template"):
        make_generator(base_model, SAMPLED)
    raw = make_generator(base_model, Sampling(max_new_tokens=3), wrapper="Question: {prompt}\nAnswer:", raw=True)
    assert len(raw.answer(QUESTIONS)) == 4


def test_a_pickle_is_not_loaded(base_model: Path) -> None:
    for file in base_model.glob("*.safetensors*"):
        file.unlink()
    torch.save({}, base_model / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be loaded by transformers"):
        make_generator(base_model, SAMPLED, raw=True)


def test_date_and_template_options_are_those_of_sharding(copy: Path, benchmark: Path, tmp_path: Path) -> None:
    clock = "{{ strftime_now('%Y') }} {{ tone }} {% for m in messages %}{{ m.content }}{% endfor %}"
    edit_json(copy / "tokenizer_config.json", chat_template=clock)
    one = ["--limit", "1", "--max-new-tokens", "2", "--output", str(tmp_path / "out")]
    ask = ["evaluate", "--model", str(copy), "--benchmark", str(benchmark), *one, "--date", "2031-02-03"]
    for _ in range(2):  # the second time from the file
        cli.run([*ask, "--template-option", 'tone="dry"'])
    header = json.loads((tmp_path / "out" / benchmark.stem / "copy.jsonl").read_text().splitlines()[0])
    assert header["settings"]["date"] == "2031-02-03" and header["settings"]["template_options"] == ['tone="dry"']
    with pytest.raises(DataError, match="different settings"):
        cli.run(ask)
    given = TemplateVariables("2031-02-03", (("tone", '"dry"'),))
    tokenizer = load_in_transformers(copy)[1]
    assert tokenizer.decode(PromptFormat(tokenizer, variables=given)("7?")) == "2031 dry 7?"
    for command, message in (
        ([*ask, "--raw"], "--raw uses none"),
        (["evaluate", "--model", str(copy), "--corpus", "c", "--date", "2031-02-03"], "there is no --benchmark"),
        (["generate", "--model", str(copy), "7?", "--template-option", "tone"], "not of the form NAME=VALUE"),
        (["generate", "--model", str(copy), "7?", "--date", "today"], "--date today is not a date"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            cli.run(command)
    edit_json(copy / "tokenizer_config.json", chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    for more in ([], ["--batch"]):
        with pytest.raises(ConfigError, match="does not ask for a date"):
            cli.run(["generate", "--model", str(copy), "7?", "--date", "2031-02-03", *more])
