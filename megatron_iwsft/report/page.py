"""Write one self-contained HTML page about one or several runs: the verdict first, then curves, weights, answers and events."""

from __future__ import annotations

import base64
import functools
import gzip
import statistics
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import orjson
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from megatron_iwsft.errors import ConfigError
from megatron_iwsft.report.charts import sections
from megatron_iwsft.report.held_out import find_benchmarks, percent, shown_problems
from megatron_iwsft.report.run_record import RunRecord, config_differences, read_runs
from megatron_iwsft.report.trajectories import extreme_trajectories, shades
from megatron_iwsft.utils.files import write_text
from megatron_iwsft.utils.text import printable
from megatron_iwsft.version import __version__

# Readable on white and on black. Shares: of weights below 1, about 1 and above.
_COLOURS = {
    "runs": ["#3b82d6", "#d9730d", "#2a9d6f", "#9a5fd0", "#c8436b", "#7a7f87"],
    "groups": ["#9a5fd0", "#2a9d6f", "#c8436b", "#b59a00", "#00959c", "#7a7f87", "#3b82d6", "#d9730d"],
    "shares": ["#1f4e9c", "#3b74c4", "#6a9bdc", "#9dbfe8", "#b4bac2", "#d8bd97", "#f0b26b", "#e58a3c", "#cc5a1f", "#98350f"],
}  # fmt: skip
_MOST_EVENTS = 200
_COUNTED = {
    "resumed": "resumed",
    "skipped": "step skipped",
    "rewind": "rewound",
    "spike": "loss spiked",
}  # event → in words


def write_report(
    directories: Sequence[Path],
    output: Path,
    *,
    evaluations: Sequence[Path] | None = None,
    trajectories: int = 0,
) -> str:
    """Write the page and return a summary for the terminal.

    evaluations   output directories of `iwsft evaluate`; by default those in and beside the runs
    trajectories  number of each iw-SFT run's trajectories that are scored to find those with extreme weights; needs torch

    Raises DataError if a directory is not a run's, ConfigError if Plotly is not installed.
    """
    runs = read_runs(list(directories))
    benchmarks = find_benchmarks(runs, evaluations)
    facts = [row for row in (_fact(runs, title, of) for title, of in _FACTS) if row is not None]
    weighted = [run for run in runs if run.values("weight_ess")] if trajectories else []
    topics = sections(runs, benchmarks)
    charts = [chart.data() for section in topics for chart in section.charts]
    verdict = _verdict(runs)
    page = _template().render(
        title=" · ".join(run.name for run in runs),
        version=__version__,
        runs=runs,
        benchmarks=benchmarks,
        percent=percent,
        verdict=verdict,
        facts=facts,
        differences=config_differences(runs) if len(runs) > 1 else [],
        sections=topics,
        samples=[(benchmark.name, shown_problems(benchmark)) for benchmark in benchmarks],
        extremes=[extreme_trajectories(run, trajectories) for run in weighted],
        shades=shades(),
        events=_events(runs),
        colours=_COLOURS,
        colours_json=_json(_COLOURS),
        charts_json=_json(charts),
        plotly=Markup(_plotly()) if charts else "",
        css=_asset("page.css"),
        js=_asset("page.js"),
    )
    write_text(output, page)
    said = [s for benchmark in benchmarks for s in (f"{benchmark.name}:", *benchmark.sentences())] or verdict
    return "\n".join(
        [*_table([["", *(run.name for run in runs)], *([title, *cells] for title, cells in facts)]), *said]
    )


def _template() -> Any:
    """Everything that is inserted is escaped: HTML by Jinja, control characters as everywhere else."""

    def shown(value: Any) -> Any:
        return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        autoescape=True, finalize=shown, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_asset("page.html.j2"))


def _asset(name: str) -> Markup:
    """A file of this package, which is inserted as it is."""
    return Markup(resources.files("megatron_iwsft.report").joinpath("assets", name).read_text(encoding="utf-8"))


def _json(value: Any) -> Markup:
    """JSON for a <script> element, which only "</script" and "<!--" could end or change."""
    text = printable(orjson.dumps(value).decode()).replace("<", "\\u003c").replace("\n", " ")
    return Markup(text)


