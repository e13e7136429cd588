"""The report: what it says about runs, what it leaves out, and what a browser makes of it."""

from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_iwsft.errors import DataError
from megatron_iwsft.objectives.metrics import METRICS, WEIGHT_BINS
from megatron_iwsft.report.charts import smoothed, thinned
from megatron_iwsft.report.page import write_report
from tests.support.browser import Browser, chromium_is_installed
from tests.support.reported_run import EVENTS, STEPS, groups, reported_run
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
    """The text of a page's <main>, the names and classes of its elements, and what its figures are called."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.text, self.tags, self.classes, self.captions = "", [], set(), []
        self.feed(page.read_text().split("<main>")[1].split("</main>")[0])

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.classes |= set((dict(attrs).get("class") or "").split())

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.tags and self.tags[-1] == "figcaption" and data.strip():
            self.captions.append(data)


@pytest.fixture
def two_runs(tmp_path: Path) -> list[Path]:
    runs = [write_run(tmp_path / "sft"), write_run(tmp_path / "iw-sft", weighted=True, dtype="fp32", source=HOSTILE)]
    problems = tmp_path / "evaluation" / "sums"
    write_answers(problems, "base", Path("/models/base"), [False] * 40)
    write_answers(problems, "sft", runs[0] / "hf" / "step-00000120", [n % 4 == 0 for n in range(40)])
    write_answers(problems, "iw-sft-early", runs[1] / "hf" / "step-00000060", [n % 4 == 0 for n in range(40)])
    write_answers(problems, "iw-sft", runs[1] / "hf" / "step-00000120", [n % 4 != 0 for n in range(40)], HOSTILE)
    return runs


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two runs that have all that it can show, with held-out answers and weighed trajectories."""
    directory = tmp_path_factory.mktemp("runs")
    runs = [write_run(directory / "sft", source=HOSTILE), reported_run(directory / "iw-sft")]
    for run, every in zip(runs, (4, 1), strict=True):
        model = run / "hf" / f"step-{STEPS:08d}"
        write_answers(directory / "evaluation" / "sums", run.name, model, [n % every == 0 for n in range(40)], HOSTILE)
    write_report(runs, directory / "report.html", trajectories=8)
    return directory / "report.html"


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


def test_everything_that_runs_log_is_on_the_page(everything: Path) -> None:
    main = Main(everything)
    titles = {metric.name: metric.title.replace("memory, bytes", "memory, GB") for metric in METRICS}
    expected = {titles[metric.name] for metric in METRICS if metric.plotted}
    expected |= {titles[name] for name in ("mfu", "peak_memory_bytes", "skipped_steps", "step_time_s")}
    expected |= {"distribution of the weights, iw-sft", "where the time of a step goes, iw-sft"}
    for kind in ("source", "score", "corpus"):
        expected.add(f"{titles['nll']}, by {kind}, iw-sft")
        expected |= {f"held out: {titles[name]}, by {kind}, iw-sft" for name in ("nll", "weight_mean", "log_ratio")}
    assert expected - set(main.captions) == set()
    assert len(main.captions) == main.tags.count("figure"), "a figure without a caption"
    drawn = json.loads(re.search(r'id="charts">(.*?)</script>', everything.read_text(), re.S)[1])
    assert len(drawn) == len(main.captions) and all(chart["series"][0]["x"] for chart in drawn)
    for group in groups():
        assert group.partition(" ")[2] in main.text
    for event, text in EVENTS.items():
        assert f"iw-sft{event}{text}" in main.text
    assert "finished, resumed 1 time, step skipped 1 time, rewound 1 time, loss spiked 1 time" in main.text
    assert "Samples while iw-sft trained" in main.text and "What is 2 × 17?" in main.text


def test_tokens_are_shaded_by_their_log_ratio(everything: Path) -> None:
    main = Main(everything)
    assert {f"{sign}{size}" for sign in "pn" for size in (1, 2, 3, 4)} | {"context", "swatch"} <= main.classes
    assert "By the sum of the log-ratios" in main.text and "of 8 of the corpus's 8 trajectories" in main.text
    weights = [float(found) for found in re.findall(r"([-+.\de]+) × as likely as under the reference", main.text)]
    assert len(weights) == 8 and min(weights[:4]) > max(weights[4:])
    assert weights == [*sorted(weights[:4], reverse=True), *sorted(weights[4:])]


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


UNREADABLE = (Path(__file__).parent / "unreadable.js").read_text()
BACKGROUNDS = """
  return ["body", ".card", "figure", "nav"].map((name) => getComputedStyle(document.querySelector(name)).backgroundColor
    .match(/[0-9]+/g).slice(0, 3).reduce((sum, v) => sum + Number(v), 0) / 765);
"""
CONTROLS = """
  return [...document.querySelectorAll("nav, summary, button, input, select")].filter((e) => e.checkVisibility()).length;
"""


@pytest.mark.command
@pytest.mark.skipif(not chromium_is_installed(), reason="needs chromium and chromedriver (Debian: chromium-driver)")
def test_the_page_in_a_browser(everything: Path) -> None:
    """At three widths, light, dark and printed: charts are drawn, text can be read, the console is silent, nothing is too wide."""
    with Browser() as browser:
        for width, scheme, media in [
            *((width, scheme, "screen") for width in (375, 768, 1280) for scheme in ("light", "dark")),
            (794, "light", "print"),
            (794, "dark", "print"),
        ]:
            where = f"{width} pixels, {scheme}, {media}"
            browser.open(everything, width=width, scheme=scheme, media=media)
            assert browser.errors() == [], where
            assert browser.evaluate("return document.documentElement.scrollWidth") <= width, where
            assert browser.evaluate("return document.querySelectorAll('.plot:not(:has(.main-svg))').length") == 0, where
            assert browser.evaluate(UNREADABLE) == [], where
            brightness = browser.evaluate(BACKGROUNDS)
            dark = scheme == "dark" and media == "screen"
            assert max(brightness) < 0.15 if dark else min(brightness) > 0.9, f"{where}: {brightness}"
            shown = browser.evaluate(CONTROLS)
            assert shown == 0 if media == "print" else shown > 0, where
        assert browser.evaluate("return document.title") == "sft · iw-sft"
        browser.print(everything.with_suffix(".pdf"))
        assert browser.errors() == [] and everything.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
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
