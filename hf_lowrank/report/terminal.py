"""A report's tables for a terminal.

A report may come from anybody, so its texts are shown without control characters and never read as rich's markup.
"""

from rich.table import Table
from rich.text import Text

from hf_lowrank.report.markdown import one_line
from hf_lowrank.report.model import Report
from hf_lowrank.report.tables import evaluation_rows, fact_rows, headline_rows
from hf_lowrank.report.values import format_value

__all__ = ["evaluations_table", "facts_table", "headline_table"]


def facts_table(report: Report) -> Table:
    """Return the facts of the run."""
    table = Table(title=_plain(report.run.name), title_justify="left", show_header=False)
    for fact in fact_rows(report):
        _add(table, fact.label, fact.text)
    return table


def headline_table(report: Report, title: str = "metrics") -> Table:
    """Return the headline metrics with their standard errors."""
    table = _table(title, "", "metric", "value", "weights", "step")
    for row in headline_rows(report):
        other = row.entry.settings.get("other", row.entry.reference.get("other"))
        name = row.metric.name if other is None else f"{row.metric.name} ({other})"
        _add(table, row.metric.id, name, row.text, row.entry.space, row.entry.step)
    return table


def evaluations_table(report: Report) -> Table:
    """Return the downstream results with their standard errors."""
    table = _table("downstream tasks", "task", "metric", "value", "few-shot", "limit", "step")
    for entry in evaluation_rows(report):
        value = format_value(entry.value, entry.stderr)
        _add(table, entry.task, entry.metric, value, entry.num_fewshot, entry.limit, entry.step)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=_plain(title), title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _add(table: Table, *cells: object) -> None:
    table.add_row(*(_plain("" if cell is None else cell) for cell in cells))


def _plain(text: object) -> Text:
    return Text(one_line(text))
