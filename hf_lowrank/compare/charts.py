"""Curves of several runs as plain data: what the figures and the page of a comparison are drawn from.

A chart holds one quantity measured in one way, a line a row of the comparison. Of several seeds a line is the mean at
the places that all of them have, with the standard error over seeds.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from hf_lowrank.compare.frame import Comparison
from hf_lowrank.compare.series import Series, data_identity, differing_settings
from hf_lowrank.figures.activation import SIMILARITIES
from hf_lowrank.figures.axes import evenly
from hf_lowrank.report.catalogue import HEADLINE_METRICS, SPECTRAL
from hf_lowrank.report.markdown import one_line
from hf_lowrank.report.tables import describe

__all__ = ["Chart", "Group", "Line", "charts"]

Group = Literal["Training", "Metrics over training", "Loss along directions", "Paths between models", "Over depth"]

_HEADLINE = {metric.name: metric for metric in HEADLINE_METRICS}
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


_Curve = tuple[Sequence[float], Sequence[float], Sequence[float | None]]


def charts(comparison: Comparison) -> list[Chart]:
    """Return every chart that has a line of two or more points."""
    found = [
        *_training(comparison),
        *_over_steps(comparison),
        *_along_directions(comparison),
        *_between_models(comparison),
        *_over_depth(comparison),
        *_similarity_over_depth(comparison),
    ]
    return [chart for chart in found if any(len(line.x) > 1 for line in chart.lines)]


def _lines(comparison: Comparison, curve: Callable[[int], _Curve | None]) -> list[Line]:
    """Return the lines of all rows; `curve` gives a run's, by its index."""
    lines = []
    for index, row in enumerate(comparison.rows):
        curves = [found for member in row.members if (found := curve(member)) is not None and len(found[0])]
        if curves:
            x, y, error = curves[0] if len(curves) == 1 else _mean(curves)
            # what is beyond comes from nothing that was measured, and no axis holds it
            usable = [i for i in range(len(x)) if abs(x[i]) < 1e150 and abs(y[i]) < 1e150]
            kept = evenly(usable, _MOST_POINTS)
            if kept:
                places, values = [float(x[i]) for i in kept], [float(y[i]) for i in kept]
                lines.append(Line(index, places, values, _errors(error, kept)))
    return lines


def _errors(error: Sequence[float | None], kept: Sequence[int]) -> list[float | None]:
    values = [error[index] for index in kept]
    return [None if value is None or not abs(value) < 1e150 else float(value) for value in values]


def _mean(curves: Sequence[_Curve]) -> _Curve:
    """Return mean and standard error over seeds at the places that all curves have."""
    tables = [dict(zip(x, y, strict=True)) for x, y, _ in curves]
    places = sorted(set.intersection(*(set(table) for table in tables)))
    values = np.array([[table[place] for place in places] for table in tables])
    return places, values.mean(axis=0).tolist(), (values.std(axis=0, ddof=1) / len(tables) ** 0.5).tolist()


def _table(comparison: Comparison, run: int, name: str, **values: Any) -> pd.DataFrame:
    """Return the rows of a run's table that have these values."""
    table = comparison.runs[run].tables.get(name, pd.DataFrame())
    for column, value in values.items():
        table = table[table[column] == value] if len(table) else table
    return table


def _last_step(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["step"] == table["step"].max()] if len(table) else table


def _training(comparison: Comparison) -> Iterator[Chart]:
    identities = [data_identity(run.report) for run in comparison.runs]
    for name, (title, unit) in _LOGGED.items():
        # losses on other data are other quantities; rates and norms are the same whatever the data
        apart = dict.fromkeys(identities) if unit == "nats per token" else [()]
        for identity in apart:

            def curve(run: int, name: str = name, identity: Any = identity) -> _Curve | None:
                table = _table(comparison, run, "training")
                if name not in table or identity not in ((), identities[run]):
                    return None
                points = table[["step", name]].dropna().drop_duplicates("step", keep="last").sort_values("step")
                return points["step"].tolist(), points[name].tolist(), [None] * len(points)

            detail = _of_data(identity, list(apart))
            lines = _lines(comparison, curve)
            yield Chart("Training", f"training/{name}", title, detail, "optimizer step", unit, lines)


def _of_data(identity: tuple[Any, ...] | None, apart: Sequence[tuple[Any, ...] | None]) -> str:
    """Return what tells these data from the others, empty where there are no others."""
    known = [other for other in apart if other]
    if len(apart) == 1:
        return ""
    if not identity:
        return "data not recorded"
    names = ("", "", "data", "tokenizer", "sequence length", "packing", "split seed", "validation sequences")
    parts = zip(names, identity, zip(*known, strict=True), strict=True)
    told = [f"{name} {one_line(mine)[:12]}".strip() for name, mine, all_of in parts if len(set(all_of)) > 1]
    return ", ".join(told) or f"data {identity[2][:12]}"


def _details(series: Sequence[Series]) -> list[str]:
    """Return what tells series of one metric apart."""
    of_name: dict[str, list[dict[str, Any]]] = {}
    for one in series:
        of_name.setdefault(one.name, []).append(one.settings)
    differing = {name: differing_settings(settings) for name, settings in of_name.items()}
    found = []
    for one in series:
        keys = differing[one.name]
        told = describe({key: value for key, value in one.settings.items() if key in keys})
        found.append(one_line(", ".join(part for part in (f"{one.space} weights" if one.space else "", told) if part)))
    return found


