"""The tables and the figure of tools/bench/learning.py."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from megatron_iwsft.evaluate.statistics import student_interval

Result = Mapping[str, Any]
COLUMNS = {"exact": "exact", "cool": "temperature 0.5", "greedy": "greedy"}
_COLOURS = {"exact": "#1f77b4", "greedy": "#ff7f0e"}
_LEFT, _WIDTH, _ROW = 250, 400, 17  # of the figure, in pixels: labels, axis, height of a row


def by_objective(results: Iterable[Result]) -> dict[str, list[Result]]:
    out: dict[str, list[Result]] = {}
    for result in results:
        out.setdefault(result["objective"], []).append(result)
    return out


def table(title: str, reference: Result, results: Sequence[Result]) -> str:
    """Markdown: for each objective its learning rate, accuracies in percent, their difference to SFT, and the effective sample size.

    results  those of one experiment, without the development seed's. Accuracies: mean ± standard deviation over seeds. Differences:
             paired by seed, with 95 % intervals.
    """
    rows = by_objective(results)
    baseline = {r["seed"]: r["exact"] for r in rows["SFT"]}
    right, seeds = 100 * statistics.fmean(r["right"] for r in results), len(baseline)
    out = [
        f"{title}; {right:.1f} % of what is trained on is right; {seeds} seed{'s' * (seeds > 1)}.",
        "",
        f"| objective | lr | {' | '.join(COLUMNS.values())} | exact, minus SFT (95 %) | ESS |",
        "|---" * (len(COLUMNS) + 4) + "|",
        f"| reference | | {' | '.join(f'{100 * reference[c]:.1f}' for c in COLUMNS)} | | |",
    ]
    for name, found in rows.items():
        cells = [name, f"{found[0]['lr']:g}", *(percent([r[column] for r in found]) for column in COLUMNS)]
        cells.append("" if name == "SFT" else difference([r["exact"] - baseline[r["seed"]] for r in found]))
        sizes = [r["ess"] for r in found if not math.isnan(r.get("ess", math.nan))]
        cells.append(f"{statistics.fmean(sizes):.2f}" if sizes else "")
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def percent(values: Sequence[float]) -> str:
    """Mean and standard deviation in percent; of a single value only itself."""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread}"


def difference(values: Sequence[float]) -> str:
    """Mean and 95 % interval by Student's t, in points; of a single value only itself."""
    mean, half = student_interval([100 * value for value in values])
    return f"{mean:+.1f}" + ("" if math.isnan(half) else f" ± {half:.1f}")


def figure(panels: Sequence[Mapping[str, Any]]) -> str:
    """SVG of the arguments of several tables: the exact and the greedy accuracy of every objective, with 95 % intervals."""
    out, y = [], 34
    for panel in panels:
        title, reference, results = panel["title"], panel["reference"], panel["results"]
        top = y + 24
        rows = by_objective(results)
        bottom = top + _ROW * len(rows)
        out.append(f'<text x="8" y="{y + 12}" font-weight="bold">{escape(title)}</text>')
        for tick in range(0, 101, 20):
            out.append(f'<path d="M{_x(tick)} {top}V{bottom}" stroke="#ddd"/>')
            out.append(f'<text x="{_x(tick)}" y="{bottom + 13}" text-anchor="middle">{tick}</text>')
        for column, colour in _COLOURS.items():
            x = _x(100 * reference[column])
            out.append(f'<path d="M{x} {top}V{bottom}" stroke="{colour}" stroke-dasharray="2 3"/>')
        for row, (name, found) in enumerate(rows.items()):
            middle, label = top + _ROW * (row + 0.5), f"{name}, lr {found[0]['lr']:g}"
            marks = (
                _mark([100 * r[column] for r in found], middle + 4 * place - 2, colour)
                for place, (column, colour) in enumerate(_COLOURS.items())
            )
            out.append(
                f'<text x="{_LEFT - 8}" y="{middle + 4}" text-anchor="end">{escape(label)}</text>{"".join(marks)}'
            )
        y = bottom + 26
    legend = "".join(
        f'<circle cx="{_LEFT + 90 * i}" cy="16" r="3" fill="{colour}"/><text x="{_LEFT + 90 * i + 8}" y="20">{COLUMNS[column]}</text>'
        for i, (column, colour) in enumerate(_COLOURS.items())
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LEFT + _WIDTH + 20} {y}" font-family="sans-serif" font-size="11">'
    note = f'<text x="{_LEFT + 180}" y="20">accuracy, %; dashed: reference</text>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#fff"/>', legend + note, *out, "</svg>"]) + "\n"


def _mark(values: Sequence[float], y: float, colour: str) -> str:
    mean, half = student_interval(values)
    line = ""
    if not math.isnan(half):
        low, high = _x(max(0.0, mean - half)), _x(min(100.0, mean + half))
        line = f'<path d="M{low} {y}H{high}" stroke="{colour}"/>'
    return f'{line}<circle cx="{_x(mean)}" cy="{y}" r="3" fill="{colour}"/>'


def _x(accuracy: float) -> float:
    return round(_LEFT + _WIDTH * accuracy / 100, 1)
