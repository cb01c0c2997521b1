"""How similar a model's activations are to the baseline's (H14 to H16), over depth and over training."""

from collections.abc import Iterator
from typing import Any

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from hf_lowrank.figures import drawing

__all__ = ["SIMILARITIES", "similarity_over_depth", "similarity_over_steps"]

# column -> title
SIMILARITIES = {
    "activation/relative_l2": "Relative L2 distance",
    "activation/cosine": "Cosine similarity",
    "activation/cka": "Linear CKA",
    "activation/cka_debiased": "Debiased linear CKA",
}
# column -> axis; the debiased CKA is drawn dashed beside the other one
_PANELS = {
    "activation/relative_l2": "distance / baseline's mean norm",
    "activation/cosine": "mean cosine",
    "activation/cka": "CKA",
}
_SHOWN_STEPS = 6
_DEBIASED_LOOK: Any = {"linestyle": "--", "markerfacecolor": "white"}


def similarity_over_depth(activation: pd.DataFrame) -> Figure | None:
    """Draw each similarity over the layers, if there are two; one line for each of at most six steps."""
    activation, title = _one_baseline(activation)
    panels = list(_measured(activation))
    if not panels or activation["layer"].nunique() < 2:
        return None
    measured = activation.dropna(subset=[name for name in SIMILARITIES if name in activation], how="all")
    steps = drawing.evenly(sorted({int(step) for step in measured["step"]}), _SHOWN_STEPS)
    colours = dict(zip(steps, drawing.sequential(len(steps)), strict=True))
    layers = activation["layer"]
    figure, grid = drawing.panel_grid(len(panels))
    debiased = False
    for axes, (name, *beside) in zip(grid, panels, strict=True):
        for step, colour in colours.items():
            rows = activation[activation["step"] == step].sort_values("layer")
            look: dict[str, Any] = {"color": colour, "marker": drawing.marker(layers.nunique()), "markersize": 3}
            axes.plot(rows["layer"], rows[name], **look, linewidth=1.2)
            for other in beside:
                axes.plot(rows["layer"], rows[other], **look, **_DEBIASED_LOOK, linewidth=1.2)
                debiased = True
        shown = activation.loc[activation["step"].isin(steps), [name, *beside]]
        _similarity_axis(axes, name, shown)
        axes.set_xlim(layers.min() - 0.5, layers.max() + 0.5)
        axes.xaxis.set_major_locator(drawing.whole_numbers(layers.min(), layers.max()))
        axes.set_xlabel("layer (0: embeddings)")
    at = f" at step {steps[0]:,}" if len(steps) == 1 else ""
    drawing.figure_title(figure, f"Activations over depth{at}, compared with {title}")
    handles: list[Artist] = [Line2D([], [], color=colour, marker="o", markersize=3) for colour in colours.values()]
    labels = [f"step {step:,}" for step in steps]
    if debiased:
        handles.append(Line2D([], [], color="0.3", marker="o", markersize=3, **_DEBIASED_LOOK))
        labels.append("debiased CKA")
    drawing.legend_below(figure, handles, labels, most_columns=7)
    return figure


def similarity_over_steps(activation: pd.DataFrame) -> Figure | None:
    """Draw each similarity over training, mean and range over the layers, if two steps or more have it."""
    activation, title = _one_baseline(activation)
    panels = [panel for panel in _measured(activation) if activation.dropna(subset=panel[:1])["step"].nunique() > 1]
    if not panels:
        return None
    figure, grid = drawing.panel_grid(len(panels))
    legend: dict[str, Artist] = {
        "mean over layers": Line2D([], [], color=drawing.COLOURS[0], marker="o", markersize=3),
        "smallest to largest": Patch(color=drawing.COLOURS[0], alpha=0.2, linewidth=0),
    }
    for axes, (name, *beside) in zip(grid, panels, strict=True):
        values = activation.dropna(subset=[name]).groupby("step")[name]
        mean, low, high = values.mean(), values.min(), values.max()
        axes.fill_between(mean.index, low, high, color=drawing.COLOURS[0], alpha=0.2, linewidth=0)
        axes.plot(mean.index, mean, color=drawing.COLOURS[0], marker=drawing.marker(len(mean)), markersize=3)
        for other in beside:
            mean = activation.dropna(subset=[other]).groupby("step")[other].mean()
            look: dict[str, Any] = {"color": drawing.COLOURS[4], "markersize": 3, **_DEBIASED_LOOK}
            axes.plot(mean.index, mean, marker=drawing.marker(len(mean)), **look)
            legend["mean of the debiased CKA"] = Line2D([], [], marker="o", **look)
        _similarity_axis(axes, name, pd.concat([low, high]).to_frame())
        drawing.step_axis(axes, activation["step"])
    drawing.figure_title(figure, f"Activations over training, compared with {title}")
    drawing.legend_below(figure, list(legend.values()), list(legend))
    return figure


def _one_baseline(activation: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Return the rows of the table's first baseline, one for each step and layer, and the baseline's name."""
    activation = activation.dropna(subset=["layer"]) if len(activation) else activation
    if activation.empty:
        return activation, ""
    names = activation["baseline"].map(str)
    baselines = names.unique().tolist()
    rows = activation[names == baselines[0]].drop_duplicates(["step", "layer"], keep="last")
    title = drawing.short_names(baselines)[baselines[0]].strip() if baselines[0] else "the baseline"
    if (rows["baseline_step"] == rows["step"]).all():
        title += " at the same step"
    elif rows["baseline_step"].nunique(dropna=False) == 1 and rows["baseline_step"].iloc[0] >= 0:  # -1: not known
        title += f" at step {int(rows['baseline_step'].iloc[0]):,}"
    if len(baselines) > 1:
        title += f", the first of {len(baselines)} baselines"
    return rows, title


def _measured(activation: pd.DataFrame) -> Iterator[list[str]]:
    """Yield the columns of every panel that has values: the main one, then the one drawn dashed if there is one."""
    for name in _PANELS:
        columns = [
            each for each in (name, f"{name}_debiased") if each in activation and activation[each].notna().any()
        ]
        if name in columns:
            yield columns


def _similarity_axis(axes: Axes, name: str, shown: pd.DataFrame) -> None:
    axes.set_title(SIMILARITIES[name])
    axes.set_ylabel(_PANELS[name])
    drawing.value_scale(axes, shown.min().min(), shown.max().max())
