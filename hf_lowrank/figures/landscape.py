"""The loss around a model: curves along directions and their sharpness over training (H1 to H5)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from hf_lowrank.figures import drawing
from hf_lowrank.report.catalogue import LANDSCAPE

__all__ = ["landscape_curves", "sharpness_over_steps"]

_SUBJECTS = ("random", "svd_1", "svd_k", "trajectory")
# sharpness in the first row, what varies between directions in the second
_SHARPNESS = ("H1", "H3", "H4", "H2", "H5")
_SINGLE_CURVES = 30  # more of them would be a grey area
_MEAN = drawing.COLOURS[0]
_FIRST: Any = {"color": drawing.COLOURS[4], "linestyle": "--", "linewidth": 1.2}
_SINGLE: Any = {"color": "0.45", "alpha": 0.5, "linewidth": 0.5}
_COMPONENTS = (0, 1, 2, 3, 6, 5)  # of the palette, without the first step's colour


@dataclass
class _Panel:
    """Curves of one subject in one space at the last step that has them, and the mean curve of the first step.

    `curves` has a row a step length x and a column a direction; `mean` and `spread` are over the directions, missing
    if a direction has no loss; `first`, moved to the same loss at x = 0, is None if one step was measured.
    """

    subject: str
    space: str
    step: int
    curves: pd.DataFrame
    first_step: int
    first: "pd.Series[float] | None"

    @property
    def mean(self) -> "pd.Series[float]":
        return self.curves.mean(axis=1, skipna=False)

    @property
    def spread(self) -> "pd.Series[float]":
        return self.curves.std(axis=1, ddof=0, skipna=False)

    @property
    def title(self) -> str:
        count = self.curves.shape[1]
        return {
            "random": "1 random direction" if count == 1 else f"{count:,} random directions",
            "svd_1": "Top singular direction",
            "svd_k": "Top singular direction" if count == 1 else f"Top {count:,} singular directions",
            "trajectory": "Principal components of the trajectory",
        }[self.subject]


def landscape_curves(landscape: pd.DataFrame) -> Figure | None:
    """Draw the loss along every kind of direction at the last step that has it: mean, spread and single curves."""
    panels = list(_panels(landscape))
    if not panels:
        return None
    spaces = list(dict.fromkeys(panel.space for panel in panels))
    last = max(panel.step for panel in panels)
    # two spaces stand side by side, because their step lengths mean different things
    figure, grid = drawing.panel_grid(len(panels), 2 if len(panels) == 4 or len(spaces) == 2 else 3)
    legend: dict[str, Artist] = {}
    for axes, panel in zip(grid, panels, strict=True):
        draw = _draw_components if panel.subject == "trajectory" else _draw_directions
        legend |= draw(axes, panel)
        notes = [panel.title]
        if len(spaces) > 1 and panel.space:
            notes.append(panel.space)
        if panel.step != last:
            notes.append(f"step {panel.step:,}")
        drawing.panel_title(axes, *notes)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
        axes.set_xlabel("step length x along the direction")
        axes.set_ylabel("loss (nats)")
        drawn = panel.curves if panel.first is None else pd.concat([panel.curves, panel.first], axis=1)
        drawing.value_scale(axes, drawn.min().min(), drawn.max().max())
    weights = [f"{spaces[0]} weights"] if len(spaces) == 1 and spaces[0] else []
    drawing.figure_title(figure, f"Loss along directions from the weights at step {last:,}", *weights)
    drawing.legend_below(figure, list(legend.values()), list(legend))
    return figure


def _panels(landscape: pd.DataFrame) -> Iterator[_Panel]:
    for subject in _SUBJECTS if len(landscape) else ():
        of_subject = landscape[landscape["subject"] == subject].dropna(subset=["x", "loss", "direction"])
        for space, rows in of_subject.groupby("space"):
            first_step, step = int(rows["step"].min()), int(rows["step"].max())
            panel = _Panel(subject, str(space), step, _curves(rows, step), first_step, None)
            # the trajectory's components at two steps are components of two trajectories
            if first_step != step and subject != "trajectory":
                first = _curves(rows, first_step).mean(axis=1, skipna=False)
                # the loss falls by far more than it rises along a direction: at its own level the first curve would
                # flatten all others
                shifted = first - _center(first) + _center(panel.mean)
                panel.first = shifted.rename("first") if shifted.notna().any() else None
            yield panel


def _center(curve: "pd.Series[float]") -> float:
    """Return the loss at the grid point nearest to 0."""
    return float(curve.iloc[np.abs(curve.index.to_numpy()).argmin()])


def _curves(rows: pd.DataFrame, step: int) -> pd.DataFrame:
    rows = rows[rows["step"] == step]
    return rows.pivot_table(index="x", columns="direction", values="loss", aggfunc="last")


def _draw_directions(axes: Axes, panel: _Panel) -> dict[str, Artist]:
    """Draw mean, band and single curves; return what the legend says of them."""
    legend: dict[str, Artist] = {}
    x, curves, mean, spread = panel.curves.index.to_numpy(), panel.curves, panel.mean, panel.spread
    several = curves.shape[1] > 1
    if panel.first is not None:
        axes.plot(panel.first.index, panel.first, **_FIRST)
        legend[f"mean at step {panel.first_step:,}, shifted to meet at x = 0"] = Line2D([], [], **_FIRST)
    if several and (curves.shape[1] <= _SINGLE_CURVES or mean.isna().all()):
        axes.plot(x, curves.to_numpy(), **_SINGLE, zorder=1.5)
        legend["single directions"] = Line2D([], [], **_SINGLE)
    if several:
        # on a logarithmic axis a band that reaches below 0 would stretch it without end
        low = np.maximum(mean - spread, min(curves.min().min(), mean.min()))
        axes.fill_between(x, low, mean + spread, color=_MEAN, alpha=0.2, linewidth=0)
        legend["one standard deviation over directions"] = Patch(color=_MEAN, alpha=0.2, linewidth=0)
    axes.plot(x, mean, color=_MEAN, zorder=2.5)
    return {"mean over directions": Line2D([], [], color=_MEAN), **legend}


def _draw_components(axes: Axes, panel: _Panel) -> dict[str, Artist]:
    legend: dict[str, Artist] = {}
    for index, direction in enumerate(panel.curves.columns):
        turn, place = divmod(index, len(_COMPONENTS))
        values = panel.curves[direction].dropna()  # each component reaches as far as the trajectory does along it
        look = drawing.line_style(_COMPONENTS[place] + turn * len(drawing.COLOURS), len(values))
        axes.plot(values.index, values, **look, markevery=max(len(values) // 8, 1))
        legend[f"component {index + 1}"] = Line2D([], [], **look)
    return legend


def sharpness_over_steps(records: pd.DataFrame) -> Figure | None:
    """Draw H1 to H5 with their standard errors over the measured steps."""
    metrics = sorted(LANDSCAPE.metrics, key=lambda metric: _SHARPNESS.index(str(metric.id)))
    return drawing.metrics_over_steps(records, metrics, "Loss landscape over training")
