"""Write one self-contained HTML page about one or several runs: curves, final metrics, and the difference between loss curves."""

from __future__ import annotations

import html
import importlib
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_iwsft.errors import ConfigError, DataError
from megatron_iwsft.objectives.metrics import METRICS
from megatron_iwsft.train.callbacks.metrics_file import METRICS_FILE, read_metrics_file
from megatron_iwsft.utils.files import write_text
from megatron_iwsft.utils.json_files import is_regular_file
from megatron_iwsft.utils.text import printable, printable_line, say

# metric → title of its plot
_PLOTS = {metric.name: metric.title for metric in METRICS if metric.plotted}
_PLOTTED = 1e100  # matplotlib cannot place ticks near the largest float
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.3rem .8rem;border-bottom:1px solid #ddd;text-align:right}"
    "td:first-child,th:first-child{text-align:left}.plots{display:flex;flex-wrap:wrap}.plots svg{width:34rem;max-width:100%;height:auto}"
    "pre{background:#f6f6f6;padding:1rem;overflow-x:auto}"
)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read RUN/metrics.jsonl, up to the first damaged line, which is reported on standard error.

    Raises DataError if it is missing or has no valid line.
    """
    path = run / METRICS_FILE
    try:
        lines, damage = read_metrics_file(path)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{run} is not a run directory: it has no {METRICS_FILE}. Give the run.dir of a config."
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from None
    if not lines:
        raise DataError(
            f"{path} is damaged: {damage}." if damage else f"{path} is empty: the run has not finished a step."
        )
    if damage:
        say(f"{path} is damaged: {damage}. The {len(lines):,} lines before it are shown.", error=True)
    return lines


def _number(value: Any) -> float | None:
    """A metric's value, if it is a finite number."""
    try:
        number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def curve_difference(a: list[dict[str, Any]], b: list[dict[str, Any]], metric: str = "loss") -> float:
    """Largest relative difference of a metric over the steps where both runs have a finite value; 0 if there are none."""
    other = {line["step"]: _number(line.get(metric)) for line in b}
    pairs = [(_number(line.get(metric)), other.get(line["step"])) for line in a]
    differences = [abs(x - y) / abs(y) if x != y else 0.0 for x, y in pairs if x is not None and y]
    differences += [math.inf for x, y in pairs if x and y == 0]
    return max(differences, default=0.0)


def write_report(runs: Sequence[Path], output: Path) -> str:
    """Write the page and return a summary for the terminal."""
    metrics = {printable_line(str(run)): read_metrics(run) for run in runs}
    configs = {printable_line(str(run)): run / "config.yaml" for run in runs}
    rows = [
        [name, *(_last(lines, m) for m in ("step", "nll", "loss", "weight_mean", "weight_ess", "weighted_log_ratio"))]
        for name, lines in metrics.items()
    ]
    header = ["run", "steps", "nll", "loss", "weight mean", "effective sample size", "weighted log-ratio"]
    summary = [
        "  ".join(f"{cell:>{max(len(h), 10)}}" for cell, h in zip(row, header, strict=True)) for row in [header, *rows]
    ]
    names = list(metrics)
    differences = [
        f"{name} and {names[0]}: loss curves at most {curve_difference(metrics[name], metrics[names[0]]):.2e} apart (relative)"
        for name in names[1:]
        if metrics[name][0].keys() == metrics[names[0]][0].keys()  # the same objective
    ]
    write_text(output, _page(metrics, configs, header, rows, differences))
    return "\n".join(summary + differences)


def _page(
    metrics: dict[str, list[dict[str, Any]]],
    configs: dict[str, Path],
    header: list[str],
    rows: list[list[str]],
    differences: list[str],
) -> str:
    """The HTML page. metrics, configs: by run name; header, rows: the table of final metrics."""
    names = list(metrics)
    shown = [m for m in _PLOTS if any(m in line for lines in metrics.values() for line in lines)]
    body = [
        f"<h1>{html.escape(' · '.join(names))}</h1>",
        "<table><tr>" + "".join(f"<th>{h}</th>" for h in header) + "</tr>",
        *("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows),
        "</table>",
        *(f"<p>{html.escape(text)}</p>" for text in differences),
        '<div class="plots">',
        *(_plot(metric, metrics) for metric in shown),
        "</div>",
        *(
            f"<details><summary>config of {html.escape(name)}</summary><pre>{html.escape(_content(path))}</pre></details>"
            for name, path in configs.items()
            if is_regular_file(path)
        ),
    ]
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(names[0])}</title><style>{_STYLE}</style>"
        + "\n".join(body)
    )


def _content(path: Path) -> str:
    return printable(path.read_bytes().decode("utf-8", "replace"))


def _last(lines: list[dict[str, Any]], metric: str) -> str:
    value = lines[-1].get(metric)
    number = _number(value)
    return "–" if number is None else f"{value:,}" if isinstance(value, int) else f"{number:.4g}"


def pyplot() -> Any:
    """matplotlib.pyplot, drawing SVG. Raises ConfigError where matplotlib, an optional package, is missing."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError(
            "plots need matplotlib, which is not installed: pip install matplotlib (or the package's extra: pip install -e '.[report]')."
        ) from None
    matplotlib.use("svg")
    return importlib.import_module("matplotlib.pyplot")


def _plot(metric: str, metrics: dict[str, list[dict[str, Any]]]) -> str:
    figure, axes = pyplot().subplots(figsize=(6, 3.2), layout="constrained")
    curves: dict[str, Any] = {}  # run → its first curve
    for i, (name, lines) in enumerate(metrics.items()):
        for key, line_style in ((metric, "-"), *([("bound_sft", "--")] if metric == "bound_iw" else [])):
            numbers = ((line["step"], _number(line.get(key))) for line in lines)
            points = [(step, value) for step, value in numbers if value is not None and abs(value) < _PLOTTED]
            if points:
                (curve,) = axes.plot(*zip(*points, strict=True), line_style, color=f"C{i}", linewidth=1.2)
                curves.setdefault(name, curve)
    axes.set_title(_PLOTS[metric] + (" (dashed: SFT bound)" if metric == "bound_iw" else ""), fontsize=10)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    legend = axes.legend(curves.values(), [str(i) for i in range(len(curves))], fontsize=8, frameon=False)
    for label, name in zip(legend.get_texts(), curves, strict=True):  # a label would be left out if it started with _
        label.set_parse_math(False)
        label.set_text(name)
    text = io.StringIO()
    figure.savefig(text, format="svg")
    pyplot().close(figure)
    return text.getvalue().partition("<svg")[1] + text.getvalue().partition("<svg")[2]
