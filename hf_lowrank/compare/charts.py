"""Curves of several runs as plain data, from which the figures and the page of a comparison are drawn.

A chart shows one quantity measured in one way, with a line for each row of the comparison. The line of several seeds
is their mean at the places that all of them have, with the standard error over seeds.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd

from hf_lowrank.compare.frame import defining_settings, metric_words, telling_apart
from hf_lowrank.compare.table import Comparison
from hf_lowrank.figures.activation import SIMILARITIES
from hf_lowrank.figures.drawing import evenly
from hf_lowrank.report.catalogue import SPECTRAL
from hf_lowrank.report.comparability import PEER, Difference, Number, data_identity, differences
from hf_lowrank.report.markdown import one_line
from hf_lowrank.report.values import UNKNOWN

__all__ = ["Chart", "Group", "Line", "charts"]

Group = Literal["Training", "Metrics over training", "Loss along directions", "Paths between models", "Over depth"]

_MOST_POINTS = 1000
_LOGGED = {
    "loss": ("Training loss", "nats per token"),
    "eval_loss": ("Validation loss while training", "nats per token"),
    "learning_rate": ("Learning rate", "learning rate"),
    "grad_norm": ("Norm of the gradient", "norm"),
}
_DIRECTIONS = {
    "random": "random directions",
    "svd_1": "the top singular direction",
    "svd_k": "top singular directions",
}

_PATHS = {
    "consecutive": "from the checkpoint before",
    "cross_method": "to another method",
    "cross_method_aligned": "to another method, aligned",
    "cross_seed": "to another seed",
    "cross_seed_aligned": "to another seed, aligned",
}


@dataclass(frozen=True)
class Line:
    """A row's curve; `error` is one standard error at each place, or None."""

    row: int
    x: list[float]
    y: list[float]
    error: list[float | None]


@dataclass(frozen=True)
class Chart:
    """Lines with common axes; `name` is the metric's, `detail` distinguishes charts with one title."""

    group: Group
    name: str
    title: str
    detail: str
    x_label: str
    y_label: str
    lines: Sequence[Line]


# columns of a chart's points: the run's index, the place, the value and its standard error
_POINT = ["run", "x", "y", "error"]


def charts(comparison: Comparison) -> list[Chart]:
    """Return every chart that has a line of two or more points."""
    drawn = [
        *_training(comparison),
        *_over_steps(comparison),
        *_along_directions(comparison),
        *_between_models(comparison),
        *_over_depth(comparison),
    ]
    return [chart for chart in drawn if any(len(line.x) > 1 for line in chart.lines)]


def _lines(comparison: Comparison, points: pd.DataFrame) -> list[Line]:
    """Return a line for each row; that of several seeds is their mean wherever all have a point."""
    # nothing measured comes near this bound, and no axis holds what is beyond
    points = points[(points["x"].abs() < 1e150) & (points["y"].abs() < 1e150)]
    lines = []
    for index, row in enumerate(comparison.rows):
        curve = points[points["run"].isin(row.members)].sort_values("x", kind="stable")
        seeds = curve["run"].nunique()
        if seeds > 1:
            at_place = curve.groupby("x")["y"]
            shared = at_place.count() == seeds
            curve = pd.DataFrame({"y": at_place.mean(), "error": at_place.sem()})[shared].reset_index()
        if len(curve):
            kept = curve.iloc[evenly(list(range(len(curve))), _MOST_POINTS)]
            errors = [float(error) if abs(error) < 1e150 else None for error in kept["error"]]
            lines.append(Line(index, kept["x"].tolist(), kept["y"].tolist(), errors))
    return lines


def _of_runs(runs: Iterable[int], curve: Callable[[int], pd.DataFrame | None]) -> pd.DataFrame:
    """Return the points of runs; `curve` returns those of a run by its index, with columns x, y and error."""
    curves = {run: points for run in runs if (points := curve(run)) is not None and len(points)}
    parts = [points.assign(run=run)[_POINT] for run, points in curves.items()]
    return pd.concat(parts, ignore_index=True).astype(float) if parts else pd.DataFrame(columns=_POINT, dtype=float)


