"""Curves of several runs as plain data: what the figures and the page of a comparison are drawn from.

A chart holds one quantity measured in one way, a line a row of the comparison. Of several seeds a line is the mean at
the places that all of them have, with the standard error over seeds.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from hf_lowrank.compare.frame import defining_settings, differing_settings, metric_words
from hf_lowrank.compare.table import Comparison
from hf_lowrank.figures.activation import SIMILARITIES
from hf_lowrank.figures.axes import evenly
from hf_lowrank.report.catalogue import SPECTRAL
from hf_lowrank.report.comparability import PEER, Difference, Number, data_identity, differences
from hf_lowrank.report.markdown import one_line
from hf_lowrank.report.tables import UNKNOWN, describe

__all__ = ["Chart", "Group", "Line", "charts"]

Group = Literal["Training", "Metrics over training", "Loss along directions", "Paths between models", "Over depth"]

_MOST_POINTS = 1000
_LOGGED = {
    "loss": ("Training loss", "nats per token"),
    "eval_loss": ("Validation loss while training", "nats per token"),
    "learning_rate": ("Learning rate", "learning rate"),
    "grad_norm": ("Norm of the gradient", "norm"),
}
_SIMILARITIES = {
    "activation/relative_l2": "Relative L2 distance",
    "activation/cosine": "Cosine similarity",
    "activation/cka": "Linear CKA",
    "activation/cka_debiased": "Debiased linear CKA",
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
    """A row's curve: `error` is one standard error at each place, None where there is none."""

    row: int
    x: list[float]
    y: list[float]
    error: list[float | None]


@dataclass(frozen=True)
class Chart:
    """Lines with common axes; `name` is the metric's, `detail` tells charts of one title apart."""

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
        *_similarity_over_depth(comparison),
    ]
    return [chart for chart in drawn if any(len(line.x) > 1 for line in chart.lines)]


def _lines(comparison: Comparison, points: pd.DataFrame) -> list[Line]:
    """Return a line a row of the comparison; of several seeds the mean where all have a point, with its error."""
    # what is beyond comes from nothing that was measured, and no axis holds it
    points = points[(points["x"].abs() < 1e150) & (points["y"].abs() < 1e150)]
    lines = []
    for index, row in enumerate(comparison.rows):
        mine = points[points["run"].isin(row.members)].sort_values("x", kind="stable")
        seeds = mine["run"].nunique()
        if seeds > 1:
            at_place = mine.groupby("x")["y"]
            shared = at_place.count() == seeds
            mine = pd.DataFrame({"y": at_place.mean(), "error": at_place.sem()})[shared].reset_index()
        if len(mine):
            kept = mine.iloc[evenly(list(range(len(mine))), _MOST_POINTS)]
            errors = [float(error) if abs(error) < 1e150 else None for error in kept["error"]]
            lines.append(Line(index, kept["x"].tolist(), kept["y"].tolist(), errors))
    return lines


def _of_runs(runs: Iterable[int], curve: Callable[[int], pd.DataFrame | None]) -> pd.DataFrame:
    """Return the points of runs; `curve` gives those of one by its index, with columns x, y and error."""
    curves = {run: points for run in runs if (points := curve(run)) is not None and len(points)}
    parts = [points.assign(run=run)[_POINT] for run, points in curves.items()]
    return pd.concat(parts, ignore_index=True).astype(float) if parts else pd.DataFrame(columns=_POINT, dtype=float)


def _curve(table: pd.DataFrame, x: str, y: str, error: str = "") -> pd.DataFrame | None:
    """Return two columns of a table as a curve; of two rows at one place the later counts."""
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
    """Return what tells a run's data from the others'."""
    words = {each.fact.title.lower(): each.words[run] for each in differing}
    if set(words.values()) == {UNKNOWN}:
        return "data not recorded"
    return ", ".join(f"{title} {text}" for title, text in words.items())


def _series(comparison: Comparison, name: str | None = None) -> list[tuple[Number, str, pd.DataFrame]]:
    """Return the series of a metric, or all but costs: one of its numbers, what tells it from others, its points."""
    points = comparison.points[comparison.points["kind"] != "cost"]
    groups = [group for _, group in points[points["metric"] == name if name else slice(None)].groupby("series")]
    of_metric: dict[str, list[dict[str, Any]]] = {}
    defining = []
    for group in groups:
        number = group["number"].iloc[0]
        defining.append(defining_settings(number, comparison.runs[group["run"].iloc[0]].label))
        of_metric.setdefault(number.name, []).append(defining[-1])
    differing = {metric: differing_settings(settings) for metric, settings in of_metric.items()}
    described = []
    for group, settings in zip(groups, defining, strict=True):
        number = group["number"].iloc[0]
        told = describe({key: value for key, value in settings.items() if key in differing[number.name]})
        detail = ", ".join(part for part in (f"{number.space} weights" if number.space else "", told) if part)
        described.append((number, one_line(detail), group))
    return described


