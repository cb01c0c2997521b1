"""Runs side by side: rows of runs (or of several seeds), columns of metrics, differences to a baseline.

The table's cells come from the frame of all numbers (`hf_lowrank.compare.frame`); all files, tables and figures of a
comparison are made from these two.
"""

import difflib
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from hf_lowrank.compare.frame import Column, ComparedRun, collect, columns_of
from hf_lowrank.compare.matched import At, parse_at, take
from hf_lowrank.compare.notices import Notice, metric_notices, place_notices, run_notices
from hf_lowrank.report.comparability import Difference, data_order, differences, settings_key
from hf_lowrank.report.markdown import one_line
from hf_lowrank.report.significance import Delta, Sample, corrected, difference, tested_number
from hf_lowrank.report.tables import Fact, fact_rows
from hf_lowrank.report.values import format_bytes, format_count, format_duration, format_value

__all__ = ["Comparison", "Row", "compare"]


@dataclass(frozen=True)
class Row:
    """A run, or runs that differ in nothing but their seed.

    Attributes:
        label, method: what it is called.
        members: indices of its runs.
        seeds: their seeds.
        differs, notes: titles of the facts in which it differs from the baseline or from most others: those that make
            its numbers not comparable, and the others.
        facts: of the run; of several seeds, of the first.
        repos: its runs' repositories on the Hub.
    """

    label: str
    method: str
    members: tuple[int, ...]
    seeds: tuple[int | None, ...]
    differs: tuple[str, ...]
    notes: tuple[str, ...]
    facts: Sequence[Fact]
    repos: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """Everything that a comparison shows.

    Attributes:
        runs, rows, columns: what is compared; `baseline` is a row's index, `sort` a column's.
        points: all numbers, as `collect` gives them, with the `row` that they belong to.
        cells: the table, indexed by row and column: value, stderr, n_seeds, step (from_step, to_step and weight if it
            is interpolated), text, note, and the difference to the baseline's cell with delta, delta_stderr, dof, p,
            q, test, paired, size, delta_text, why and marks.
        tests: how many numbers were tested.
        notices: what readers must know, conflicts first.
        at: where in their training the runs are taken, in words; None for their ends.
    """

    runs: Sequence[ComparedRun]
    rows: Sequence[Row]
    columns: Sequence[Column]
    points: pd.DataFrame
    cells: pd.DataFrame
    notices: Sequence[Notice]
    baseline: int | None
    grouped: bool
    sort: int | None = None
    descending: bool = False
    tests: int = 0
    at: str | None = None

    def tested(self, row: int) -> str:
        """Return what a row's tests against the baseline are about; nothing for the baseline itself."""
        if self.baseline in (None, row):
            return ""
        methods = all(len(self.rows[each].members) > 1 for each in (row, self.baseline))
        return "Δ: the methods, over seeds" if methods else "Δ: these two models, not these two methods"

    @property
    def usual(self) -> list[int]:
        """Columns that most readers look for: of each headline metric and task the one that most rows have.

        Another column of a metric joins if it adds rows; factors as trained come last.
        """
        rows_of: dict[int, set[int]] = {}
        for row, column in self.cells.index:
            rows_of.setdefault(column, set()).add(row)
        chosen = set() if self.sort is None else {self.sort}
        for name in {column.name for column in self.columns if column.headline}:
            having = [index for index in rows_of if self.columns[index].name == name]
            shown: set[int] = set()
            for index in sorted(having, key=lambda i: (self.columns[i].space == "native", -len(rows_of[i]), i)):
                if rows_of[index] - shown:
                    chosen.add(index)
                    shown |= rows_of[index]
        return sorted(chosen)

    @property
    def conflicts(self) -> list[Notice]:
        """What makes runs or metrics not comparable."""
        return [notice for notice in self.notices if notice.level == "conflict"]

    @property
    def notes(self) -> list[Notice]:
        """What else readers must know."""
        return [notice for notice in self.notices if notice.level == "note"]

    def pivot(self, show: Callable[[Any], Any]) -> pd.DataFrame:
        """Return the table of rows and columns, with None for what was not measured.

        `show` turns a cell, a named tuple whose `Index` is (row, column), into an entry.
        """
        shown = pd.Series([show(cell) for cell in self.cells.itertuples()], index=self.cells.index, dtype=object)
        table = shown.unstack("column").reindex(index=range(len(self.rows)), columns=range(len(self.columns)))
        return table.astype(object).where(table.notna(), None)


