"""The report: what it says about runs, what it leaves out, and what a browser makes of it."""

from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_iwsft.errors import DataError
from megatron_iwsft.objectives.metrics import WEIGHT_BINS
from megatron_iwsft.report.charts import smoothed, thinned
from megatron_iwsft.report.page import write_report
from tests.support.browser import Browser, chromium_is_installed
from tests.support.tiny import write_jsonl

HOSTILE = '$x$ <b>&amp;"</script><script>alert(1)</script>\x1b[31m %{y} \u202e'


def write_run(
    directory: Path, *, weighted: bool = False, steps: int = 120, source: str = "math", **config: str
) -> Path:
    """A run directory with metrics, config and events."""
    (directory / "logs").mkdir(parents=True)
    rows = []
    for step in range(1, steps + 1):
        row = {"step": step, "loss": 2.0 / step, "nll": 2.0 / step + 0.1 * (step % 2), "lr": 1e-3, "tokens_per_s": 5e3}
        row |= {"step_time_s": 0.5, "trained_tokens": 100, f"nll/source {source}": 1.0, "nll/source web": 2.0}
        row |= {"data_s": 0.1, "forward_backward_s": 0.3, "optimizer_s": 0.1}
        if step % 40 == 0:
            row |= {"eval/web/nll": 1.0 / step, "eval/web/nll/source a/b": 1.0, "eval/web/nll/source c": 2.0}
        if weighted:
            shares = [1.0 / (len(WEIGHT_BINS) + 1)] * (len(WEIGHT_BINS) + 1)
            row |= {"weight_mean": 1.5, "weight_ess": 0.4, "clip_fraction": 0.0, "weight_histogram": shares}
        rows.append(row)
    write_jsonl(directory / "metrics.jsonl", rows)
    settings = {"run": {"name": directory.name, "seed": 1}, "optimizer": {"lr": 1e-3}} | {"model": config}
    (directory / "config.yaml").write_text(json.dumps(settings))
    event = {"time": "2026-01-02T03:04:05+0000", "event": "resumed", "text": f"resuming {source}"}
    write_jsonl(directory / "logs" / "events.jsonl", [event])
    return directory


def write_answers(folder: Path, label: str, model: Path, right: list[bool], text: str = "42") -> None:
    """What `iwsft evaluate` stores of one model."""
    folder.mkdir(parents=True, exist_ok=True)
    header = {"format_version": 1, "model": str(model), "weights": "w", "settings": {"temperature": 0.0}}
    answers = [
        {"number": n, "prompt": f"{n}?", "answer": "\\boxed{42}"}
        | {"answers": [{"text": text, "tokens": 2, "cut_off": False, "correct": correct}]}
        for n, correct in enumerate(right, 1)
    ]
    write_jsonl(folder / f"{label}.jsonl", [header, *answers])


