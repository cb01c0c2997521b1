"""Runs side by side: rows of runs (or of seeds taken together), columns of metrics, differences to a baseline.

A column holds numbers that were measured in one way (`hf_lowrank.compare.series`), each at its run's last measured
step. Everything here is plain data; texts may hold whatever the reports hold, on one line.
"""

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hf_lowrank.compare.notices import Notice, differing_facts, metric_notices, run_notices, settings_key
from hf_lowrank.compare.series import COSTS, ComparedRun, Kind, Point, Series, collect, differing_settings
from hf_lowrank.report.catalogue import HEADLINE_METRICS
from hf_lowrank.report.markdown import one_line
from hf_lowrank.report.significance import Delta, Sample, difference
from hf_lowrank.report.tables import (
    Fact,
    describe,
    fact_rows,
    format_bytes,
    format_count,
    format_duration,
    format_value,
)

__all__ = ["Cell", "Column", "Comparison", "Row", "compare"]

_HEADLINE = {metric.name: metric for metric in HEADLINE_METRICS}
_GROUPS = {
    "landscape": "Loss landscape",
    "interpolation": "Interpolation",
    "spectral": "Spectra",
    "activation": "Activations",
    "curvature": "Curvature",
    "validation_loss": "Loss",
    "perplexity": "Loss",
}


@dataclass(frozen=True)
class Column:
    """A metric measured in one way.

    Attributes:
        kind, name, space: as in the series it comes from.
        id, label, group, unit: H1 to H16 or None, and words for people.
        settings: all settings on one line.
        distinct: the space and those settings in which columns of the same metric differ.
    """

    kind: Kind
    name: str
    space: str | None
    id: str | None
    label: str
    group: str
    unit: str
    settings: str
    distinct: str

    @property
    def headline(self) -> bool:
        """Whether it belongs into a short table."""
        return self.name in _HEADLINE or self.kind == "evaluation"

    @property
    def title(self) -> str:
        """Number, label and what tells it from other columns, on one line."""
        named = f"{self.id} {self.label}" if self.id else self.label
        return f"{named} ({self.distinct})" if self.distinct else named


