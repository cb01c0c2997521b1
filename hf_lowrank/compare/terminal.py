"""A comparison on the terminal: what does not compare, the runs, and their headline metrics, runs as columns."""

import math
import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from hf_lowrank.compare.notices import folded
from hf_lowrank.compare.table import Comparison
from hf_lowrank.compare.text import heading
from hf_lowrank.report.catalogue import headline_metric
from hf_lowrank.report.comparability import PEER
from hf_lowrank.report.markdown import one_line
from hf_lowrank.report.significance import UNPAIRED
from hf_lowrank.report.values import format_bytes

__all__ = ["compact", "print_comparison"]

_METRIC_WIDTH = 28  # characters of the first column
_NARROW, _WIDE = 11, 34  # characters of a run's: below _WIDE its numbers are written in short
_FEW_FACTS = ("tokens_seen", "learning_rate")


def print_comparison(comparison: Comparison, console: Console, everything: bool = False) -> None:
    """Print notices, runs and headline metrics; no name is read as markup.

    Args:
        comparison: what is compared.
        console: six runs fit into 100 columns; more runs than fit go into several tables.
        everything: also the other metrics, tasks, costs, and every notice by itself.
    """
    conflicts, notes = (
        [notice.line for notice in notices] if everything else folded(notices)
        for notices in (comparison.conflicts, comparison.notes)
    )
    if conflicts:
        lines = "\n".join(f"• {line}" for line in conflicts)
        console.print(Panel(Text(lines), title="NOT COMPARABLE", border_style="bold red", title_align="left"))
    if comparison.at:
        console.print(Text(heading(comparison), style="bold"))
    console.print(_runs(comparison))
    shown = _shown(comparison, everything)
    room = max(1, (console.width - _METRIC_WIDTH) // (_NARROW + 1))
    for start in range(0, len(comparison.rows), room):
        rows = range(start, min(start + room, len(comparison.rows)))
        width = (console.width - _METRIC_WIDTH) // len(rows) - 1
        console.print(_metrics(comparison, shown, rows, width))
    for line in _legend(comparison, console.width):
        console.print(Text(line, style="dim"))
    for line in notes:
        console.print(Text(f"note: {line}", style="dim"))


def _shown(comparison: Comparison, everything: bool) -> list[int]:
    """Return the columns to show: those that most readers look for of each headline metric, and the one to sort by."""
    if everything:
        return list(range(len(comparison.columns)))
    return [
        index
        for index in comparison.usual
        if index == comparison.sort or headline_metric(comparison.columns[index].name) is not None
    ]


def _runs(comparison: Comparison) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    sorted_by: list[str] = []
    sorted_texts: Mapping[int, str] = {}
    if comparison.sort is not None:
        sorted_by = [f"{comparison.columns[comparison.sort].title} {'↓' if comparison.descending else '↑'}"]
        sorted_texts = comparison.cells["text"].xs(comparison.sort, level="column").to_dict()
    places = ["taken at"] if comparison.at else []
    differs = ["not comparable in"] if any(row.differs for row in comparison.rows) else []
    heads = (
        "run",
        "method",
        "seed",
        "tokens seen",
        "rate",
        "optimizer state",
        "tokens/s",
        *places,
        *sorted_by,
        *differs,
    )
    for column in heads:
        table.add_column(column, overflow="fold")
    for index, row in enumerate(comparison.rows):
        facts = {fact.key: fact.text for fact in row.facts}
        run = comparison.runs[row.members[0]].report.run
        table.add_row(
            Text(row.label + (" (baseline)" if index == comparison.baseline else "")),
            Text(row.method),
            Text(", ".join("?" if seed is None else str(seed) for seed in row.seeds)),
            *(Text(facts[key]) for key in _FEW_FACTS),
            Text(format_bytes(run.optimizer_state_bytes.best) or ""),
            Text(facts.get("tokens_per_second", "")),
            *(Text(facts["taken_at"]) for _ in places),
            *(Text(sorted_texts.get(index, "")) for _ in sorted_by),
            *(Text(", ".join(row.differs), style="bold red") for _ in differs),
        )
    return table


def _metrics(comparison: Comparison, shown: Sequence[int], rows: range, width: int) -> Table:
    """Return metrics by family for some of the runs, each with `width` characters."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, pad_edge=False)
    table.add_column("", width=_METRIC_WIDTH - 1, overflow="fold")
    for index in rows:
        row = comparison.rows[index]
        name = row.label + (" ≠" if row.differs else "")
        head = Text("\n".join(textwrap.wrap(name, width) or [name]))
        if width >= _WIDE and (tested := comparison.tested(index)):
            head.append(f"\n{tested}", style="dim")
        table.add_column(head, justify="right", width=width, overflow="fold")
    texts = comparison.pivot(lambda cell: _cell(cell, comparison, width)).loc[list(rows), list(shown)]
    labels, group = _labels(comparison, shown), None
    for column, label in zip(shown, labels, strict=True):
        if texts[column].isna().all():
            continue
        if comparison.columns[column].group != group:
            group = comparison.columns[column].group
            table.add_row(Text(group, style="bold"))
        table.add_row(Text(label), *(Text("") if text is None else text for text in texts[column]))
    return table


def _labels(comparison: Comparison, shown: Sequence[int]) -> list[str]:
    """Return what each shown column is called: its weights and the other run only where they tell columns apart."""
    columns = [comparison.columns[index] for index in shown]
    of_name = Counter(column.name for column in columns)
    spaces = {name: {c.space for c in columns if c.name == name} for name in of_name}
    first = comparison.points.drop_duplicates("column").set_index("column")["number"]
    labels = []
    for index, column in zip(shown, columns, strict=True):
        parts = [column.space] if column.space and len(spaces[column.name]) > 1 else []
        if of_name[column.name] > 1 and PEER in first[index].settings:
            parts.append(one_line(first[index].settings[PEER]))
        named = f"{column.id} {column.label}" if column.id else column.label
        labels.append(f"{named} ({', '.join(parts)})" if parts else named)
    twice = Counter(labels)
    # rare: the same metric with other settings
    return [column.title if twice[label] > 1 else label for label, column in zip(labels, columns, strict=True)]


def _cell(cell: Any, comparison: Comparison, width: int) -> Text:
    wide = width >= _WIDE
    measured = comparison.columns[cell.Index[1]].kind != "cost"
    text = Text(cell.text if wide or not measured else compact(cell.value, cell.stderr, width))
    if not cell.delta_text:
        return text
    if wide:
        return text.append(f"\n{cell.delta_text} {cell.marks}".rstrip(), style="dim")
    if not measured:
        return text.append(f"\n{cell.delta_text}", style="dim")
    marks = cell.marks.replace(" ", "")
    sign = "−" if cell.delta < 0 else "+" if cell.delta > 0 else ""
    delta = f"{sign}{_short(abs(cell.delta))}"
    apart = " " if marks and len(delta) + len(marks) < width else ""
    return text.append(f"\n{delta}{apart}{marks}", style="dim")


def compact(value: float, stderr: float, width: int = _NARROW) -> str:
    """Return `4.67(10)` for 4.67 ± 0.10: the error of the last digits in brackets, its second one if there is room."""
    if not math.isfinite(value):
        return "n/a"
    if not (math.isfinite(stderr) and stderr > 0):
        return _short(value, 4)
    for digits in (2, 1):
        error = Decimal(f"{stderr:.{digits - 1}e}")
        size = max(abs(Decimal(value)), error)
        exponent = 0 if Decimal("1e-3") <= size < Decimal("1e6") else size.adjusted()
        place = error.adjusted() - digits + 1 - exponent
        scaled = Decimal(value).scaleb(-exponent)
        text = f"{scaled:z.{max(-place, 0)}f}({int(error.scaleb(-exponent - min(place, 0)).to_integral_value())})"
        text += f"e{exponent}" if exponent else ""
        if len(text) <= width:
            break
    return text


def _short(value: float, digits: int = 2) -> str:
    """Return a number with so many digits, without trailing noise in its exponent."""
    size = abs(value)
    if size == 0 or 1e-3 <= size < 1e6:
        decimals = max(digits - 1 - Decimal(value).adjusted(), 0) if size else 0
        return f"{value:.{decimals}f}"
    return re.sub(r"e([+-])0*(\d)", lambda found: f"e{found[1].strip('+')}{found[2]}", f"{value:.{digits - 1}e}")


def _legend(comparison: Comparison, width: int) -> list[str]:
    """Return how the numbers of the table are read."""
    rows = min(len(comparison.rows), max(1, (width - _METRIC_WIDTH) // (_NARROW + 1)))
    if (width - _METRIC_WIDTH) // rows - 1 >= _WIDE:
        return []
    lines = ["4.67(10) is 4.67 ± 0.10, one standard error."]
    if comparison.baseline is not None:
        marks = " * q < 0.05, ** q < 0.01, *** q < 0.001."
        marks += f" {UNPAIRED} unpaired." if (comparison.cells["test"] == "unpaired").any() else ""
        lines[0] += f" Below it the difference to {comparison.rows[comparison.baseline].label}:{marks}"
        about = dict.fromkeys(filter(None, map(comparison.tested, range(len(comparison.rows)))))
        lines += list(about)
    return lines