class Main(HTMLParser):
    """The text of a page's <main>, and the names of its elements."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.text, self.tags = "", []
        self.feed(page.read_text().split("<main>")[1].split("</main>")[0])

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def two_runs(tmp_path: Path) -> list[Path]:
    runs = [write_run(tmp_path / "sft"), write_run(tmp_path / "iw-sft", weighted=True, dtype="fp32", source=HOSTILE)]
    problems = tmp_path / "evaluation" / "sums"
    write_answers(problems, "base", Path("/models/base"), [False] * 40)
    write_answers(problems, "sft", runs[0] / "hf" / "step-00000120", [n % 4 == 0 for n in range(40)])
    write_answers(problems, "iw-sft-early", runs[1] / "hf" / "step-00000060", [n % 4 == 0 for n in range(40)])
    write_answers(problems, "iw-sft", runs[1] / "hf" / "step-00000120", [n % 4 != 0 for n in range(40)], HOSTILE)
    return runs


def test_the_verdict_is_of_held_out_answers(two_runs: list[Path], tmp_path: Path) -> None:
    summary = write_report(two_runs, tmp_path / "report.html")
    assert "iw-sft answers 75.0 % right, sft 25.0 %: +50.0 points" in summary and "This is not noise" in summary
    text = Main(tmp_path / "report.html").text
    assert text.index("iw-sft answers 75.0 % right") < text.index("Loss") and "base" in text
    assert "share of 40 held-out problems" in text and "share of right answers, sums" in text
    assert "Settings that differ" in text and "model.dtype" in text and "optimizer.lr" not in text.split("Config of")[0]
    assert (
        "2026-01-02 03:04:05sft" in text and "resumed 1 time" in text and "distribution of the weights, iw-sft" in text
    )


def test_what_each_run_evaluated_itself_is_compared(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "sft"), write_run(tmp_path / "iw-sft", weighted=True)]
    for run, every in zip(runs, (4, 1), strict=True):
        for step in (0, 120):
            folder, label = run / "evaluation" / "sums", f"step-{step:08d}"
            write_answers(folder, label, run / "hf" / label, [step > 0 and n % every == 0 for n in range(40)])
    summary = write_report(runs, tmp_path / "report.html")
    assert summary.count("sums:") == 1 and "iw-sft answers 100.0 % right, sft 25.0 %" in summary
    for answers in (runs[1] / "evaluation" / "sums").iterdir():
        answers.write_text(answers.read_text().replace('"1?"', '"another?"'))
    assert write_report(runs, tmp_path / "report.html").count("sums:") == 2  # other problems under the same name


def test_shares_are_of_the_problems_that_all_have_answered(two_runs: list[Path], tmp_path: Path) -> None:
    answered = [n % 4 != 0 for n in range(40)]
    write_answers(tmp_path / "evaluation" / "sums", "iw-sft", two_runs[1] / "hf" / "step-00000120", answered[:20])
    write_answers(tmp_path / "evaluation" / "words", "sft", two_runs[0] / "hf" / "step-00000120", [True], "forty-two")
    summary = write_report(two_runs, tmp_path / "report.html")
    assert "iw-sft answers 75.0 % right, sft 25.0 %: +50.0 points" in summary
    text = Main(tmp_path / "report.html").text
    assert "share of 20 held-out problems" in text and "25.0 % [" in text
    assert "forty-two" in text[text.index("Sample answers") :], "answers of every benchmark"


def test_a_difference_that_may_be_chance_is_called_so(two_runs: list[Path], tmp_path: Path) -> None:
    model = two_runs[1] / "hf" / "step-00000120"
    write_answers(tmp_path / "evaluation" / "sums", "iw-sft", model, [n % 4 == 0 or n == 1 for n in range(40)])
    summary = write_report(two_runs, tmp_path / "report.html")
    assert "iw-sft answers 27.5 % right, sft 25.0 %" in summary and "This may be noise" in summary


def test_what_is_not_there_is_left_out(tmp_path: Path) -> None:
    summary = write_report([write_run(tmp_path / "sft", steps=30)], tmp_path / "report.html")
    assert "No held-out comparison yet" in summary
    text = Main(tmp_path / "report.html").text
    for heading in (
        "Importance weights",
        "Evaluation in the run",
        "Sample answers",
        "Settings that differ",
        "Trajectories",
    ):
        assert heading not in text


def test_curves_by_topic(two_runs: list[Path], tmp_path: Path) -> None:
    write_report(two_runs, tmp_path / "report.html")
    text = Main(tmp_path / "report.html").text
    nll = "negative log-likelihood per trained token"
    for run in ("sft", "iw-sft"):
        for title in (f"{nll}, by source", f"web: {nll}, by source", "where the time of a step goes"):
            assert f"\n{title}, {run}\n" in text
    assert f"\nweb: {nll}\n" in text and "a/b" in text and "web 0.0083" in text


def test_text_from_files_is_escaped(two_runs: list[Path], tmp_path: Path) -> None:
    write_report(two_runs, tmp_path / "report.html")
    page, main = (tmp_path / "report.html").read_text(), Main(tmp_path / "report.html")
    assert "\x1b" not in page and "\u202e" not in page
    assert "script" not in main.tags and "alert(1)</script>" not in page
    assert HOSTILE.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e") in main.text
    charts = re.search(r'id="charts">(.*?)</script>', page, re.S)
    assert charts and "<" not in charts[1] and json.loads(charts[1])


def test_the_page_loads_nothing(two_runs: list[Path], tmp_path: Path) -> None:
    write_report(two_runs, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", page) and "@import" not in page
    assert len(page) < 3_000_000


def test_trajectories_need_an_export(two_runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no Hugging Face export.*export\.at_end"):
        write_report(two_runs, tmp_path / "report.html", trajectories=5)


def test_smoothing_keeps_a_mean_and_thinning_keeps_a_spike() -> None:
    values = [float(i % 2) for i in range(3000)]
    assert smoothed(values)[1500] == pytest.approx(0.5, abs=0.01) and smoothed(values[:20]) == values[:20]
    straight = [2.0 * i for i in range(500)]
    assert smoothed(straight) == pytest.approx(straight)
    deviations = [0.0] * 5000
    deviations[1234] = 9.0
    kept = thinned(deviations)
    assert 1234 in kept and kept[0] == 0 and kept[-1] == 4999 and len(kept) <= 800 and kept == sorted(set(kept))


@pytest.mark.command
@pytest.mark.skipif(not chromium_is_installed(), reason="needs chromium and chromedriver (Debian: chromium-driver)")
def test_the_page_in_a_browser(two_runs: list[Path], tmp_path: Path) -> None:
    """At three widths and in both colour schemes: every chart is drawn, the console is silent, nothing is wider than the window."""
    page = tmp_path / "report.html"
    write_report(two_runs, page)
    with Browser() as browser:
        for width, scheme in [(375, "light"), (375, "dark"), (768, "dark"), (1280, "light")]:
            browser.open(page, width=width, scheme=scheme)
            assert browser.errors() == []
            assert browser.evaluate("return document.documentElement.scrollWidth") <= width
            assert browser.evaluate("return document.querySelectorAll('.plot:not(:has(.main-svg))').length") == 0
            light = browser.evaluate("return getComputedStyle(document.body).backgroundColor") == "rgb(246, 247, 249)"
            assert light == (scheme == "light")
        assert browser.evaluate("return document.title") == "sft · iw-sft"
        ranges = browser.evaluate("return [...document.querySelectorAll('.plot')].map((p) => p.layout.yaxis.range)")
        assert [0, 2e-3] in ranges, "around the constant learning rate"


def test_damaged_answers_are_left_out(tmp_path: Path) -> None:
    run, folder = write_run(tmp_path / "run", steps=3), tmp_path / "run" / "evaluation" / "sums"
    write_answers(folder, "step-00000002", run / "hf" / "step-00000002", [True])
    (run / "samples").mkdir()
    for number, content in enumerate(
        [
            '{"step": 1e999, "pass@1": {"mean": 1.0}}',
            '{"step": 2, "pass@1": {"mean": 1' + "0" * 400 + "}}",
            '{"step": 2, "pass@1": [1]}',
            '{"step":' * 99_999,
            "[]",
        ]
    ):
        (folder / f"step-0000000{number}.json").write_text(content)
    os.mkfifo(folder / "step-00000009.json")
    os.mkfifo(run / "samples" / "step-00000009.jsonl")
    sample = {"step": 1, "number": 1, "text": "seven", "weight": 1.5}
    odd = ({"number": "a"}, {"number": 10**400}, {"weight": "heavy"}, {"weight": 10**400}, {"text": 3})
    for number, change in enumerate(odd):
        write_jsonl(run / "samples" / f"step-0000000{number}.jsonl", [sample, sample | change])
    write_report([run], tmp_path / "report.html")
    assert Main(tmp_path / "report.html").text.count("seven") == len(odd)


@pytest.mark.parametrize("change", [{"temperature": "hot"}, {"temperature": [1]}, {"temperature": None}])
def test_settings_of_no_type_are_shown(change: dict, tmp_path: Path) -> None:
    run, folder = write_run(tmp_path / "run", steps=3), tmp_path / "run" / "evaluation" / "sums"
    write_answers(folder, "step-00000002", run / "hf" / "step-00000002", [True, True])
    header, first, second = [json.loads(line) for line in (folder / "step-00000002.jsonl").read_text().splitlines()]
    # Nor do all problems have the same number of answers.
    write_jsonl(
        folder / "step-00000002.jsonl",
        [header | {"settings": change}, first, second | {"answers": second["answers"] * 3}],
    )
    write_report([run], tmp_path / "report.html")
    assert "1 answer per problem" in Main(tmp_path / "report.html").text


def test_a_config_of_aliases_is_not_unfolded(tmp_path: Path) -> None:
    run, other = write_run(tmp_path / "run", steps=3), write_run(tmp_path / "other", steps=3)
    many = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 20))
    for text in ("a: &a {b: *a}\n", f"a0: &a0 [1]\n{many}", "a: 2026-13-45\n"):
        (run / "config.yaml").write_text(text)
        write_report([run, other], tmp_path / "report.html")