@functools.cache
def _plotly() -> str:
    """Plotly's JavaScript, compressed: a third of its size. Raises ConfigError where it is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ConfigError(
            "the report's charts need plotly, which is not installed: pip install plotly (or the extra: pip install -e '.[report]')."
        ) from None
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 6, mtime=0)).decode("ascii")


def _verdict(runs: Sequence[RunRecord]) -> list[str]:
    """What can be said of the runs without a benchmark."""
    sets = [name for name in runs[0].held_out_nll if all(name in run.held_out_nll for run in runs)]
    held_out = {run.name: run.held_out_nll[sets[0]] for run in runs if sets}
    on = f" on {sets[0]}" if sets and sets[0] else ""
    how = "`iwsft evaluate --model RUN… --benchmark FILE.jsonl` compares the runs problem by problem; repeat this command then."
    if len(held_out) < 2:
        said = [f"{name}: held-out negative log-likelihood{on} {nll:.4f} per token." for name, nll in held_out.items()]
        return [*said, "No held-out comparison yet: curves of training batches do not say which run is better.", how]
    best, *others = sorted(held_out, key=held_out.__getitem__)
    gaps = "; ".join(f"{name} {held_out[name]:.4f}" for name in others)
    return [
        f"{best} has the lowest held-out negative log-likelihood{on}: {held_out[best]:.4f} per token ({gaps}).",
        "One number per run says nothing about noise: runs with another seed would show how far it varies.",
        how,
    ]


def _fact(runs: Sequence[RunRecord], title: str, of: Callable[[RunRecord], str | None]) -> tuple[str, list[str]] | None:
    """A row of the table of runs; None if no run has it."""
    cells = [of(run) for run in runs]
    return (title, [cell if cell is not None else "–" for cell in cells]) if any(cells) else None


def _objective(run: RunRecord) -> str | None:
    s = run.settings
    if "objective.name" not in s:
        return None
    if not run.values("weight_mean"):
        return str(s["objective.name"])
    text = f"{s['objective.name']}, level {s.get('objective.level')}, τ = {s.get('objective.temperature')}"
    return f"{text}, clip {s['objective.clip']}" if s.get("objective.clip") else text


def _state(run: RunRecord) -> str | None:
    kinds = [event["event"] for event in run.events]
    counts = {said: kinds.count(kind) for kind, said in _COUNTED.items()}
    last = next((kind for kind in reversed(kinds) if kind in ("finished", "stopped")), "not finished")
    more = [f"{said} {count} time{'s' * (count > 1)}" for said, count in counts.items() if count]
    return ", ".join([last, *more]) if kinds else None


def _recent(metric: str, form: str = ".4f") -> Callable[[RunRecord], str | None]:
    def shown(run: RunRecord) -> str | None:
        value = run.recent(metric)
        return None if value is None else format(value, form)

    return shown


def _held_out(run: RunRecord) -> str | None:
    return ", ".join(f"{name} {nll:.4f}".strip() for name, nll in run.held_out_nll.items()) or None


def _speed(run: RunRecord) -> str | None:
    values = [value for _, value in run.values("tokens_per_s")]
    return f"{statistics.median(values):,.0f} tokens/s" if values else None


def _duration(run: RunRecord) -> str | None:
    seconds = sum(value for _, value in run.values("step_time_s"))
    minutes, hours = seconds / 60, seconds / 3600
    return (
        None
        if not seconds
        else f"{seconds:.0f} s"
        if minutes < 2
        else f"{minutes:.0f} min"
        if hours < 2
        else f"{hours:.1f} h"
    )


def _tokens(run: RunRecord) -> str | None:
    count = sum(value for _, value in run.values("trained_tokens"))
    return f"{count:,.0f}" if count else None


_FACTS: list[tuple[str, Callable[[RunRecord], str | None]]] = [
    ("objective", _objective),
    ("steps", lambda run: f"{run.metrics[-1]['step']:,}"),
    ("state", _state),
    ("trained tokens", _tokens),
    ("nll per token, last tenth of the steps", _recent("nll")),
    ("held-out nll per token, last", _held_out),
    ("mean weight, last tenth", _recent("weight_mean", ".3g")),
    ("effective sample size, last tenth", _recent("weight_ess", ".1%")),
    ("weights at the clip, last tenth", _recent("clip_fraction", ".1%")),
    ("time in steps", _duration),
    ("speed, median", _speed),
]


def _events(runs: Sequence[RunRecord]) -> list[tuple[str, dict[str, Any]]]:
    """(run, event) by time; the last `_MOST_EVENTS`."""
    found = [(run.name, event) for run in runs for event in run.events]
    return sorted(found, key=lambda pair: str(pair[1].get("time", "")))[-_MOST_EVENTS:]


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