def compare(
    runs: Sequence[ComparedRun],
    *,
    baseline: int | None = None,
    sort: str | None = None,
    descending: bool = False,
    group_seeds: bool = False,
    at: str | At | None = None,
) -> Comparison:
    """Put runs side by side.

    Args:
        runs: one or more, with different labels.
        baseline: index of the run with which the others are compared.
        sort: a metric's name or id (`validation_loss`, `H9`, `task/acc`, `parameters_trained`); of several columns the
            one with the most runs counts. Rows without it come last.
        descending: sort from the largest to the smallest.
        group_seeds: join runs that differ only in their seed: mean and standard error over the seeds.
        at: take each run at a validation loss (`loss=3.9`), at the worst of their final ones (`matched`), at a
            checkpoint (`step=200`, `tokens=819200`) instead of its end (`hf_lowrank.compare.matched`).

    Raises:
        ValueError: there is no run, no metric has the name `sort`, or a run never gets to `at`.
    """
    if not runs:
        raise ValueError("no run to compare: give run folders or Hub repositories, or --tag")
    place = None
    if at is not None:
        runs, place = take(runs, parse_at(at) if isinstance(at, str) else at)
    points = collect(runs)
    columns = columns_of(points, runs)
    reports = [run.report for run in runs]
    groups, twins = _seed_groups(runs) if group_seeds else ([(index,) for index in range(len(runs))], [])
    against_usual = differences(reports, baseline)
    rows = [_row(runs, members, against_usual) for members in groups]
    chosen = None if sort is None else _sort_column(sort, columns, points)
    cells = _cells(runs, points, columns, rows)
    if chosen is not None:
        values = cells["value"].xs(chosen, level="column").reindex(range(len(rows)))
        order = values.sort_values(ascending=not descending, kind="stable", na_position="last").index
        rows = [rows[index] for index in order]
        cells = cells.rename(index={old: new for new, old in enumerate(order)}, level="row").sort_index()
    row_of = {run: place for place, row in enumerate(rows) for run in row.members}
    base = None if baseline is None else row_of[baseline]
    cells, tests = _with_differences(runs, cells, base, columns)
    return Comparison(
        runs=runs,
        rows=rows,
        columns=columns,
        points=points.assign(row=points["run"].map(row_of)),
        cells=cells,
        notices=_notices(runs, points, [*twins, *_seed_notice(runs, rows, group_seeds)], place),
        baseline=base,
        grouped=group_seeds,
        sort=chosen,
        descending=descending,
        tests=tests,
        at=place,
    )


def _notices(
    runs: Sequence[ComparedRun], points: pd.DataFrame, of_seeds: Sequence[Notice], place: str | None
) -> list[Notice]:
    """Return what readers must know, conflicts first."""
    labels = [run.label for run in runs]
    notices = [
        *run_notices(differences([run.report for run in runs]), labels),
        *([] if place is None else place_notices([(r.label, r.taken) for r in runs if r.taken is not None], place)),
        *metric_notices(points, labels, one_place=place is not None),
        *of_seeds,
        *(Notice("note", run.label, problem) for run in runs for problem in run.problems),
    ]
    return sorted(notices, key=lambda notice: notice.level != "conflict")


# ---- rows ----


def _row(runs: Sequence[ComparedRun], members: tuple[int, ...], differing: Sequence[Difference]) -> Row:
    first = runs[members[0]]
    more = len(members) - 1
    titles: dict[str, list[str]] = {"conflict": [], "note": []}
    for each in differing:
        if any(each.odd[member] for member in members):
            titles[each.level].append(each.fact.title.lower())
    return Row(
        label=f"{first.label} + {more} seed{'s' if more > 1 else ''}" if more else first.label,
        method=one_line(first.report.run.method),
        members=members,
        seeds=tuple(runs[member].report.run.seeds.seed for member in members),
        differs=tuple(titles["conflict"]),
        notes=tuple(titles["note"]),
        facts=[
            *(replace(fact, text=one_line(fact.text)) for fact in fact_rows(first.report)),
            *_place_fact([runs[member] for member in members]),
        ],
        repos=tuple(repo for member in members if (repo := runs[member].repo) is not None),
    )


def _place_fact(runs: Sequence[ComparedRun]) -> list[Fact]:
    """Return where runs are taken, if not at their ends."""
    texts = [f"{run.label}: {run.taken.text}" if len(runs) > 1 else run.taken.text for run in runs if run.taken]
    return [Fact("taken_at", "Taken at", "; ".join(texts))] if texts else []


