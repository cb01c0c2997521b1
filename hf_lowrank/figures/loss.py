"""Training and validation loss over steps."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_lowrank.figures.drawing import COLOURS, MARKED_POINTS, marker, new_figure, step_axis

__all__ = ["loss"]


def loss(training: pd.DataFrame) -> Figure | None:
    """Draw training and validation loss over steps, with perplexity on the right."""
    curves = []
    for column, name, colour in (("loss", "training", COLOURS[0]), ("eval_loss", "validation", COLOURS[4])):
        if column in training:
            points = training[["step", column]].dropna().sort_values("step")
            if len(points):
                curves.append((points["step"], points[column], name, colour))
    if all(len(steps) < 2 for steps, *_ in curves):
        return None
    figure = new_figure(6.4, 4.0)
    axes = figure.add_subplot()
    for steps, values, name, colour in curves:
        width = 1.5 if len(steps) <= MARKED_POINTS else 1.0
        axes.plot(steps, values, color=colour, marker=marker(len(steps)), markersize=3, linewidth=width, label=name)
    axes.set_title("Loss over training")
    axes.set_ylabel("cross-entropy (nats per token)")
    step_axis(axes, pd.concat([steps for steps, *_ in curves]))
    _perplexity_axis(axes)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _perplexity_axis(axes: Axes) -> None:
    """Mark round perplexities on the right if two or more are in the range of the axis."""
    low, high = axes.get_ylim()
    if high > 50:  # a run that diverged: its perplexity has no readable number
        return
    for factors in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), np.arange(1, 10, 0.5), np.arange(1, 10, 0.1)):
        round_values = np.outer(10.0 ** np.arange(22), factors).ravel()
        values = round_values[(np.exp(low) <= round_values) & (round_values <= np.exp(high))]
        if len(values) >= 4:
            break
    if not 2 <= len(values) <= 12:
        return
    right = axes.twinx()
    right.set_ylim(low, high)
    right.set_yticks(np.log(values), [f"{value:,.4g}" if value < 1000 else f"{value:,.0f}" for value in values])
    right.set_ylabel("perplexity (per token)")
    right.spines["right"].set_visible(True)
    right.grid(False)  # one grid: the loss's