@dataclass(frozen=True)
class Cell:
    """A number in the table.

    Attributes:
        value, stderr: of one run, or the mean over seeds and its standard error.
        step: the step of the measurement, None where it has none or the seeds' differ.
        text: value and error to sensible digits.
        seeds: how many runs it is the mean of.
        delta: the difference to the baseline's number in the same column.
        delta_text: that in words; for costs as a percentage.
        note: what must be known of this number.
    """

    value: float | None
    stderr: float | None
    step: int | None
    text: str
    seeds: int = 1
    delta: Delta | None = None
    delta_text: str = ""
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A run, or runs that differ in nothing but their seed.

    Attributes:
        label, method: what it is called.
        members: indices of its runs.
        seeds: their seeds.
        differs: titles of facts in which it is not comparable with the baseline (or with most others).
        facts: what the run was, of several seeds the first's.
        cells: by column index.
        repos: of its runs on the Hub.
    """

    label: str
    method: str
    members: tuple[int, ...]
    seeds: tuple[int | None, ...]
    differs: tuple[str, ...]
    facts: Sequence[Fact]
    cells: Mapping[int, Cell]
    repos: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """Everything that a comparison shows; `baseline` is a row's index, `sort` a column's."""

    runs: Sequence[ComparedRun]
    rows: Sequence[Row]
    columns: Sequence[Column]
    series: Sequence[Series]
    notices: Sequence[Notice]
    baseline: int | None
    grouped: bool
    sort: int | None = None
    descending: bool = False

    @property
    def tests(self) -> int:
        """How many differences were tested."""
        return sum(cell.delta is not None and cell.delta.p is not None for r in self.rows for cell in r.cells.values())

    @property
    def usual(self) -> list[int]:
        """Columns that most readers look for: headline metrics and tasks, of each the one that most rows have.

        Other columns of a metric join where rows lack the first; factors as trained only where there is nothing else.
        """
        chosen = set() if self.sort is None else {self.sort}
        of_name: dict[str, dict[int, set[int]]] = {}
        for index, column in enumerate(self.columns):
            if column.headline:
                rows = {place for place, row in enumerate(self.rows) if index in row.cells}
                of_name.setdefault(column.name, {})[index] = rows
        for having in of_name.values():
            shown: set[int] = set()
            for index in sorted(having, key=lambda i: (self.columns[i].space == "native", -len(having[i]))):
                if having[index] - shown:
                    chosen.add(index)
                    shown |= having[index]
        return sorted(chosen)

    @property
    def conflicts(self) -> list[Notice]:
        """What makes runs or metrics not comparable."""
        return [notice for notice in self.notices if notice.level == "conflict"]


def compare(
    runs: Sequence[ComparedRun],
    *,
    baseline: int | None = None,
    sort: str | None = None,
    descending: bool = False,
    group_seeds: bool = False,
) -> Comparison:
    """Put runs side by side.

    Args:
        runs: one or more, with labels of their own.
        baseline: index of the run that the others are compared with.
        sort: a metric's name or id (`validation_loss`, `H9`, `task/acc`, `parameters_trained`); of several columns the
            one with the most runs counts. Rows without it come last.
        descending: the largest first.
        group_seeds: runs that differ only in their seed become one row, mean and standard error over the seeds.

    Raises:
        ValueError: there is no run, or no metric of the name `sort`.
    """
    if not runs:
        raise ValueError("no run to compare: give run folders or Hub repositories, or --tag")
    series = collect(runs)
    columns, points = _columns(series)
    groups, said = _seed_groups(runs) if group_seeds else ([(index,) for index in range(len(runs))], [])
    differing = differing_facts(runs, baseline)
    rows = [_row(runs, members, columns, points, differing) for members in groups]
    at = None if baseline is None else next(i for i, row in enumerate(rows) if baseline in row.members)
    if at is not None:
        rows = [row if i == at else _against(row, rows[at], columns, points) for i, row in enumerate(rows)]
    chosen = None if sort is None else _sort_column(sort, columns, rows)
    if chosen is not None:
        order = _order([row.cells.get(chosen) for row in rows], descending)
        at = None if at is None else order.index(at)
        rows = [rows[index] for index in order]
    notices = [*run_notices(runs), *metric_notices(series, runs), *said, *_seed_notice(runs, rows, group_seeds)]
    notices += [Notice("note", run.label, problem) for run in runs for problem in run.problems]
    notices.sort(key=lambda notice: notice.level != "conflict")
    return Comparison(runs, rows, columns, series, notices, at, group_seeds, chosen, descending)


def _columns(series: Sequence[Series]) -> tuple[list[Column], list[dict[int, Point]]]:
    """Return the columns, and for each the point of every run that is in it."""
    found: list[tuple[Series, dict[str, Any], dict[int, Point]]] = []
    for one in series:
        bound: dict[str, tuple[dict[str, Any], dict[int, Point]]] = {}
        for run in sorted({point.run for point in one.points}):
            for point in one.last(run):
                key = json.dumps(point.bound, sort_keys=True)
                bound.setdefault(key, (dict(point.bound), {}))[1][run] = point
        found += [(one, settings, points) for settings, points in bound.values()]
    of_name: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one, settings, _ in found:
        of_name.setdefault((one.kind, one.name), []).append({"": one.space, **one.settings, **settings})
    differing = {key: differing_settings(settings) for key, settings in of_name.items()}
    columns = [_column(one, settings, differing[one.kind, one.name]) for one, settings, _ in found]
    return columns, [points for *_, points in found]


def _column(series: Series, bound: Mapping[str, Any], differing: set[str]) -> Column:
    settings = {**series.settings, **bound}
    metric = _HEADLINE.get(series.name)
    if series.kind == "evaluation":
        task, _, measure = series.name.rpartition("/")
        label, group, unit = f"{task} ({measure})", "Downstream tasks", measure
    elif series.kind == "cost":
        (label, unit), group = COSTS[series.name], "Cost"
    else:
        label, unit = (metric.label, metric.axis) if metric else (series.name, "")
        group = _GROUPS.get(series.name.partition("/")[0], "Other metrics")
    told = describe({key: value for key, value in settings.items() if key in differing})
    return Column(
        series.kind,
        series.name,
        series.space,
        None if metric is None else metric.id,
        label,
        group,
        unit,
        one_line(describe(settings)),
        one_line(", ".join(part for part in (series.space, told) if part)),
    )


def _row(
    runs: Sequence[ComparedRun],
    members: tuple[int, ...],
    columns: Sequence[Column],
    points: Sequence[Mapping[int, Point]],
    differing: Sequence[tuple[str, ...]],
) -> Row:
    first = runs[members[0]]
    seeds = tuple(runs[member].report["run"]["seeds"]["seed"] for member in members)
    method = one_line(first.report["run"]["method"])
    more = len(members) - 1
    label = f"{first.label} + {more} seed{'s' if more > 1 else ''}" if more else first.label
    cells = {}
    for index, column in enumerate(columns):
        here = [points[index][member] for member in members if member in points[index]]
        if here:
            cells[index] = _cell(column, here, len(members))
    facts = [replace(fact, text=one_line(fact.text)) for fact in fact_rows(first.report)]
    differs = tuple(dict.fromkeys(title for member in members for title in differing[member]))
    repos = tuple(repo for member in members if (repo := runs[member].repo) is not None)
    return Row(label, method, members, seeds, differs, facts, cells, repos)


def _cell(column: Column, points: Sequence[Point], members: int) -> Cell:
    steps = {point.step for point in points}
    step = points[0].step if len(steps) == 1 else None
    notes = [f"{len(points)} of {members} seeds"] if len(points) < members else []
    values = [point.value for point in points if point.value is not None]
    if not values:
        notes += dict.fromkeys(one_line(point.settings.get("note") or "not measured") for point in points)
        return Cell(None, None, step, "n/a", len(points), note="; ".join(notes))
    if len(values) == 1:
        one = next(point for point in points if point.value is not None)
        notes += ["one seed: the error is that of the measurement"] if members > 1 else []
        text = _text(column, values[0], one.stderr)
        return Cell(values[0], one.stderr, step, text, 1, note="; ".join(notes))
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Cell(mean, error, step, _text(column, mean, error), len(values), note="; ".join(notes))


def _text(column: Column, value: float, stderr: float | None) -> str:
    if column.kind != "cost":
        return format_value(value, stderr)
    if column.unit == "count":
        return str(format_count(value)).partition(" ")[0]
    shown = {"bytes": format_bytes, "seconds": format_duration}.get(column.unit)
    return str(shown(value)) if shown else f"{value:.3g}"


def _against(row: Row, base: Row, columns: Sequence[Column], points: Sequence[Mapping[int, Point]]) -> Row:
    """Return the row with its differences to the baseline's."""
    cells = dict(row.cells)
    for index, cell in row.cells.items():
        there = base.cells.get(index)
        if cell.value is None or there is None or there.value is None:
            continue
        if columns[index].kind == "cost":
            change = 100 * (cell.value / there.value - 1) if there.value else math.nan
            text = "" if math.isnan(change) else f"{change:+.1f} %".replace("-", "−") if change else "the same"
            cells[index] = replace(cell, delta=Delta(cell.value - there.value, None, None, None), delta_text=text)
            continue
        delta = difference(_sample(row, cell, points[index]), _sample(base, there, points[index]))
        cells[index] = replace(cell, delta=delta, delta_text=delta.text)
    return replace(row, cells=cells)