def _seed_groups(runs: Sequence[ComparedRun]) -> tuple[list[tuple[int, ...]], list[Notice]]:
    """Group runs that differ only in their seed, and return notices on those whose seed is there already."""
    groups: dict[Any, list[int]] = {}
    twins = []
    for index, run in enumerate(runs):
        seed = run.report.run.seeds.seed
        members = groups.setdefault(index if seed is None else settings_key(run.report), [])
        twin = next((member for member in members if runs[member].report.run.seeds.seed == seed), None)
        if twin is None:
            members.append(index)
        else:
            text = f"has seed {seed} as {runs[twin].label} has: left out, because the same seed is no second sample"
            twins.append(Notice("note", run.label, text))
    return [tuple(members) for members in groups.values()], twins


def _seed_notice(runs: Sequence[ComparedRun], rows: Sequence[Row], grouped: bool) -> list[Notice]:
    if grouped:
        single = tuple(row.label for row in rows if len(row.members) == 1)
        text = "nothing is known of the spread over seeds"
        return [Notice("note", "Single seeds", text, (("1 seed", single),))] if single else []
    kin = [tuple(runs[index].label for index in group) for group in _seed_groups(runs)[0] if len(group) > 1]
    text = "errors cover the measurement alone, not how much another seed would differ"
    if kin:
        text += "; --group-seeds takes together what differs only in the seed"
    parts = tuple(("seeds of one", labels) for labels in kin)
    return [Notice("note", "Each row is one run with one seed", text, parts)]


def _sort_column(name: str, columns: Sequence[Column], points: pd.DataFrame) -> int:
    wanted = [index for index, column in enumerate(columns) if name in (column.name, column.id)]
    if not wanted:
        known = list(dict.fromkeys(column.name for column in columns))
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean '{close[0]}'?)" if close else ""
        raise ValueError(f"no run has the metric {name!r} to sort by{hint}; there are {', '.join(known[:30])}")
    return max(wanted, key=lambda index: int((points["column"] == index).sum()))


# ---- cells ----


def _cells(
    runs: Sequence[ComparedRun], points: pd.DataFrame, columns: Sequence[Column], rows: Sequence[Row]
) -> pd.DataFrame:
    """Return the table's cells without differences; a cell of several seeds has their mean and its error."""
    row_of = {run: place for place, row in enumerate(rows) for run in row.members}
    # a run whose seed is there already has no row
    lines = points[(points["column"] >= 0) & points["run"].isin(row_of)]
    lines = lines.assign(
        row=lines["run"].map(row_of),
        missing=[
            one_line(number.about.get("note") or ("" if number.parts else "not measured"))
            if math.isnan(value) or number.parts
            else None
            for number, value in zip(lines["number"], lines["value"], strict=True)
        ],
        measured=[
            None if math.isnan(value) else (run, number)
            for run, number, value in zip(lines["run"], lines["number"], lines["value"], strict=True)
        ],
    )
    cells = lines.groupby(["row", "column"]).agg(
        value=("value", "mean"),
        stderr=("stderr", "first"),
        spread=("value", "sem"),
        n_seeds=("value", "count"),
        runs=("run", "size"),
        first_step=("step", "min"),
        last_step=("step", "max"),
        steps=("step", "count"),
        missing=("missing", lambda why: list(dict.fromkeys(filter(None, why.dropna())))),
        number=("number", "first"),
        seeds=("value", lambda values: values.dropna().tolist()),
        measured=("measured", lambda pairs: pairs.dropna().tolist()),
    )
    same_step = (cells["first_step"] == cells["last_step"]) & (cells["steps"] == cells["runs"])
    cells["step"] = cells["first_step"].where(same_step).astype("Int64")
    cells["stderr"] = cells["spread"].where(cells["n_seeds"] > 1, cells["stderr"])
    parts = [number.parts if runs == 1 else () for number, runs in zip(cells["number"], cells["runs"], strict=True)]
    for name, side in (("from_step", 0), ("to_step", 1)):
        steps = [each[side][0].step if each else None for each in parts]
        cells[name] = pd.array(steps, dtype="Int64")
    cells["weight"] = pd.array([each[1][1] if each else None for each in parts], dtype="Float64").astype(float)
    cells["note"] = [_note(cell, len(rows[cell.Index[0]].members)) for cell in cells.itertuples()]
    cells["n_seeds"] = cells["n_seeds"].where(cells["n_seeds"] > 0, cells["runs"])
    cells["text"] = [_text(columns[cell.Index[1]], cell.value, cell.stderr) for cell in cells.itertuples()]
    places = ["step", "from_step", "to_step", "weight"]
    return cells[["value", "stderr", "n_seeds", *places, "text", "note", "seeds", "measured"]]


