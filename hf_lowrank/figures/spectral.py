"""Spectra of the weight matrices over training and over depth (H8 to H13)."""

import re
from collections.abc import Iterator

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from hf_lowrank.figures import drawing
from hf_lowrank.figures.tables import one_space
from hf_lowrank.report.catalogue import SPECTRAL, HeadlineMetric

__all__ = ["spectra_over_depth", "spectra_over_steps"]


def spectra_over_steps(spectral: pd.DataFrame) -> Figure | None:
    """Draw mean, quartiles and range of each metric over the matrices, if two steps or more have it."""
    spectral = one_space(spectral)
    present = [metric for metric in SPECTRAL.metrics if metric.name in spectral]
    panels = [metric for metric in present if spectral.dropna(subset=[metric.name])["step"].nunique() > 1]
    if not panels:
        return None
    figure, grid = drawing.panel_grid(len(panels))
    colour = drawing.COLOURS[0]
    for axes, metric in zip(grid, panels, strict=True):
        values = spectral[["step", metric.name]].dropna().groupby("step")[metric.name]
        mean, low, high = values.mean(), values.min(), values.max()
        steps = mean.index.to_numpy()
        middle = values.quantile(0.25), values.quantile(0.75)
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.fill_between(steps, *middle, color=colour, alpha=0.3, linewidth=0)
        axes.plot(steps, mean, color=colour, marker=drawing.marker(len(steps)), markersize=3)
        drawing.metric_axis(axes, metric, low.min(), high.max())
        drawing.step_axis(axes, spectral["step"])
    drawing.figure_title(figure, "Spectra over training", _what(spectral))
    handles = [
        Line2D([], [], color=colour, marker="o", markersize=3),
        Patch(color=colour, alpha=0.45, linewidth=0),
        Patch(color=colour, alpha=0.15, linewidth=0),
    ]
    drawing.legend_below(figure, handles, ["mean over matrices", "middle half", "smallest to largest"])
    return figure


def spectra_over_depth(spectral: pd.DataFrame) -> Figure | None:
    """Draw each metric over the layers at its last step, one line for each kind of module, if there are two layers."""
    spectral = one_space(spectral)
    panels = [panel for panel in _depth_panels(spectral) if len(panel[2]) > 1]
    if not panels:
        return None
    kinds = list(dict.fromkeys(kind for _, _, table in panels for kind in table.columns))
    layers = np.concatenate([table.index.to_numpy() for _, _, table in panels])
    last = max(step for _, step, _ in panels)
    figure, grid = drawing.panel_grid(len(panels))
    for axes, (metric, step, table) in zip(grid, panels, strict=True):
        for kind in table.columns:
            values = table[kind].dropna()
            axes.plot(values.index, values, **drawing.line_style(kinds.index(kind), len(table)))
        drawing.metric_axis(axes, metric, table.min().min(), table.max().max())
        if step != last:
            axes.set_title(f"{axes.get_title()}, step {step:,}")
        axes.set_xlim(layers.min() - 0.5, layers.max() + 0.5)
        axes.xaxis.set_major_locator(drawing.whole_numbers(layers.min(), layers.max()))
        axes.set_xlabel("layer (index from the input)")
    drawing.figure_title(figure, f"Spectra over depth at step {last:,}", _what(spectral))
    handles = [Line2D([], [], **drawing.line_style(index, len(set(layers)))) for index in range(len(kinds))]
    drawing.legend_below(figure, handles, [drawing.label(kind) for kind in kinds])
    return figure


def _depth_panels(spectral: pd.DataFrame) -> Iterator[tuple[HeadlineMetric, int, pd.DataFrame]]:
    """Yield (metric, step, table of layers by kinds of module) for every metric that has values in some layer."""
    for metric in SPECTRAL.metrics:
        if metric.name not in spectral:
            continue
        rows = spectral[["step", "layer", "module", metric.name]].dropna()
        if rows.empty:
            continue
        step = int(rows["step"].max())
        rows = rows[rows["step"] == step]
        # the experts of one layer are one kind: a line for each would hide the rest
        kinds = rows["module"].map(lambda module: re.sub(r"(?<=\.)\d+(?=\.|$)", "*", str(module)))
        table = rows.assign(kind=kinds).pivot_table(index="layer", columns="kind", values=metric.name, aggfunc="mean")
        yield metric, step, table[kinds.unique()]  # in the model's order, not the alphabet's


def _what(spectral: pd.DataFrame) -> str:
    count = spectral["name"].nunique()
    return f"{count:,} {'matrix' if count == 1 else 'matrices'}, {spectral['space'].iloc[0]} weights"
