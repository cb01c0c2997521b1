"""A comparison as CSV and as Markdown."""

import csv
import io
from collections.abc import Sequence

from hf_lowrank.compare.frame import Cell, Column, Comparison, Row
from hf_lowrank.compare.notices import Notice
from hf_lowrank.report.markdown import escape, one_line
from hf_lowrank.report.significance import stars

__all__ = ["heading", "metrics_csv", "render_markdown", "runs_csv", "significance_text"]

_METRIC_FIELDS = (
    "run", "method", "seeds", "metric", "id", "label", "weights", "settings", "step", "value", "stderr", "n_seeds",
    "delta", "delta_stderr", "p", "test", "not_comparable_in", "note",
)  # fmt: skip


def significance_text(comparison: Comparison) -> list[str]:
    """Return what must be said of the differences and their p-values, a sentence or two each."""
    said = []
    if comparison.baseline is not None:
        said.append(
            f"Differences are to {comparison.rows[comparison.baseline].label}, with both standard errors combined "
            "(root of the sum of squares); for costs in percent. Marks: * p < 0.05, ** p < 0.01, *** p < 0.001."
        )
        if comparison.grouped:
            said.append(
                "Between rows of two or more seeds p is that of Welch's t-test over the seeds, two-sided; a row of "
                "one seed is tested against another of one seed alone, as follows."
            )
        said.append(
            "Between single runs p is two-sided from z = Δ / √(se² + se²). These errors are those of the measurement "
            "(validation sequences, random directions): a small p says that the two trained models differ, not that "
            "their methods do. Where both runs were measured on the same sequences their errors go together and p is "
            "rather too large. A number without a standard error is not tested."
        )
        if comparison.tests:
            said.append(
                f"{comparison.tests} differences were tested and p is not corrected for that: about "
                f"{max(1, round(0.05 * comparison.tests))} would fall below 0.05 by chance."
            )
    over = " Of several seeds a value is their mean, with the standard error over seeds." if comparison.grouped else ""
    said.append(f"Values are those of each run's last measured step, ± one standard error.{over}")
    return said


def metrics_csv(comparison: Comparison) -> str:
    """Return all numbers, a line a row and metric, with full precision."""
    lines = []
    for row in comparison.rows:
        for index, column in enumerate(comparison.columns):
            if index in row.cells:
                lines.append(_csv_line(row, column, row.cells[index]))
    return _csv([_METRIC_FIELDS, *lines])


def _csv_line(row: Row, column: Column, cell: Cell) -> Sequence[object]:
    delta = cell.delta
    return (
        row.label, row.method, " ".join(map(str, row.seeds)), column.name, column.id, column.label, column.space,
        column.settings, cell.step, cell.value, cell.stderr, cell.seeds,
        *((None,) * 4 if delta is None else (delta.value, delta.stderr, delta.p, delta.test)),
        "; ".join(row.differs), cell.note or (delta.why if delta else None),
    )  # fmt: skip


def runs_csv(comparison: Comparison) -> str:
    """Return what the runs were, a line a row."""
    keys = list(dict.fromkeys(fact.key for row in comparison.rows for fact in row.facts))
    lines = []
    for row in comparison.rows:
        facts = {fact.key: fact.text for fact in row.facts}
        told = (row.label, " ".join(row.repos), len(row.members), "; ".join(row.differs))
        lines.append((*told, *(facts.get(key) for key in keys)))
    return _csv([("run", "repo", "n_seeds", "not_comparable_in", *keys), *lines])


def _csv(lines: Sequence[Sequence[object]]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([_spreadsheet_safe(field) for field in line] for line in lines)
    return stream.getvalue()


def _spreadsheet_safe(field: object) -> object:
    """Keep a spreadsheet from taking a text for a formula: names and settings are chosen by others."""
    if isinstance(field, str):
        text = one_line(field)
        return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
    return field


def render_markdown(comparison: Comparison, figures: Sequence[str] = ()) -> str:
    """Return the comparison as Markdown; `figures` are paths of pictures to show."""
    parts = [f"# {heading(comparison)}", *_notices(comparison.notices), "## Runs", _runs_table(comparison)]
    for group in dict.fromkeys(column.group for column in comparison.columns):
        chosen = [i for i, column in enumerate(comparison.columns) if column.group == group]
        parts += [f"## {escape(group)}", _metrics_table(comparison, chosen)]
    parts += ["## How to read this", *significance_text(comparison)]
    if figures:
        parts += ["## Figures", *(f"![{escape(name)}]({name})" for name in figures)]
    return "\n\n".join(parts) + "\n"


def heading(comparison: Comparison) -> str:
    """Return the comparison in a few words."""
    count = len(comparison.runs)
    return f"{count} pre-training run{'s' if count > 1 else ''} compared"


def _notices(notices: Sequence[Notice]) -> list[str]:
    conflicts = [notice for notice in notices if notice.level == "conflict"]
    others = [notice for notice in notices if notice.level == "note"]
    said = []
    if conflicts:
        lines = [f"> - **{escape(n.title)}**: {_rest(n)}" for n in conflicts]
        said.append("\n".join(["> **NOT COMPARABLE** in some respects:", ">", *lines]))
    if others:
        said.append("\n".join(["Notes:", "", *(f"- {escape(n.title)}: {_rest(n)}" for n in others)]))
    return said


def _rest(notice: Notice) -> str:
    values = "; ".join(f"{value} ({labels})" for value, labels in notice.shown)
    return escape(". ".join(part for part in (notice.text, values) if part))


_SHOWN_FACTS = ("method", "method_config", "model", "tokens_seen", "steps", "learning_rate", "seeds")


def _runs_table(comparison: Comparison) -> str:
    labels = {fact.key: fact.label for row in comparison.rows for fact in row.facts}
    lines = []
    for index, row in enumerate(comparison.rows):
        facts = {fact.key: fact.text for fact in row.facts}
        seeds = ", ".join("not recorded" if seed is None else str(seed) for seed in row.seeds)
        marks = " (baseline)" if index == comparison.baseline else ""
        differs = f"≠ {', '.join(row.differs)}" if row.differs else ""
        shown = [seeds if key == "seeds" else facts.get(key, "") for key in _SHOWN_FACTS]
        lines.append([row.label + marks, *shown, differs])
    return _table(["run", *(labels.get(key, key) for key in _SHOWN_FACTS), "not comparable in"], lines)


def _metrics_table(comparison: Comparison, columns: Sequence[int]) -> str:
    lines = []
    for index in columns:
        column = comparison.columns[index]
        cells = [row.cells.get(index) for row in comparison.rows]
        lines.append(
            [
                column.title,
                *("" if cell is None else _cell(cell, row) for cell, row in zip(cells, comparison.rows, strict=True)),
            ]
        )
    return _table(["metric", *(row.label for row in comparison.rows)], lines)


def _cell(cell: Cell, row: Row) -> str:
    delta = "" if not cell.delta_text else f" ({cell.delta_text}{_marks(cell)})"
    note = f" [{cell.note}]" if cell.note else ""
    return f"{cell.text}{delta}{note}{' ≠' if row.differs else ''}"


def _marks(cell: Cell) -> str:
    marks = stars(None if cell.delta is None else cell.delta.p)
    return f" {marks}" if marks else ""


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    text = ["| " + " | ".join(cell if row is rows[1] else escape(cell) for cell in row) + " |" for row in rows]
    return "\n".join(text)
