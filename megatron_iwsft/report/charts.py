"""What the page plots: smoothed curves over the values of single steps, and how the weights were distributed over time.

A chart is plain data for `assets/page.js`, which draws it. All runs share the axis of steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_iwsft.objectives.metrics import METRICS, WEIGHT_BINS
from megatron_iwsft.report.held_out import BenchmarkResult
from megatron_iwsft.report.run_record import RunRecord, finite

_MOST_POINTS = 800  # per curve
_TITLES = {metric.name: metric.title for metric in METRICS}
_OPTIMIZER = ("grad_norm", "lr", "skipped_steps", "router_balance")
_PHASES = ("data_s", "forward_backward_s", "reduce_s", "optimizer_s", "between_steps_s")  # of a step
_PLOTTED = {metric.name for metric in METRICS if metric.plotted}
_LOGARITHMIC = ("grad_norm", "weight_max")  # where they spread
_GIGABYTE = ("peak_memory_bytes",)
_NOT_CURVES = {"step", "epoch", "slowest_rank", "weight_histogram", "sequences", "tokens", "trained_tokens"}


@dataclass
class Series:
    """One curve. run: index of the run, which decides the colour; None: of its own. smooth: of the values `y`; dash: as in SVG."""

    name: str
    x: list[int]
    y: list[float]
    smooth: list[float]
    run: int | None = None
    dash: str = "solid"


@dataclass
class Chart:
    """kind: "lines" or "shares" (stacked areas that add up to 1). palette: of series that belong to no run."""

    title: str
    series: list[Series]
    kind: str = "lines"
    log: bool = False
    palette: str = "groups"

    def data(self) -> dict[str, Any]:
        """For JSON, with the digits that a plot can show."""
        series = [asdict(s) | {"y": _short(s.y), "smooth": _short(s.smooth)} for s in self.series]
        return {"kind": self.kind, "log": self.log, "palette": self.palette, "series": series}


def _short(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


@dataclass
class Topic:
    """A heading of the page with its charts."""

    title: str
    anchor: str
    note: str
    charts: list[Chart] = field(default_factory=list)

    @property
    def by_run(self) -> bool:
        """Whether its curves have the runs' colours."""
        return any(series.run is not None for chart in self.charts for series in chart.series)


def sections(runs: Sequence[RunRecord], benchmarks: Sequence[BenchmarkResult]) -> list[Topic]:
    """All charts, by topic; without those that no run has values for."""
    out = [
        Topic("Loss", "loss", "Of the batches that are trained on: comparable between objectives is only the negative log-likelihood."),
        Topic("Evaluation in the run", "evaluation", "On trajectories and problems that are not trained on."),
        Topic("Importance weights", "weights", "1 is the weight of SFT. They move as the policy moves away from the reference."),
        Topic("By source and score", "groups", "Whether good trajectories gain more than bad ones, and which sources are learned."),
        Topic("Optimisation", "optimisation", ""),
        Topic("Speed and memory", "speed", ""),
        Topic("Other metrics", "other", "Of custom objectives and callbacks."),
    ]  # fmt: skip
    by_anchor = {section.anchor: section for section in out}
    names = list(dict.fromkeys(name for run in runs for line in run.metrics for name in line))
    for name in names:
        if "/" not in name and name not in (*_NOT_CURVES, *_PHASES) and not name.endswith("_se"):
            by_anchor[_topic(name)].charts += _metric_chart(runs, name)
    by_anchor["evaluation"].charts += [*_evaluation_charts(runs, names), *_accuracy_charts(benchmarks)]
    by_anchor["weights"].charts += _histograms(runs)
    by_anchor["speed"].charts += _phase_charts(runs)
    by_anchor["groups"].charts += _group_charts(runs, [name for name in names if not name.startswith("eval/")])
    return [section for section in out if section.charts]


def _topic(name: str) -> str:
    metric = next((metric for metric in METRICS if metric.name == name), None)
    if name.startswith("eval"):
        return "evaluation"
    if metric is None:
        return "other"
    if metric.timing or name in _GIGABYTE:
        return "speed"
    if name in _OPTIMIZER:
        return "optimisation"
    return "weights" if metric.needs else "loss"


def _metric_chart(runs: Sequence[RunRecord], name: str, title: str | None = None) -> list[Chart]:
    scale = 1e-9 if name in _GIGABYTE else 1.0
    found = [_series(run.name, run.values(name), run=i, scale=scale) for i, run in enumerate(runs)]
    series = [s for s in found if s is not None]
    if not series or all(value == 0.0 for s in series for value in s.y):
        return []
    title = title or _TITLES.get(name, name).replace(", bytes", ", GB" if scale != 1.0 else ", bytes")
    return [Chart(title, series, log=name in _LOGARITHMIC and _spreads(series))]


def _spreads(series: Sequence[Series]) -> bool:
    """Whether all values are above 0 and span more than two orders of magnitude."""
    values = [value for s in series for value in s.y]
    return min(values) > 0 and max(values) > 100 * min(values)


def _series(
    name: str, points: list[tuple[int, float]], *, run: int | None, scale: float = 1.0, dash: str = "solid"
) -> Series | None:
    if not points:
        return None
    values = [value * scale for _, value in points]
    smooth = smoothed(values)
    kept = thinned([abs(value - mean) for value, mean in zip(values, smooth, strict=True)])
    return Series(
        name, [points[i][0] for i in kept], [values[i] for i in kept], [smooth[i] for i in kept], run=run, dash=dash
    )