def _over_steps(comparison: Comparison) -> Iterator[Chart]:
    for number, detail, points in _series(comparison):
        title, unit = metric_words(number.name)
        points = points.dropna(subset=["step", "value"]).drop_duplicates(["run", "step"], keep="last")
        points = points.rename(columns={"step": "x", "value": "y", "stderr": "error"})
        lines = _lines(comparison, points)
        yield Chart("Metrics over training", number.name, title, detail, "optimizer step", unit, lines)


def _along_directions(comparison: Comparison) -> Iterator[Chart]:
    """Yield the rise of the loss along directions at each run's last step, its mean over the directions."""
    for subject, words in _DIRECTIONS.items():
        name = f"landscape/{subject}/sharpness"
        for number, detail, points in _series(comparison, name):

            def rise(run: int, number: Number = number, subject: str = subject) -> pd.DataFrame | None:
                rows = _last_step(_table(comparison, run, "landscape", subject=subject, space=number.space or ""))
                # one table holds the curves of all K: the first K of them are those of this series
                most = number.settings.get("K")
                rows = rows[rows["direction"] < most] if isinstance(most, int) and len(rows) else rows
                if rows.empty:
                    return None
                grid = rows.pivot_table(index="x", columns="direction", values="loss", aggfunc="last").dropna()
                if 0 not in grid.index:
                    return None
                rises = grid - grid.loc[0]
                return pd.DataFrame({"y": rises.mean(axis=1), "error": rises.sem(axis=1)}).reset_index()

            lines = _lines(comparison, _of_runs(points["run"].unique(), rise))
            title, unit = f"Rise of the loss along {words}", "loss − loss at x = 0 (nats)"
            yield Chart("Loss along directions", name, title, detail, "step length x", unit, lines)


def _between_models(comparison: Comparison) -> Iterator[Chart]:
    """Yield the loss on straight lines at each run's last step: to the checkpoint before, to each other run."""
    names = comparison.points["metric"].unique()
    for name in (name for name in names if name.startswith("interpolation/") and name.endswith("/barrier")):
        subject = name.split("/")[1]
        for number, detail, points in _series(comparison, name):
            peer = {PEER: str(number.settings[PEER])} if PEER in number.settings else {}

            def path(
                run: int, number: Number = number, subject: str = subject, peer: Any = peer
            ) -> pd.DataFrame | None:
                table = _table(comparison, run, "interpolation", subject=subject, space=number.space or "", **peer)
                return _curve(_last_step(table), "alpha", "loss", "stderr")

            if peer and f"{PEER}=" not in detail:
                detail = ", ".join(part for part in (detail, f"{PEER}={one_line(peer[PEER])}") if part)
            lines = _lines(comparison, _of_runs(points["run"].unique(), path))
            title = f"Loss on the line {_PATHS.get(subject, subject)}"
            yield Chart("Paths between models", name, title, detail, "position α", "loss (nats)", lines)


def _over_depth(comparison: Comparison) -> Iterator[Chart]:
    """Yield spectral metrics layer by layer at each run's last step, the mean over a layer's matrices."""
    tables = [run.tables["spectral"] for run in comparison.runs if "spectral" in run.tables]
    spaces = dict.fromkeys(space for table in tables for space in table["space"].unique())
    for metric in SPECTRAL.metrics:
        for space in spaces:

            def layers(run: int, name: str = metric.name, space: str = space) -> pd.DataFrame | None:
                table = _table(comparison, run, "spectral", space=space)
                if name not in table:
                    return None
                rows = _last_step(table.dropna(subset=[name, "layer"]))
                return _curve(rows.groupby("layer", as_index=False)[name].mean(), "layer", name)

            lines = _lines(comparison, _of_runs(range(len(comparison.runs)), layers))
            title, detail = f"{metric.id} {metric.label}", f"{one_line(space)} weights"
            yield Chart("Over depth", metric.name, title, detail, "layer", metric.axis, lines)


def _similarity_over_depth(comparison: Comparison) -> Iterator[Chart]:
    for name in SIMILARITIES:
        for number, detail, points in _series(comparison, name):

            def layers(run: int, number: Number = number) -> pd.DataFrame | None:
                baseline = str(number.settings.get("baseline", ""))
                table = _last_step(_table(comparison, run, "activation", baseline=baseline))
                return _curve(table, "layer", number.name, f"{number.name}_stderr")

            lines = _lines(comparison, _of_runs(points["run"].unique(), layers))
            title = f"{_SIMILARITIES[name]} with the baseline's activations"
            yield Chart("Over depth", name, title, detail, "layer (0: embeddings)", "", lines)