def _sample(row: Row, cell: Cell, points: Mapping[int, Point]) -> Sample:
    here = [points[member] for member in row.members if member in points]
    seeds = [point.value for point in here if point.value is not None]
    # a Lanczos residual bounds an error of arithmetic: it is no error of sampling
    sampling = all(not str(point.settings.get("stderr", "")).startswith("residual") for point in here)
    assert cell.value is not None
    return Sample(cell.value, cell.stderr, seeds, sampling)


def _seed_groups(runs: Sequence[ComparedRun]) -> tuple[list[tuple[int, ...]], list[Notice]]:
    """Return runs that differ only in their seed together; the same seed twice is no second sample."""
    groups: dict[Any, list[int]] = {}
    said = []
    for index, run in enumerate(runs):
        seed = run.report["run"]["seeds"]["seed"]
        members = groups.setdefault(index if seed is None else settings_key(run.report), [])
        twin = next((m for m in members if runs[m].report["run"]["seeds"]["seed"] == seed), None)
        if twin is None:
            members.append(index)
        else:
            text = f"has seed {seed} as {runs[twin].label} has: left out, since the same seed is no second sample"
            said.append(Notice("note", run.label, text))
    return [tuple(members) for members in groups.values()], said


def _seed_notice(runs: Sequence[ComparedRun], rows: Sequence[Row], grouped: bool) -> list[Notice]:
    if grouped:
        single = tuple(row.label for row in rows if len(row.members) == 1)
        text = "nothing is known of the spread over seeds"
        return [Notice("note", "Single seeds", text, (("1 seed", single),))] if single else []
    kin = [tuple(runs[i].label for i in members) for members in _seed_groups(runs)[0] if len(members) > 1]
    text = "errors cover the measurement alone, not how much another seed would differ"
    if kin:
        text += "; --group-seeds takes together what differs only in the seed"
    return [
        Notice("note", "Each row is one run with one seed", text, tuple(("seeds of one", labels) for labels in kin))
    ]


def _sort_column(name: str, columns: Sequence[Column], rows: Sequence[Row]) -> int:
    wanted = [i for i, column in enumerate(columns) if name in (column.name, column.id)]
    if not wanted:
        known = list(dict.fromkeys(column.name for column in columns))
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean '{close[0]}'?)" if close else ""
        raise ValueError(f"no run has the metric {name!r} to sort by{hint}; there are {', '.join(known[:30])}")
    return max(wanted, key=lambda i: sum(i in row.cells for row in rows))


def _order(cells: Sequence[Cell | None], descending: bool) -> list[int]:
    """Return the order of rows by a column, those without a number last whichever way it goes."""

    def place(index: int) -> tuple[bool, float]:
        cell = cells[index]
        if cell is None or cell.value is None:
            return True, 0.0
        return False, -cell.value if descending else cell.value

    return sorted(range(len(cells)), key=place)
