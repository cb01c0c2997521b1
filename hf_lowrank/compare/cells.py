"""The cells of a comparison's table: a number, its error, its difference to the baseline's, and their texts."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from hf_lowrank.compare.frame import Column, ComparedRun
from hf_lowrank.report.comparability import data_order
from hf_lowrank.report.markdown import one_line
from hf_lowrank.report.significance import Delta, Sample, corrected, difference, tested_number
from hf_lowrank.report.values import format_bytes, format_count, format_duration, format_value

__all__ = ["cells_of", "with_differences"]


def cells_of(points: pd.DataFrame, columns: Sequence[Column], rows: Sequence[tuple[int, ...]]) -> pd.DataFrame:
    """Return the table's cells without differences; a cell of several seeds has their mean and its error.

    Args:
        points: all numbers.
        columns: of the table.
        rows: of the table, each as the indices of its runs.
    """
    row_of = {run: place for place, members in enumerate(rows) for run in members}
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
    cells["note"] = [_note(cell, len(rows[cell.Index[0]])) for cell in cells.itertuples()]
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


def with_differences(
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
