"""A report's tables for a terminal.

A report may come from anybody: its texts are shown as they are, without control characters, which a terminal would
obey, and without rich's markup.
"""

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from hf_lowrank.report.markdown import one_line
from hf_lowrank.report.tables import evaluation_rows, fact_rows, format_value, headline_rows

__all__ = ["evaluations_table", "facts_table", "headline_table"]


def facts_table(report: Mapping[str, Any]) -> Table:
    """What the run was, line by line."""
    table = Table(title=_plain(report["run"]["name"]), title_justify="left", show_header=False)
    for fact in fact_rows(report):
        _add(table, fact.label, fact.text)
    return table


def headline_table(report: Mapping[str, Any], title: str = "metrics") -> Table:
    """The headline metrics with their standard errors."""
    table = _table(title, "", "metric", "value", "weights", "step")
    for row in headline_rows(report):
        other = row.settings.get("other")
        name = f"{row.name} ({other})" if other is not None else row.name
        _add(table, row.id, name, row.text, row.space, row.step)
    return table


def evaluations_table(report: Mapping[str, Any]) -> Table:
    """The downstream results with their standard errors."""
    table = _table("downstream tasks", "task", "metric", "value", "few-shot", "limit", "step")
    for row in evaluation_rows(report):
        value = format_value(row["value"], row["stderr"])
        _add(table, row["task"], row["metric"], value, row["num_fewshot"], row["limit"], row["step"])
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