def _over_steps(comparison: Comparison) -> Iterator[Chart]:
    series = [one for one in comparison.series if one.kind != "cost"]
    for one, detail in zip(series, _details(series), strict=True):

        def curve(run: int, one: Series = one) -> _Curve | None:
            by_step = {p.step: p for p in one.of_run(run) if p.step is not None and p.value is not None}
            points = [(step, point.value, point.stderr) for step, point in sorted(by_step.items())]
            return None if not points else tuple(map(list, zip(*points, strict=True)))  # type: ignore[return-value]

        metric = _HEADLINE.get(one.name)
        title = f"{metric.id} {metric.label}" if metric and metric.id else metric.label if metric else one.name
        unit = metric.axis if metric else ""
        lines = _lines(comparison, curve)
        yield Chart("Metrics over training", one.name, title, detail, "optimizer step", unit, lines)


def _together(comparison: Comparison, name: str) -> list[tuple[Series, set[int]]]:
    """Return the series of a metric with their runs."""
    return [(one, {p.run for p in one.points}) for one in comparison.series if one.name == name]


def _along_directions(comparison: Comparison) -> Iterator[Chart]:
    """Yield the rise of the loss along directions at each run's last step, its mean over the directions."""
    for subject, words in _DIRECTIONS.items():
        name = f"landscape/{subject}/sharpness"
        found = _together(comparison, name)
        for (one, runs), detail in zip(found, _details([one for one, _ in found]), strict=True):

            def curve(run: int, one: Series = one, runs: set[int] = runs, subject: str = subject) -> _Curve | None:
                rows = _last_step(_table(comparison, run, "landscape", subject=subject, space=one.space or ""))
                if run not in runs or rows.empty:
                    return None
                # one table holds the curves of all K: the first K of them are those of this series
                most = one.settings.get("K")
                rows = rows[rows["direction"] < most] if isinstance(most, int) else rows
                grid = rows.pivot_table(index="x", columns="direction", values="loss", aggfunc="last").dropna()
                if 0 not in grid.index:
                    return None
                rise = grid - grid.loc[0]
                error = rise.std(axis=1, ddof=1) / rise.shape[1] ** 0.5
                return rise.index.tolist(), rise.mean(axis=1).tolist(), error.tolist()

            title, unit = f"Rise of the loss along {words}", "loss − loss at x = 0 (nats)"
            lines = _lines(comparison, curve)
            yield Chart("Loss along directions", name, title, detail, "step length x", unit, lines)


def _between_models(comparison: Comparison) -> Iterator[Chart]:
    """Yield the loss on straight lines at each run's last step: to the checkpoint before, to each other run."""
    for name in dict.fromkeys(one.name for one in comparison.series if one.name.endswith("/barrier")):
        subject = name.split("/")[1]
        found = _together(comparison, name)
        for (one, runs), detail in zip(found, _details([one for one, _ in found]), strict=True):

            def curve(run: int, one: Series = one, runs: set[int] = runs, subject: str = subject) -> _Curve | None:
                other = {"other": str(one.settings["other"])} if "other" in one.settings else {}
                table = _table(comparison, run, "interpolation", subject=subject, space=one.space or "", **other)
                path = _last_step(table)
                if run not in runs or path.empty:
                    return None
                path = path.drop_duplicates("alpha", keep="last").dropna(subset=["alpha", "loss"]).sort_values("alpha")
                error = path["stderr"].tolist() if "stderr" in path else [None] * len(path)
                return path["alpha"].tolist(), path["loss"].tolist(), error

            title = f"Loss on the line {_PATHS.get(subject, subject)}"
            if "other" in one.settings and "other=" not in detail:
                detail = ", ".join(part for part in (detail, f"other={one_line(one.settings['other'])}") if part)
            lines = _lines(comparison, curve)
            yield Chart("Paths between models", name, title, detail, "position α", "loss (nats)", lines)


def _over_depth(comparison: Comparison) -> Iterator[Chart]:
    """Yield spectral metrics layer by layer at each run's last step, the mean over a layer's matrices."""
    spaces = dict.fromkeys(
        space
        for run in comparison.runs
        if "spectral" in run.tables
        for space in run.tables["spectral"]["space"].unique()
    )
    for metric in SPECTRAL.metrics:
        for space in spaces:

            def curve(run: int, name: str = metric.name, space: str = space) -> _Curve | None:
                table = _table(comparison, run, "spectral", space=space)
                if name not in table:
                    return None
                layers = _last_step(table.dropna(subset=[name, "layer"])).groupby("layer")[name].mean()
                return layers.index.tolist(), layers.tolist(), [None] * len(layers)

            title = f"{metric.id} {metric.label}"
            detail = f"{one_line(space)} weights"
            lines = _lines(comparison, curve)
            yield Chart("Over depth", metric.name, title, detail, "layer", metric.axis, lines)


def _similarity_over_depth(comparison: Comparison) -> Iterator[Chart]:
    for name in SIMILARITIES:
        found = _together(comparison, name)
        for (one, runs), detail in zip(found, _details([one for one, _ in found]), strict=True):

            def curve(run: int, one: Series = one, runs: set[int] = runs) -> _Curve | None:
                baseline = str(one.settings.get("baseline", ""))
                table = _last_step(_table(comparison, run, "activation", baseline=baseline))
                if run not in runs or one.name not in table:
                    return None
                rows = table.dropna(subset=[one.name, "layer"]).drop_duplicates("layer", keep="last")
                rows = rows.sort_values("layer")
                error = f"{one.name}_stderr"
                errors = rows[error].tolist() if error in rows else [None] * len(rows)
                return rows["layer"].tolist(), rows[one.name].tolist(), errors

            title = f"{_SIMILARITIES[name]} with the baseline's activations"
            lines = _lines(comparison, curve)
            yield Chart("Over depth", name, title, detail, "layer (0: embeddings)", "", lines)