def _curve(table: pd.DataFrame, x: str, y: str, error: str = "") -> pd.DataFrame | None:
    """Return two columns of a table as a curve; of two rows at one place the later one counts."""
    if x not in table or y not in table:
        return None
    rows = table.dropna(subset=[x, y]).drop_duplicates(x, keep="last")
    return pd.DataFrame({"x": rows[x], "y": rows[y], "error": rows.get(error, np.nan)})


def _table(comparison: Comparison, run: int, name: str, **values: Any) -> pd.DataFrame:
    """Return the rows of a run's table that have these values."""
    table = comparison.runs[run].tables.get(name, pd.DataFrame())
    for column, value in values.items():
        table = table[table[column] == value] if len(table) else table
    return table


def _last_step(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["step"] == table["step"].max()] if len(table) else table


def _training(comparison: Comparison) -> Iterator[Chart]:
    reports = [run.report for run in comparison.runs]
    on_data: dict[str, list[int]] = {}
    for run, report in enumerate(reports):
        on_data.setdefault(data_identity(report), []).append(run)
    differing = [each for each in differences(reports) if each.fact.of_data]
    for name, (title, unit) in _LOGGED.items():
        # losses on other data are other quantities; rates and norms are the same whatever the data
        groups = list(on_data.values()) if unit == "nats per token" else [list(range(len(reports)))]
        for runs in groups:
            points = _of_runs(runs, lambda run, y=name: _curve(_table(comparison, run, "training"), "step", y))  # type: ignore[misc]
            detail = "" if len(groups) == 1 else _data_in_words(differing, runs[0])
            lines = _lines(comparison, points)
            yield Chart("Training", f"training/{name}", title, detail, "optimizer step", unit, lines)


def _data_in_words(differing: Sequence[Difference], run: int) -> str:
    """Describe in what a run's data differ from the others'."""
    words = {each.fact.title.lower(): each.words[run] for each in differing}
    if set(words.values()) == {UNKNOWN}:
        return "data not recorded"
    return ", ".join(f"{title} {text}" for title, text in words.items())


def _series(comparison: Comparison, name: str | None = None) -> Iterator[tuple[Number, str, pd.DataFrame]]:
    """Yield each series of a metric, or of all but costs: one of its numbers, what distinguishes it, its points."""
    points = comparison.points[comparison.points["kind"] != "cost"]
    groups = [group for _, group in points[points["metric"] == name if name else slice(None)].groupby("series")]
    numbers: list[Number] = [group["number"].iloc[0] for group in groups]
    labels = [comparison.runs[group["run"].iloc[0]].label for group in groups]
    defining = [defining_settings(number, label) for number, label in zip(numbers, labels, strict=True)]
    for number, told, group in zip(numbers, telling_apart(numbers, defining), groups, strict=True):
        weights = f"{number.space} weights" if number.space else ""
        yield number, one_line(", ".join(part for part in (weights, told) if part)), group


def _over_steps(comparison: Comparison) -> Iterator[Chart]:
    for number, detail, points in _series(comparison):
        title, unit = metric_words(number.name)
        points = points.dropna(subset=["step", "value"]).drop_duplicates(["run", "step"], keep="last")
        points = points.rename(columns={"step": "x", "value": "y", "stderr": "error"})
        lines = _lines(comparison, points)
        yield Chart("Metrics over training", number.name, title, detail, "optimizer step", unit, lines)


def _at_last_steps(
    comparison: Comparison, name: str, curve: Callable[[Comparison, Number, int], pd.DataFrame | None], chart: Chart
) -> Iterator[Chart]:
    """Yield a copy of `chart` for each series of a metric; `curve` returns a run's line of it."""
    for number, detail, points in _series(comparison, name):
        curves = _of_runs(points["run"].unique(), partial(curve, comparison, number))
        peer = f"{PEER}={one_line(number.settings[PEER])}" if PEER in number.settings else ""
        if peer not in detail:
            detail = ", ".join(part for part in (detail, peer) if part)
        yield replace(chart, name=name, detail=detail, lines=_lines(comparison, curves))


