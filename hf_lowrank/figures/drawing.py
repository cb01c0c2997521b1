"""What all pictures share: colours, panels, axes, legends and labels."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import takewhile
from textwrap import fill
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, Locator, MaxNLocator, StrMethodFormatter

from hf_lowrank.figures.tables import lines
from hf_lowrank.report.catalogue import HeadlineMetric
from hf_lowrank.report.markdown import one_line

__all__ = [
    "COLOURS", "MARKED_POINTS", "STYLE", "evenly", "figure_title", "label", "legend_below", "line_style", "marker",
    "metric_axis", "metrics_over_steps", "new_figure", "panel_grid", "panel_title", "sequential", "short_names",
    "space_notes", "step_axis", "value_scale", "whole_numbers",
]  # fmt: skip

# Okabe and Ito's palette, which colour-blind readers can tell apart, without its yellow, too pale on white
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LINES = ("-", "--", ":", "-.")
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    # a tick says its value: no "+3.586e1" beside the axis to add to it
    "axes.formatter.useoffset": False,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "savefig.bbox": None,
}
MARKED_POINTS = 40  # beyond this many points a line goes without markers
_LONGEST_NAME = 36  # characters of a run's name that a picture has room for
_LONGEST_TITLE = 36  # characters that fit the width of a panel


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of so many inches, independent of pyplot."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def panel_grid(count: int, columns: int = 3) -> tuple[Figure, list[Axes]]:
    """Return a figure with `count` panels in rows of at most `columns`."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = new_figure(1.2 + 3.0 * columns, 1.1 + 2.4 * rows)
    return figure, [figure.add_subplot(rows, columns, index + 1) for index in range(count)]


def figure_title(figure: Figure, title: str, *notes: str) -> None:
    """Put a title over all panels, followed by notes that hold for all of them."""
    figure.suptitle(f"{title}: {', '.join(notes)}" if notes else title, fontsize=10.5)


def panel_title(axes: Axes, *parts: str) -> None:
    """Put a title over one panel; a long one is broken at a comma, or in the middle if it has none."""
    text = ", ".join(parts)
    if len(text) > _LONGEST_TITLE:
        before, comma, _ = text[: _LONGEST_TITLE + 1].rpartition(", ")
        text = f"{before},\n{text[len(before) + 2 :]}" if comma else fill(text, len(text) // 2 + 4)
    axes.set_title(text)


def space_notes(spaces: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Return what titles say of the panels' spaces: the figure's if all have one, else the panels'."""
    if len(set(spaces)) == 1:
        return ([f"{spaces[0]} weights"] if spaces[0] else []), [[] for _ in spaces]
    return [], [[f"{space} weights"] if space else [] for space in spaces]


def metric_axis(axes: Axes, metric: HeadlineMetric, low: float, high: float) -> None:
    """Put the metric's name and unit on the axes and choose the scale for values from `low` to `high`."""
    panel_title(axes, metric.label)
    axes.set_ylabel(metric.axis)
    value_scale(axes, low, high)


def value_scale(axes: Axes, low: float, high: float) -> None:
    """Make the vertical axis logarithmic if the values span more than a factor of 50."""
    if low > 0 and high / low > 50:  # the first update of a run is often a hundred times the later ones
        axes.set_yscale("log")


def step_axis(axes: Axes, steps: "pd.Series[Any]") -> None:
    """Make the horizontal axis that of the optimizer steps; `steps` are all of the figure."""
    first, last = steps.min(), steps.max()
    margin = 0.03 * (last - first) or 0.5
    axes.set_xlim(first - margin, last + margin)
    axes.xaxis.set_major_locator(whole_numbers(first, last))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("optimizer step")


def whole_numbers(first: float, last: float) -> Locator:
    """Return ticks at whole numbers."""
    # between two whole numbers MaxNLocator would tick fractions, integer=True or not
    return FixedLocator([first]) if first == last else MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], integer=True)


def marker(points: int) -> str | None:
    """Return the marker of a figure's only kind of line, None for a line of many points."""
    return "o" if points <= MARKED_POINTS else None


def line_style(index: int, points: int) -> dict[str, Any]:
    """Return a line's look: each has its own colour and marker; when colours repeat, the line style changes."""
    turn = index // len(COLOURS)
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": _MARKERS[index % len(_MARKERS)] if points <= MARKED_POINTS else None,
        "linestyle": _LINES[turn % len(_LINES)],
        "markersize": 3.5,
        "linewidth": 1.2,
    }


