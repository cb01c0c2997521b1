"""A comparison as text: CSV and Markdown."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from hf_lowrank.compare.table import Comparison
from hf_lowrank.report.markdown import Markdown, escape, one_line
from hf_lowrank.report.significance import UNPAIRED
from hf_lowrank.report.values import UNKNOWN

__all__ = [
    "ENVIRONMENT", "csv_text", "heading", "metrics_csv", "render_markdown", "runs_csv", "significance_text",
]  # fmt: skip

_SHOWN_FACTS = ("method", "method_config", "model", "tokens_seen", "steps", "learning_rate", "seeds")
_METRIC_FIELDS = [
    "run", "method", "seeds", "metric", "id", "label", "weights", "settings", "at", "step", "from_step", "to_step",
    "weight", "value", "stderr", "n_seeds", "delta", "delta_stderr", "dof", "p", "q", "test", "paired",
    "not_comparable_in", "note", "differs_in",
]  # fmt: skip
ENVIRONMENT = Environment(
    loader=PackageLoader("hf_lowrank.compare", "templates"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def heading(comparison: Comparison) -> str:
    """Return a short title of the comparison."""
    count = len(comparison.runs)
    place = "" if comparison.at is None else f" at {comparison.at}"
    return f"{count} pre-training run{'s' if count > 1 else ''} compared{place}"


def significance_text(comparison: Comparison) -> list[str]:
    """Return what readers must know of the differences and their p-values, a paragraph each."""
    text = ENVIRONMENT.get_template("reading.txt.jinja").render(
        baseline=None if comparison.baseline is None else comparison.rows[comparison.baseline],
        grouped=comparison.grouped,
        tests=comparison.tests,
        unpaired=bool((comparison.cells["test"] == "unpaired").any()),
        mark=UNPAIRED,
    )
    return text.split("\n\n")


# ---- CSV ----


def metrics_csv(comparison: Comparison) -> str:
    """Return all numbers with full precision, one line for each row and metric."""
    rows = pd.DataFrame(
        {
            "run": [row.label for row in comparison.rows],
            "method": [row.method for row in comparison.rows],
            "seeds": [" ".join(map(str, row.seeds)) for row in comparison.rows],
            "not_comparable_in": ["; ".join(row.differs) for row in comparison.rows],
            "differs_in": ["; ".join(row.notes) for row in comparison.rows],
        }
    )
    columns = pd.DataFrame(comparison.columns).rename(columns={"name": "metric", "space": "weights"})
    table = comparison.cells.reset_index().join(rows, on="row").join(columns.drop(columns="kind"), on="column")
    whole = table["unit"].isin(("count", "bytes"))
    for name in ("value", "delta"):
        table[name] = [_exact(value, count) for value, count in zip(table[name], whole, strict=True)]
    table["paired"] = table["paired"].where(table["test"].notna())
    table["note"] = table["note"].where(table["note"] != "", table["why"])
    table["at"] = comparison.at or ""
    return csv_text(table[_METRIC_FIELDS])


def _exact(value: float, whole: bool) -> float | int:
    """Return a whole count without a decimal point; a mean over seeds need not be whole."""
    return int(value) if whole and value == value // 1 else value


def runs_csv(comparison: Comparison) -> str:
    """Return the facts of the runs, one line for each row."""
    lines = [
        {
            "run": row.label,
            "repo": " ".join(row.repos),
            "n_seeds": len(row.members),
            "not_comparable_in": "; ".join(row.differs),
            "differs_in": "; ".join(row.notes),
            **{fact.key: fact.text for fact in row.facts},
        }
        for row in comparison.rows
    ]
    return csv_text(pd.DataFrame(lines))


def csv_text(table: pd.DataFrame) -> str:
    """Return a table as CSV in which no text is a formula."""
    return str(table.map(_spreadsheet_safe).to_csv(index=False, lineterminator="\n"))


def _spreadsheet_safe(field: object) -> object:
    """Keep a spreadsheet from reading a text as a formula: others choose names and settings."""
    if isinstance(field, str):
        text = one_line(field)
        return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
    return field


# ---- Markdown ----


def render_markdown(comparison: Comparison, figures: Sequence[str] = ()) -> str:
    """Return the comparison as Markdown; `figures` are paths of pictures to show."""

    def show(cell: Any) -> str:
        delta = f" ({cell.delta_text}{f' {cell.marks}' if cell.marks else ''})" if cell.delta_text else ""
        note = f" [{cell.note}]" if cell.note else ""
        return f"{cell.text}{delta}{note}{' ≠' if comparison.rows[cell.Index[0]].differs else ''}"

    cells = comparison.pivot(show).T.fillna("")
    cells.insert(0, "metric", [column.title for column in comparison.columns])
    header = ["metric", *(_head(comparison, index) for index in range(len(comparison.rows)))]
    groups = pd.Series([column.group for column in comparison.columns])
    tables = [("Runs", *_runs_table(comparison))]
    for group in groups.unique():
        tables.append((group, header, cells[groups == group].values.tolist()))
    environment = ENVIRONMENT.overlay(finalize=escape)
    environment.filters["raw"] = Markdown
    return environment.get_template("comparison.md.jinja").render(
        heading=heading(comparison),
        conflicts=comparison.conflicts,
        notes=comparison.notes,
        tables=tables,
        reading=significance_text(comparison),
        figures=figures,
    )


def _head(comparison: Comparison, index: int) -> str:
    tested = comparison.tested(index)
    return comparison.rows[index].label + (f" ({tested})" if tested else "")


def _runs_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    labels = {fact.key: fact.label for row in comparison.rows for fact in row.facts}
    shown = [*_SHOWN_FACTS, *(["taken_at"] if comparison.at else [])]
    lines = []
    for index, row in enumerate(comparison.rows):
        facts = {fact.key: fact.text for fact in row.facts}
        facts["seeds"] = ", ".join(UNKNOWN if seed is None else str(seed) for seed in row.seeds)
        mark = " (baseline)" if index == comparison.baseline else ""
        differs = f"≠ {', '.join(row.differs)}" if row.differs else ""
        lines.append([row.label + mark, *(facts.get(key, "") for key in shown), differs])
    return ["run", *(labels.get(key, key) for key in shown), "not comparable in"], lines