def smoothed(values: Sequence[float]) -> list[float]:
    """Means over a window of a fifteenth of the curve around each point, narrower at its ends; short curves stay."""
    half = len(values) // 30 if len(values) > 30 else 0
    sums = list(itertools.accumulate(values, initial=0.0))
    out = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        out.append((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1) if reach else values[i])
    return out


def thinned(deviations: Sequence[float]) -> list[int]:
    """Indices of at most `_MOST_POINTS` points, first and last included; of each stretch the one that deviates most from the mean."""
    count = len(deviations)
    if count <= _MOST_POINTS:
        return list(range(count))
    edges = [1 + (count - 2) * k // (_MOST_POINTS - 2) for k in range(_MOST_POINTS - 1)]
    inner = (max(range(a, b), key=deviations.__getitem__) for a, b in itertools.pairwise(edges))
    return [0, *inner, count - 1]


def _histograms(runs: Sequence[RunRecord]) -> list[Chart]:
    """One per run with weights: how many of them were in each bin."""
    out = []
    for run in runs:
        rows = [(line["step"], line["weight_histogram"]) for line in run.metrics if _is_histogram(line)]
        out += _shares(f"distribution of the weights, {run.name}", _bin_labels(), rows, palette="shares")
    return out


def _phase_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """One per run: the parts of a step's time."""
    out = []
    for run in runs:
        rows = []
        for line in run.metrics:
            times = [finite(line.get(name)) or 0.0 for name in _PHASES]
            if sum(times) > 0.0:
                rows.append((line["step"], [time / sum(times) for time in times]))
        labels = [_TITLES.get(name, name).removesuffix(", s") for name in _PHASES]
        out += _shares(f"where the time of a step goes, {run.name}", labels, rows)
    return out


def _shares(
    title: str, labels: Sequence[str], rows: Sequence[tuple[int, list[float]]], palette: str = "groups"
) -> list[Chart]:
    """Stacked areas; each point is the mean over a stretch of steps."""
    stretch = max(1, len(rows) // 60)
    parts = [rows[at : at + stretch] for at in range(0, len(rows), stretch)]
    if len(parts) < 2:
        return []
    series = []
    for i, label in enumerate(labels):
        means = [sum(shares[i] for _, shares in part) / len(part) for part in parts]
        series.append(Series(label, [part[-1][0] for part in parts], means, means))
    return [Chart(title, series, kind="shares", palette=palette)]


def _is_histogram(line: dict[str, Any]) -> bool:
    shares = line.get("weight_histogram")
    return (
        isinstance(shares, list) and len(shares) == len(WEIGHT_BINS) + 1 and all(finite(s) is not None for s in shares)
    )


def _bin_labels() -> list[str]:
    edges = [f"{edge:g}" for edge in WEIGHT_BINS]
    return [f"below {edges[0]}", *(f"{a} to {b}" for a, b in itertools.pairwise(edges)), f"above {edges[-1]}"]


def _evaluation_charts(runs: Sequence[RunRecord], names: Sequence[str]) -> list[Chart]:
    """Of `eval/SET/METRIC`, the metrics that are plotted in training, and of `eval/SET/METRIC/GROUP` those by group."""
    out: list[Chart] = []
    for name in names:
        _, held_out, metric, *group = [*name.split("/", 3), "", ""]
        if name.startswith("eval/") and not any(group) and metric in _PLOTTED:
            out += _metric_chart(runs, name, f"{held_out}: {_TITLES[metric]}")
    return out + _group_charts(runs, [name for name in names if name.startswith("eval/") and name.count("/") > 2])


def _group_charts(runs: Sequence[RunRecord], names: Sequence[str]) -> list[Chart]:
    """One per run, metric and kind of group: `nll/source math` is the metric nll of the group math, of kind source."""
    kinds: dict[tuple[str, str, str], list[str]] = {}
    for name in names:
        held_out, _, rest = name.removeprefix("eval/").partition("/") if name.startswith("eval/") else ("", "", name)
        metric, _, group = rest.partition("/")
        if group:
            kinds.setdefault((held_out, metric, group.split(" ", 1)[0]), []).append(name)
    out = []
    for (held_out, metric, kind), own in kinds.items():
        title = f"{held_out}: " * bool(held_out) + f"{_TITLES.get(metric, metric)}, by {kind}"
        for run in runs:
            found = (_series(name.partition(f"/{kind} ")[2] or name, run.values(name), run=None) for name in own)
            series = [s for s in found if s is not None]
            if series:
                out.append(Chart(f"{title}, {run.name}" if len(runs) > 1 else title, series))
    return out


def _accuracy_charts(benchmarks: Sequence[BenchmarkResult]) -> list[Chart]:
    """Share of right answers over the steps whose exports were evaluated, where a run has several."""
    out = []
    for benchmark in benchmarks:
        series = []
        for run in dict.fromkeys(model.run for model in benchmark.earlier):
            models = sorted((m for m in benchmark.earlier if m.run == run), key=lambda m: m.step)
            values = [m.estimate.mean for m in models]
            series.append(Series(models[0].name, [m.step for m in models], values, values, run=run))
        if any(len(s.x) > 1 for s in series):
            out.append(Chart(f"share of right answers, {benchmark.name}", series))
    return out
