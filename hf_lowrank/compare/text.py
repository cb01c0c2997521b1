"""A comparison as text: CSV, Markdown and the terminal's tables."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from hf_lowrank.compare.notices import Notice
from hf_lowrank.compare.table import Comparison
from hf_lowrank.report.markdown import escape, one_line

__all__ = ["heading", "metrics_csv", "print_comparison", "render_markdown", "runs_csv", "significance_text"]

_SHOWN_FACTS = ("method", "method_config", "model", "tokens_seen", "steps", "learning_rate", "seeds")
_METRIC_FIELDS = [
    "run", "method", "seeds", "metric", "id", "label", "weights", "settings", "step", "value", "stderr", "n_seeds",
    "delta", "delta_stderr", "p", "test", "not_comparable_in", "note", "differs_in",
]  # fmt: skip
_METRIC_WIDTH, _RUN_WIDTH = 44, 31  # characters of the terminal
_SHOWN_COSTS = ("parameters_trained", "optimizer_state_bytes", "peak_memory_bytes", "wall_time_seconds")


def heading(comparison: Comparison) -> str:
    """Return the comparison in a few words."""
    count = len(comparison.runs)
    return f"{count} pre-training run{'s' if count > 1 else ''} compared"


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


# ---- CSV ----


def metrics_csv(comparison: Comparison) -> str:
    """Return all numbers, a line a row and metric, with full precision."""
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
    table["note"] = table["note"].where(table["note"] != "", table["why"])
    return _csv(table[_METRIC_FIELDS])


def _exact(value: float, whole: bool) -> float | int:
    """Counts without a decimal point, as far as they are whole: over seeds they need not be."""
    return int(value) if whole and value == value // 1 else value


def runs_csv(comparison: Comparison) -> str:
    """Return what the runs were, a line a row."""
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
    return _csv(pd.DataFrame(lines))


def _csv(table: pd.DataFrame) -> str:
    return str(table.map(_spreadsheet_safe).to_csv(index=False, lineterminator="\n"))


def _spreadsheet_safe(field: object) -> object:
    """Keep a spreadsheet from taking a text for a formula: names and settings are chosen by others."""
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

    table = comparison.pivot(show).T.fillna("")
    table.insert(0, "metric", [column.title for column in comparison.columns])
    header = ["metric", *(row.label for row in comparison.rows)]
    parts = [f"# {heading(comparison)}", *_notices(comparison.notices), "## Runs", _runs_table(comparison)]
    for group in dict.fromkeys(column.group for column in comparison.columns):
        chosen = [index for index, column in enumerate(comparison.columns) if column.group == group]
        parts += [f"## {escape(group)}", _table(header, table.iloc[chosen].values.tolist())]
    parts += ["## How to read this", *significance_text(comparison)]
    if figures:
        parts += ["## Figures", *(f"![{escape(name)}]({name})" for name in figures)]
    return "\n\n".join(parts) + "\n"


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


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    texts = [[escape(cell) for cell in line] for line in (header, *lines)]
    rule = "| --- " * len(header) + "|"
    shown = ["| " + " | ".join(line) + " |" for line in texts]
    return "\n".join([shown[0], rule, *shown[1:]])


# ---- the terminal ----


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print notices, runs, headline metrics, tasks and costs; names come out as text, whatever they hold."""
    if comparison.conflicts:
        lines = "\n".join(f"• {notice.line}" for notice in comparison.conflicts)
        console.print(Panel(Text(lines), title="NOT COMPARABLE", border_style="bold red", title_align="left"))
    console.print(_terminal_runs(comparison))
    costs = {index for index, column in enumerate(comparison.columns) if column.name in _SHOWN_COSTS}
    table = comparison.pivot(_terminal_cell)[sorted({*comparison.usual, *costs})]
    block = max(1, (console.width - _METRIC_WIDTH) // _RUN_WIDTH)
    for start in range(0, len(comparison.rows), block):
        console.print(_terminal_metrics(comparison, table.iloc[start : start + block]))
    for notice in comparison.notices:
        if notice.level == "note":
            console.print(Text(f"note: {notice.line}", style="dim"))


def _terminal_runs(comparison: Comparison) -> Table:
    table = Table(title="runs", title_justify="left")
    sort = None if comparison.sort is None else comparison.columns[comparison.sort]
    sorted_by = [] if sort is None else [f"{sort.title} {'↓' if comparison.descending else '↑'}"]
    for column in ("run", "method", "seed", "tokens seen", "learning rate", *sorted_by, "not comparable in"):
        table.add_column(column, overflow="fold")
    sorted_texts = None if sort is None else comparison.pivot(lambda cell: cell.text)[comparison.sort]
    for index, row in enumerate(comparison.rows):
        facts = {fact.key: fact.text for fact in row.facts}
        table.add_row(
            Text(row.label + (" (baseline)" if index == comparison.baseline else "")),
            Text(row.method),
            Text(", ".join("?" if seed is None else str(seed) for seed in row.seeds)),
            Text(facts["tokens_seen"]),
            Text(facts["learning_rate"]),
            *([] if sorted_texts is None else [Text(sorted_texts[index] or "")]),
            Text(", ".join(row.differs), style="bold red"),
        )
    return table


def _terminal_metrics(comparison: Comparison, cells: pd.DataFrame) -> Table:
    table = Table(title="metrics", title_justify="left")
    table.add_column("metric", overflow="fold", max_width=_METRIC_WIDTH)
    for index in cells.index:
        row = comparison.rows[index]
        table.add_column(Text(row.label + (" ≠" if row.differs else "")), justify="right", overflow="fold")
    for column, texts in cells.items():
        if texts.notna().any():
            shown = [Text("") if text is None else text for text in texts]
            table.add_row(Text(comparison.columns[int(str(column))].title), *shown)
    return table


def _terminal_cell(cell: Any) -> Text:
    text = Text(cell.text)
    if cell.delta_text:
        text.append(f"\n{cell.delta_text} {cell.marks}".rstrip(), style="dim")
    return text