def _along_directions(comparison: Comparison) -> Iterator[Chart]:
    """Yield the rise of the loss along directions, its mean over the directions."""
    for subject, words in _DIRECTIONS.items():
        title, unit = f"Rise of the loss along {words}", "loss − loss at x = 0 (nats)"
        chart = Chart("Loss along directions", "", title, "", "step length x", unit, [])
        yield from _at_last_steps(comparison, f"landscape/{subject}/sharpness", _rise, chart)


def _rise(comparison: Comparison, number: Number, run: int) -> pd.DataFrame | None:
    subject = number.name.split("/")[1]
    rows = _last_step(_table(comparison, run, "landscape", subject=subject, space=number.space or ""))
    # the table holds the curves of the largest K; this series is over the first K of them
    most = number.settings.get("K")
    rows = rows[rows["direction"] < most] if isinstance(most, int) and len(rows) else rows
    if rows.empty:
        return None
    grid = rows.pivot_table(index="x", columns="direction", values="loss", aggfunc="last").dropna()
    if 0 not in grid.index:
        return None
    rises = grid - grid.loc[0]
    return pd.DataFrame({"y": rises.mean(axis=1), "error": rises.sem(axis=1)}).reset_index()


def _between_models(comparison: Comparison) -> Iterator[Chart]:
    """Yield the loss on straight lines to the checkpoint before and to other runs."""
    for name in comparison.points["metric"].unique():
        if name.startswith("interpolation/") and name.endswith("/barrier"):
            subject = name.split("/")[1]
            title = f"Loss on the line {_PATHS.get(subject, subject)}"
            chart = Chart("Paths between models", "", title, "", "position α", "loss (nats)", [])
            yield from _at_last_steps(comparison, name, _path, chart)


def _path(comparison: Comparison, number: Number, run: int) -> pd.DataFrame | None:
    wanted = {"subject": number.name.split("/")[1], "space": number.space or ""}
    wanted |= {PEER: str(number.settings[PEER])} if PEER in number.settings else {}
    return _curve(_last_step(_table(comparison, run, "interpolation", **wanted)), "alpha", "loss", "stderr")


def _over_depth(comparison: Comparison) -> Iterator[Chart]:
    """Yield similarities, and spectral metrics as means over a layer's matrices, layer by layer."""
    tables = [run.tables["spectral"] for run in comparison.runs if "spectral" in run.tables]
    spaces = dict.fromkeys(space for table in tables for space in table["space"].unique())
    for metric in SPECTRAL.metrics:
        for space in spaces:
            layers = partial(_layers, comparison, metric.name, space)
            lines = _lines(comparison, _of_runs(range(len(comparison.runs)), layers))
            title, detail = f"{metric.id} {metric.label}", f"{one_line(space)} weights"
            yield Chart("Over depth", metric.name, title, detail, "layer", metric.axis, lines)
    for name, words in SIMILARITIES.items():
        title = f"{words} with the baseline's activations"
        chart = Chart("Over depth", "", title, "", "layer (0: embeddings)", "", [])
        yield from _at_last_steps(comparison, name, _similarity, chart)


def _layers(comparison: Comparison, name: str, space: str, run: int) -> pd.DataFrame | None:
    table = _table(comparison, run, "spectral", space=space)
    if name not in table:
        return None
    rows = _last_step(table.dropna(subset=[name, "layer"]))
    return _curve(rows.groupby("layer", as_index=False)[name].mean(), "layer", name)


def _similarity(comparison: Comparison, number: Number, run: int) -> pd.DataFrame | None:
    table = _table(comparison, run, "activation", baseline=str(number.settings.get("baseline", "")))
    return _curve(_last_step(table), "layer", number.name, f"{number.name}_stderr")
