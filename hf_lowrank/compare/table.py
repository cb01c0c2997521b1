"""Runs side by side: rows of runs (or of several seeds), columns of metrics, differences to a baseline.

The table's cells come from the frame of all numbers (`hf_lowrank.compare.frame`); all files, tables and figures of a
comparison are made from these two.
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from hf_lowrank.compare.cells import cells_of, with_differences
from hf_lowrank.compare.frame import Column, ComparedRun, collect, columns_of
from hf_lowrank.compare.matched import At, parse_at, take
from hf_lowrank.compare.notices import Notice, metric_notices, place_notices, run_notices
from hf_lowrank.report.comparability import Difference, differences, settings_key
from hf_lowrank.report.markdown import one_line
from hf_lowrank.report.tables import Fact, fact_rows

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
    cells = cells_of(points, columns, [row.members for row in rows])
    if chosen is not None:
        values = cells["value"].xs(chosen, level="column").reindex(range(len(rows)))
        order = values.sort_values(ascending=not descending, kind="stable", na_position="last").index
        rows = [rows[index] for index in order]
        cells = cells.rename(index={old: new for new, old in enumerate(order)}, level="row").sort_index()
    row_of = {run: place for place, row in enumerate(rows) for run in row.members}
    base = None if baseline is None else row_of[baseline]
    cells, tests = with_differences(runs, cells, base, columns)
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
