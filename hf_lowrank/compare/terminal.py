"""A comparison on the terminal: what is not comparable first, then the runs, then their metrics."""

from collections.abc import Sequence

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from hf_lowrank.compare.frame import Cell, Comparison
from hf_lowrank.report.significance import stars

__all__ = ["print_comparison"]

_METRIC_WIDTH, _RUN_WIDTH = 44, 31  # characters
_COSTS = ("parameters_trained", "optimizer_state_bytes", "peak_memory_bytes", "wall_time_seconds")


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print notices, runs, headline metrics, tasks and costs; names come out as text, whatever they hold."""
    if comparison.conflicts:
        lines = "\n".join(f"• {notice.line}" for notice in comparison.conflicts)
        console.print(Panel(Text(lines), title="NOT COMPARABLE", border_style="bold red", title_align="left"))
    console.print(_runs(comparison))
    costs = {index for index, column in enumerate(comparison.columns) if column.name in _COSTS}
    columns = sorted({*comparison.usual, *costs})
    block = max(1, (console.width - _METRIC_WIDTH) // _RUN_WIDTH)
    for start in range(0, len(comparison.rows), block):
        rows = range(start, min(start + block, len(comparison.rows)))
        console.print(_metrics(comparison, columns, rows))
    for notice in comparison.notices:
        if notice.level == "note":
            console.print(Text(f"note: {notice.line}", style="dim"))


def _runs(comparison: Comparison) -> Table:
    table = Table(title="runs", title_justify="left")
    sort = None if comparison.sort is None else comparison.columns[comparison.sort]
    sorted_by = [] if sort is None else [f"{sort.title} {'↓' if comparison.descending else '↑'}"]
    for column in ("run", "method", "seed", "tokens seen", "learning rate", *sorted_by, "not comparable in"):
        table.add_column(column, overflow="fold")
    for index, row in enumerate(comparison.rows):
        facts = {fact.key: fact.text for fact in row.facts}
        cell = None if comparison.sort is None else row.cells.get(comparison.sort)
        table.add_row(
            Text(row.label + (" (baseline)" if index == comparison.baseline else "")),
            Text(row.method),
            Text(", ".join("?" if seed is None else str(seed) for seed in row.seeds)),
            Text(facts["tokens_seen"]),
            Text(facts["learning_rate"]),
            *([] if sort is None else [Text(cell.text if cell else "")]),
            Text(", ".join(row.differs), style="bold red"),
        )
    return table


def _metrics(comparison: Comparison, columns: Sequence[int], rows: Sequence[int]) -> Table:
    table = Table(title="metrics", title_justify="left")
    table.add_column("metric", overflow="fold", max_width=_METRIC_WIDTH)
    for index in rows:
        row = comparison.rows[index]
        table.add_column(Text(row.label + (" ≠" if row.differs else "")), justify="right", overflow="fold")
    for index in columns:
        cells = [comparison.rows[row].cells.get(index) for row in rows]
        if any(cells):
            title = Text(comparison.columns[index].title)
            table.add_row(title, *(Text("") if cell is None else _cell(cell) for cell in cells))
    return table


def _cell(cell: Cell) -> Text:
    text = Text(cell.text)
    if cell.delta_text:
        marks = stars(None if cell.delta is None else cell.delta.p)
        text.append(f"\n{cell.delta_text} {marks}".rstrip(), style="dim")
    return text
