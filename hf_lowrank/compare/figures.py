"""The study's pictures with one line for each run: losses, landscapes, paths, spectra, similarities and tasks."""

from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import fill

import matplotlib
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from hf_lowrank.compare.charts import Chart
from hf_lowrank.compare.table import Comparison
from hf_lowrank.figures import drawing, save_figure
from hf_lowrank.figures.interpolation import barrier_map
from hf_lowrank.report import catalogue

__all__ = ["draw_comparison"]


def _over_steps(family: catalogue.Entry) -> Callable[[Chart], bool]:
    names = family.metric_names()
    return lambda chart: chart.group == "Metrics over training" and chart.name in names


def _group(group: str, prefix: str = "") -> Callable[[Chart], bool]:
    return lambda chart: chart.group == group and chart.name.startswith(prefix)


def _pictures() -> dict[str, tuple[str, Callable[[Chart], bool]]]:
    """Return each picture's file with its title and the charts that are its panels."""
    pictures = {
        "loss.png": ("Loss over training", lambda chart: chart.name in ("training/loss", "training/eval_loss")),
        "landscape_curves.png": (
            "Loss along directions, mean and its standard error over directions", _group("Loss along directions")
        ),
        "sharpness_over_steps.png": ("Loss landscape over training", _over_steps(catalogue.LANDSCAPE)),
        "curvature_over_steps.png": ("Curvature of the loss over training", _over_steps(catalogue.CURVATURE)),
        "interpolation_paths.png": ("Loss on straight lines between models", _group("Paths between models")),
        "barriers_over_steps.png": ("Loss barriers over training", _over_steps(catalogue.INTERPOLATION)),
        "spectra_over_steps.png": ("Spectra over training", _over_steps(catalogue.SPECTRAL)),
        "spectra_over_depth.png": ("Spectra over depth", _group("Over depth", "spectral/")),
        "similarity_over_steps.png": ("Activations over training", _over_steps(catalogue.ACTIVATION)),
        "similarity_over_depth.png": ("Activations over depth", _group("Over depth", "activation/")),
    }  # fmt: skip
    for family in catalogue.entries():
        if family not in catalogue.CATALOGUE:
            pictures[f"{family.name}_over_steps.png"] = (f"{family.title} over training", _over_steps(family))
    return pictures


def draw_comparison(comparison: Comparison, charts: Sequence[Chart], folder: Path) -> list[Path]:
    """Draw every picture that has data into `folder` and return the paths.

    A picture of an earlier comparison is removed if it has no data now.
    """
    names = list(drawing.short_names(row.label for row in comparison.rows).values())
    drawn = []
    with matplotlib.rc_context(drawing.STYLE):
        figures: dict[str, Figure | None] = {
            name: _picture(title, _covering([chart for chart in charts if chosen(chart)]), names, comparison)
            for name, (title, chosen) in _pictures().items()
        }
        figures["evaluations.png"] = _tasks(comparison, names)
        maps = [run.tables["barrier_map"] for run in comparison.runs if "barrier_map" in run.tables]
        figures["barrier_map.png"] = barrier_map(pd.concat(maps, ignore_index=True)) if maps else None
        for name, figure in figures.items():
            path = folder / name
            if figure is None:
                path.unlink(missing_ok=True)
            else:
                drawn.append(save_figure(figure, path))
    return drawn


def _covering(charts: Sequence[Chart]) -> list[Chart]:
    """Return of each metric the chart with the most lines, and others that add a row to those before them."""
    kept: list[Chart] = []
    for name in dict.fromkeys(chart.name for chart in charts):
        shown: set[int] = set()
        for chart in sorted((c for c in charts if c.name == name), key=lambda c: -len(c.lines)):
            rows = {line.row for line in chart.lines}
            if rows - shown:
                kept.append(chart)
                shown |= rows
    return kept