def sequential(count: int) -> list[tuple[float, float, float, float]]:
    """Return `count` colours from light to dark, also readable in grey, for things that have an order."""
    # viridis from its green on: its yellow is too pale on white
    return [matplotlib.colormaps["viridis"](0.8 * i / max(count - 1, 1)) for i in reversed(range(count))]


def evenly(values: Sequence[int], most: int) -> list[int]:
    """Return at most `most` (two or more) of the values, evenly spaced from the first to the last."""
    if len(values) <= most:
        return list(values)
    return [values[round(index * (len(values) - 1) / (most - 1))] for index in range(most)]


def legend_below(figure: Figure, handles: Sequence[Artist], labels: Sequence[str], most_columns: int = 4) -> None:
    """Put a legend under the panels, with as many columns as its longest label allows; the figure grows."""
    if not handles:
        return
    longest = max(len(text) for text in labels)
    fitting = int((figure.get_figwidth() - 0.2) / (0.068 * longest + 0.65))  # inches: a character, a handle
    rows = -(-len(handles) // max(1, min(most_columns, fitting)))
    if rows > 2:
        figure.set_figheight(figure.get_figheight() + 0.18 * (rows - 2))
    figure.legend(handles, labels, loc="outside lower center", ncols=-(-len(handles) // rows), frameon=False)


def metrics_over_steps(records: pd.DataFrame, metrics: Sequence[HeadlineMetric], title: str) -> Figure | None:
    """Draw a family's records over the measured steps: a panel for each metric, a line for each space and setting.

    Bars show one standard error. A metric of a single step has no panel: a table says as much. Returns None if no
    panel is left.
    """
    of_metric = [(metric, records[records["name"] == metric.name]) for metric in metrics]
    panels = [(metric, rows) for metric, rows in of_metric if rows["step"].nunique() > 1]
    if not panels:
        return None
    drawn = [list(lines(rows)) for _, rows in panels]
    labels = list(dict.fromkeys(name for panel in drawn for name, _ in panel))
    steps = pd.concat([rows["step"] for _, rows in panels])
    figure, grid = panel_grid(len(panels))
    for axes, (metric, rows), panel in zip(grid, panels, drawn, strict=True):
        for name, line in panel:
            look = line_style(labels.index(name), len(line))
            axes.errorbar(line["step"], line["value"], yerr=line["stderr"], capsize=2, elinewidth=0.8, **look)
        metric_axis(axes, metric, rows["value"].min(), rows["value"].max())
        if axes.get_yscale() == "log":  # a bar that reaches below 0 would stretch the axis without end
            axes.set_ylim(bottom=rows["value"].min() / 2)
        step_axis(axes, steps)
    notes = labels[:1] if len(labels) == 1 and labels[0] else []
    if any(rows["stderr"].notna().any() for _, rows in panels):
        notes.append("bars show one standard error")
    figure_title(figure, title, *map(label, notes))
    if len(labels) > 1:
        points = max(len(line) for panel in drawn for _, line in panel)
        handles = [Line2D([], [], **line_style(index, points)) for index in range(len(labels))]
        legend_below(figure, handles, [label(name) or "weights" for name in labels])
    return figure


def label(text: str) -> str:
    """Return a text of others for a picture: dollars begin no formula, a first underscore hides nothing."""
    plain = text.replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Return a different label for every name, on one line; long names lose the start that all share."""
    texts = {name: one_line(name) or "(no name)" for name in dict.fromkeys(names)}
    shared = _shared_start(list(texts.values()))
    texts = {name: _shortened(f"…{text[shared:]}" if shared else text) for name, text in texts.items()}
    total, seen = Counter(texts.values()), Counter[str]()
    shown = {}
    for name, text in texts.items():
        seen[text] += 1
        shown[name] = label(f"{text} ({seen[text]})" if total[text] > 1 else text)
    return shown


def _shared_start(texts: Sequence[str]) -> int:
    """Return the length of the words with which all names begin, 0 if every name is short enough."""
    if len(texts) < 2 or max(map(len, texts)) <= _LONGEST_NAME:
        return 0
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(min(texts), max(texts), strict=False))
    words = re.match(r".*[-_./ ]", "".join(character for character, _ in alike))
    return words.end() if words else 0


def _shortened(text: str) -> str:
    # names of runs differ in how they begin (the method) and how they end (the seed)
    half = _LONGEST_NAME // 2
    return text if len(text) <= _LONGEST_NAME else f"{text[: half - 1]}…{text[-half:]}"