def _note(cell: Any, members: int) -> str:
    notes = [f"{cell.runs} of {members} seeds"] if cell.runs < members else []
    if cell.n_seeds == 0 or members == 1:
        notes += cell.missing
    elif cell.n_seeds == 1 and members > 1:
        notes.append("one seed: the error is that of the measurement")
    return "; ".join(notes)


def _sample(runs: Sequence[ComparedRun], cell: Any) -> Sample:
    """Return what is compared of a cell in which something was measured."""
    stderr = None if math.isnan(cell.stderr) else float(cell.stderr)
    if len(cell.measured) == 1:
        run, number = cell.measured[0]
        return Sample.of(replace(number, stderr=stderr), runs[run].kept.of(number))
    orders = [data_order(runs[run].report) for run, _ in cell.measured]
    return Sample(cell.value, stderr, cell.seeds, orders=orders)


def _text(column: Column, value: float, stderr: float) -> str:
    if column.kind != "cost" or math.isnan(value):
        return format_value(value, stderr)
    if column.unit == "count":
        return str(format_count(value)).partition(" ")[0]
    shown = {"bytes": format_bytes, "seconds": format_duration}.get(column.unit)
    return str(shown(value)) if shown else f"{value:.3g}"


def _with_differences(
    runs: Sequence[ComparedRun], cells: pd.DataFrame, baseline: int | None, columns: Sequence[Column]
) -> tuple[pd.DataFrame, int]:
    """Return the cells with their differences to the baseline's cells, and how many numbers were tested."""
    base = {cell.Index[1]: cell for cell in cells.itertuples() if cell.Index[0] == baseline and cell.measured}
    base_samples = {column: _sample(runs, cell) for column, cell in base.items()}
    # the losses at which runs are taken: no difference to test
    given = [run.taken.loss for run in runs if run.taken is not None]
    deltas = [Delta(math.nan, None, None, None)] * len(cells)
    costs: list[str] = [""] * len(cells)
    numbers: list[Hashable] = [None] * len(cells)
    for place, cell in enumerate(cells.itertuples()):
        row, column = cell.Index
        there = base.get(column)
        if row == baseline or there is None or not cell.measured:
            continue
        if columns[column].kind == "cost":
            deltas[place] = replace(deltas[place], value=cell.value - there.value)
            costs[place] = _percent(cell.value, there.value)
        elif _is_given(columns[column].name, cell.value, given) and math.isclose(cell.value, there.value):
            deltas[place] = Delta(0.0, None, None, None, "equal, because the runs are taken there")
        else:
            ours, theirs = _sample(runs, cell), base_samples[column]
            deltas[place] = difference(ours, theirs)
            numbers[place] = (row, tested_number(cell.measured[0][1], ours, theirs))
    deltas = corrected(deltas, numbers)
    fields = {
        "delta": "value", "delta_stderr": "stderr", "dof": "dof", "p": "p", "q": "q", "test": "test",
        "paired": "paired", "marks": "marks", "size": "size",
    }  # fmt: skip
    added = pd.DataFrame({name: [getattr(d, field) for d in deltas] for name, field in fields.items()}, cells.index)
    added = added.astype(dict.fromkeys(("delta", "delta_stderr", "dof", "p", "q"), float))
    added["why"] = [delta.why or "" for delta in deltas]
    added["delta_text"] = [
        cost or ("" if math.isnan(delta.value) else delta.text) for cost, delta in zip(costs, deltas, strict=True)
    ]
    return cells.drop(columns=["seeds", "measured"]).join(added), sum(delta.counts for delta in deltas)


def _is_given(name: str, value: float, losses: Sequence[float | None]) -> bool:
    """Whether a number is the loss at which runs are taken, or its perplexity."""
    loss = {"validation_loss": lambda: value, "perplexity": lambda: math.log(value)}.get(name, lambda: math.nan)()
    return any(math.isclose(loss, each) for each in losses if each is not None)


def _percent(value: float, base: float) -> str:
    if not base:
        return ""
    change = 100 * (value / base - 1)
    return f"{change:+.1f} %".replace("-", "−") if change else "the same"