def _picture(title: str, charts: Sequence[Chart], names: Sequence[str], comparison: Comparison) -> Figure | None:
    if not charts:
        return None
    figure, grid = drawing.panel_grid(len(charts), 2 if len(charts) == 4 else 3)
    for axes, chart in zip(grid, charts, strict=True):
        _panel(axes, chart)
    details = {chart.detail for chart in charts}
    shared = details.pop() if len(details) == 1 else ""
    for axes, chart in zip(grid, charts, strict=True):
        words = [fill(chart.title, 34), *([] if shared or not chart.detail else [fill(chart.detail, 40)])]
        axes.set_title("\n".join(map(drawing.label, words)))
    _title(figure, comparison, title, *([shared] if shared else []))
    rows = sorted({line.row for chart in charts for line in chart.lines})
    points = max(len(line.x) for chart in charts for line in chart.lines)
    handles: list[Artist] = [Line2D([], [], **drawing.line_style(row, points)) for row in rows]
    drawing.legend_below(figure, handles, [names[row] for row in rows])
    return figure


def _title(figure: Figure, comparison: Comparison, title: str, *notes: str) -> None:
    drawing.figure_title(figure, title, *map(drawing.label, notes))
    if comparison.conflicts:
        figure.suptitle(f"{figure.get_suptitle()}\nNOT ALL COMPARABLE: see the notices", fontsize=10.5)


def _panel(axes: Axes, chart: Chart) -> None:
    for line in chart.lines:
        look = drawing.line_style(line.row, len(line.x))
        # bars would hide one another where points are dense
        if any(error is not None for error in line.error) and len(line.x) > 3:
            low = [y - (error or 0) for y, error in zip(line.y, line.error, strict=True)]
            high = [y + (error or 0) for y, error in zip(line.y, line.error, strict=True)]
            axes.fill_between(line.x, low, high, color=look["color"], alpha=0.15, linewidth=0)
            axes.plot(line.x, line.y, **look, markevery=max(len(line.x) // 8, 1))
        else:
            errors = [float("nan") if error is None else error for error in line.error]
            axes.errorbar(line.x, line.y, yerr=errors, capsize=2, elinewidth=0.8, **look)
    values = [y for line in chart.lines for y in line.y]
    places = [x for line in chart.lines for x in line.x]
    drawing.value_scale(axes, min(values), max(values))
    if axes.get_yscale() == "log":  # a bar that reaches below 0 would stretch the axis without end
        axes.set_ylim(bottom=min(values) / 2)
    axes.set_ylabel(drawing.label(chart.y_label))
    if chart.x_label == "optimizer step":
        drawing.step_axis(axes, pd.Series(places))
        return
    if chart.group == "Over depth":
        axes.xaxis.set_major_locator(drawing.whole_numbers(min(places), max(places)))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlabel(chart.x_label)


def _tasks(comparison: Comparison, names: Sequence[str]) -> Figure | None:
    """Draw the downstream tasks: a mark with its standard error for each run."""
    cells = comparison.cells[comparison.cells["value"].notna()].reset_index()
    columns = [at for at in sorted(set(cells["column"])) if comparison.columns[at].kind == "evaluation"]
    if not columns:
        return None
    figure = drawing.new_figure(max(4.5, min(1.8 + 0.16 * len(columns) * (len(names) + 2), 16)), 4.2)
    axes = figure.add_subplot()
    for place in range(len(names)):
        mine = cells[(cells["row"] == place) & cells["column"].isin(columns)]
        aside = 0.7 * ((place + 0.5) / len(names) - 0.5)
        axes.errorbar(
            [columns.index(column) + aside for column in mine["column"]], mine["value"], yerr=mine["stderr"].fillna(0),
            capsize=2, elinewidth=0.8, **{**drawing.line_style(place, 1), "linestyle": "none"},
        )  # fmt: skip
    labels = [drawing.label(comparison.columns[column].title) for column in columns]
    axes.set_xticks(range(len(columns)), labels, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_ylabel("score")
    _title(figure, comparison, "Downstream tasks", "bars show one standard error")
    looks = [drawing.line_style(place, drawing.MARKED_POINTS) for place in range(len(names))]
    handles: list[Artist] = [Line2D([], [], **(look | {"linestyle": "none"})) for look in looks]
    drawing.legend_below(figure, handles, list(names))
    return figure
