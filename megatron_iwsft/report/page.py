"""Write one self-contained HTML page about one or several runs: curves, final metrics, and the difference between loss curves."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_iwsft.errors import DataError
from megatron_iwsft.objectives.metrics import METRICS
from megatron_iwsft.utils.files import write_text

# metric → title of its plot
_PLOTS = {metric.name: metric.title for metric in METRICS if metric.plotted}
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.3rem .8rem;border-bottom:1px solid #ddd;text-align:right}"
    "td:first-child,th:first-child{text-align:left}.plots{display:flex;flex-wrap:wrap}.plots svg{width:34rem;max-width:100%;height:auto}"
    "pre{background:#f6f6f6;padding:1rem;overflow-x:auto}"
)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read RUN/metrics.jsonl. Raises DataError if it is missing, damaged or empty."""
    path = run / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise DataError(f"{run} is not a run directory: it has no metrics.jsonl.") from None
    except ValueError:
        raise DataError(f"{path} is damaged: not every line is valid JSON.") from None
    if not lines:
        raise DataError(f"{path} is empty: the run has not finished a step.")
    return lines


def curve_difference(a: list[dict[str, Any]], b: list[dict[str, Any]], metric: str = "loss") -> float:
    """Largest relative difference of a metric over the steps that both runs have; NaN if any difference is NaN."""
    other = {line["step"]: line[metric] for line in b}
    pairs = [(line[metric], other[line["step"]]) for line in a if None not in (line[metric], other.get(line["step"]))]
    # np.max instead of max(): it propagates NaN.
    return float(np.max([abs(x - y) / abs(y) for x, y in pairs], initial=0.0))


def write_report(runs: Sequence[Path], output: Path) -> str:
    """Write the page and return a summary for the terminal."""
    metrics = {str(run): read_metrics(run) for run in runs}
    configs = {str(run): run / "config.yaml" for run in runs}
    rows = [
        [name, *(_last(lines, m) for m in ("step", "nll", "loss", "weight_mean", "weight_ess", "kl_to_reference"))]
        for name, lines in metrics.items()
    ]
    header = ["run", "steps", "nll", "loss", "weight mean", "effective sample size", "KL to reference"]
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
            f"<details><summary>config of {html.escape(name)}</summary><pre>{html.escape(path.read_text(encoding='utf-8'))}</pre></details>"
            for name, path in configs.items()
            if path.exists()
        ),
    ]
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(names[0])}</title><style>{_STYLE}</style>"
        + "\n".join(body)
    )


def _last(lines: list[dict[str, Any]], metric: str) -> str:
    value = lines[-1].get(metric)
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _plot(metric: str, metrics: dict[str, list[dict[str, Any]]]) -> str:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    for i, (name, lines) in enumerate(metrics.items()):
        for key, line_style in ((metric, "-"), *([("bound_sft", "--")] if metric == "bound_iw" else [])):
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    line_style,
                    color=f"C{i}",
                    label=name if line_style == "-" else None,
                    linewidth=1.2,
                )
    axes.set_title(_PLOTS[metric] + (" (dashed: SFT bound)" if metric == "bound_iw" else ""), fontsize=10)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    text = io.StringIO()
    figure.savefig(text, format="svg")
    pyplot.close(figure)
    return text.getvalue().partition("<svg")[1] + text.getvalue().partition("<svg")[2]
