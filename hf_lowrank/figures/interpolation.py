"""The loss on straight lines between models and the barriers there: over training (H6, H7) and between runs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from hf_lowrank.figures import drawing
from hf_lowrank.figures.tables import one_space

__all__ = ["barrier_map", "barriers_over_steps", "interpolation_paths"]

_CONSECUTIVE = "consecutive"
_SUBJECTS = {
    _CONSECUTIVE: "Neighbouring checkpoints",
    "cross_method": "To other methods",
    "cross_method_aligned": "To other methods, aligned",
    "cross_seed": "To other seeds",
    "cross_seed_aligned": "To other seeds, aligned",
}
_ALIGNED = "_aligned"
_ALIGNED_LOOK: Any = {"linestyle": "--", "markerfacecolor": "white"}
_LABELLED_STEPS = 8
_HEAT = "cividis_r"


def interpolation_paths(interpolation: pd.DataFrame) -> Figure | None:
    """Draw the loss between two models: all pairs of neighbouring checkpoints, other runs at the last step."""
    panels = _last_paths(interpolation)
    if not panels:
        return None
    figure, grid = drawing.panel_grid(len(panels), 2 if len(panels) == 4 else 3)
    crossed = [rows for subject, rows in panels.items() if subject != _CONSECUTIVE]
    peers = _peers(crossed)
    weights, space_notes = drawing.space_notes([rows["space"].iloc[0] for rows in panels.values()])
    for axes, (subject, rows), space_note in zip(grid, panels.items(), space_notes, strict=True):
        if subject == _CONSECUTIVE:
            notes = _draw_pairs(figure, axes, rows)
            axes.set_xlabel("α from the earlier (0) to the later (1)")
        else:
            _draw_peers(axes, rows, list(peers))
            notes = [f"step {int(rows['step'].iloc[0]):,}"]
            axes.set_xlabel("α from this run (0) to the other (1)")
        drawing.panel_title(axes, _SUBJECTS[subject], *notes, *space_note)
        axes.set_ylabel("loss (nats)")
        # methods, seeds and alignment are read against each other
        together = rows["loss"] if subject == _CONSECUTIVE else pd.concat(crossed)["loss"]
        drawing.value_scale(axes, together.min(), together.max())
        if subject != _CONSECUTIVE:
            _same_limits(axes, together.min(), together.max())
    drawing.figure_title(figure, "Loss on straight lines between models", *weights)
    points = interpolation["alpha"].nunique()
    handles = [Line2D([], [], **drawing.line_style(index, points)) for index in range(len(peers))]
    drawing.legend_below(figure, handles, list(peers.values()))
    return figure


def _last_paths(interpolation: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return each subject's rows in one space: of neighbouring checkpoints all steps, of other runs the last."""
    panels = {}
    for subject in _SUBJECTS if len(interpolation) else ():
        rows = one_space(interpolation[interpolation["subject"] == subject].dropna(subset=["alpha"]))
        with_loss = rows[rows["loss"].notna()]
        if with_loss.empty:
            continue
        panels[subject] = rows if subject == _CONSECUTIVE else rows[rows["step"] == with_loss["step"].max()]
    return panels


def _peers(crossed: Sequence[pd.DataFrame]) -> dict[str, str]:
    """Return the label of each peer; its place decides its colour in all panels."""
    return drawing.short_names(str(name) for rows in crossed for name in rows["other"])


def _draw_pairs(figure: Figure, axes: Axes, rows: pd.DataFrame) -> list[str]:
    """Draw a line for each pair of checkpoints and a colour bar of their steps; return notes for the title."""
    steps = sorted({int(step) for step in rows.dropna(subset=["loss"])["step"]})
    colours = drawing.sequential(len(steps))
    for step, colour in zip(steps, colours, strict=True):
        path = _path(rows[rows["step"] == step])
        axes.plot(path["alpha"], path["loss"], color=colour, linewidth=1.2 if len(steps) <= 20 else 0.8)
    if len(steps) == 1:
        before = rows.loc[rows["step"] == steps[0], "other_step"].dropna()
        return [f"steps {int(before.iloc[0]):,} and {steps[0]:,}" if len(before) else f"step {steps[0]:,}"]
    # by rank: checkpoints are often dense at the start
    norm = BoundaryNorm(np.arange(len(steps) + 1) - 0.5, len(steps))
    bar = figure.colorbar(ScalarMappable(norm, ListedColormap(colours)), ax=axes, pad=0.02, aspect=30)
    shown = range(len(steps))[:: -(-len(steps) // _LABELLED_STEPS)]
    bar.set_ticks(shown, labels=[f"{steps[rank]:,}" for rank in shown])
    bar.minorticks_off()
    bar.set_label("later step of the two")
    bar.outline.set_visible(False)
    return []


def _draw_peers(axes: Axes, rows: pd.DataFrame, peers: Sequence[str]) -> None:
    for peer, of_peer in rows.groupby("other", sort=False):
        path = _path(of_peer)
        look = drawing.line_style(peers.index(str(peer)), len(path))
        axes.plot(path["alpha"], path["loss"], **look, markevery=max(len(path) // 8, 1))


def _path(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the losses of one pair by position; of two at one position the later counts."""
    return rows.drop_duplicates("alpha", keep="last").sort_values("alpha")


def _same_limits(axes: Axes, low: float, high: float) -> None:
    if axes.get_yscale() == "log":
        axes.set_ylim(low / 1.2, high * 1.2)
    else:
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        axes.set_ylim(low - margin, high + margin)


def barriers_over_steps(records: pd.DataFrame) -> Figure | None:
    """Draw barriers and their standard errors over steps: one line for neighbouring checkpoints and each peer.

    Barriers of a single step have no panel; a table says as much.
    """
    barriers = _barriers(records)
    if barriers.empty:
        return None
    consecutive = barriers["subject"] == _CONSECUTIVE
    panels = {"Between neighbouring checkpoints": barriers[consecutive], "To other runs": barriers[~consecutive]}
    panels = {title: rows for title, rows in panels.items() if rows["step"].nunique() > 1}
    if not panels:
        return None
    barriers = pd.concat(panels.values())
    peers = _peers([barriers[barriers["subject"] != _CONSECUTIVE]])
    weights, space_notes = drawing.space_notes([rows["space"].iloc[0] for rows in panels.values()])
    figure, grid = drawing.panel_grid(len(panels))
    for axes, (title, rows), space_note in zip(grid, panels.items(), space_notes, strict=True):
        _draw_barriers(axes, rows, list(peers))
        drawing.panel_title(axes, title, *space_note)
        axes.set_ylabel("barrier (nats)")
        drawing.step_axis(axes, barriers["step"])
        drawing.value_scale(axes, rows["value"].min(), rows["value"].max())
        if axes.get_yscale() == "linear":
            axes.axhline(0, color="0.5", linewidth=0.8, zorder=1)
    bars = ["bars show one standard error"] if barriers["stderr"].notna().any() else []
    drawing.figure_title(figure, "Loss barriers over training", *weights, *bars)
    points = barriers["step"].nunique()
    seeds = set(barriers.loc[barriers["subject"].str.startswith("cross_seed"), "other"])
    legend: dict[str, Artist] = {
        f"{shown} (other seed)" if peer in seeds else shown: Line2D([], [], **drawing.line_style(index, points))
        for index, (peer, shown) in enumerate(peers.items())
    }
    if barriers["subject"].str.endswith(_ALIGNED).any():
        legend["after aligning units and heads"] = Line2D(
            [], [], color="0.3", marker="o", markersize=3.5, **_ALIGNED_LOOK
        )
    drawing.legend_below(figure, list(legend.values()), list(legend))
    return figure


def _barriers(records: pd.DataFrame) -> pd.DataFrame:
    """Return the barriers of all subjects, each in one space, with their subject and the peer's name."""
    parts = []
    for subject in _SUBJECTS:
        rows = one_space(records[records["name"] == f"interpolation/{subject}/barrier"])
        # a neighbouring checkpoint has another name at every step
        others = ["" if subject == _CONSECUTIVE else str(each.get("other") or "") for each in rows["settings"]]
        parts.append(rows.assign(subject=subject, other=others))
    return pd.concat([rows for rows in parts if len(rows)] or parts[:1])


def _draw_barriers(axes: Axes, rows: pd.DataFrame, peers: Sequence[str]) -> None:
    for (subject, other), line in rows.groupby(["subject", "other"], sort=False):
        line = line.drop_duplicates("step", keep="last").sort_values("step")
        look = drawing.line_style(peers.index(other) if subject != _CONSECUTIVE else 0, len(line))
        if subject.endswith(_ALIGNED):
            look |= _ALIGNED_LOOK
        axes.errorbar(line["step"], line["value"], yerr=line["stderr"], capsize=2, elinewidth=0.8, **look)


def barrier_map(barriers: pd.DataFrame) -> Figure | None:
    """Draw the barrier of every pair of runs as a heat map: as trained and, if there are any, aligned.

    Each pair is shown at its own last step, because runs of different lengths end at different steps.
    """
    if barriers.empty or barriers["barrier"].isna().all():
        return None
    barriers = barriers.dropna(subset=["barrier"]).sort_values("step", kind="stable")
    barriers = barriers.drop_duplicates(["run_a", "run_b", "aligned"], keep="last").sort_index()
    names = drawing.short_names(_runs(barriers))
    aligned = barriers["aligned"].eq(True)
    titled = {"as trained": barriers[~aligned], "after aligning units and heads": barriers[aligned]}
    panels = {title: _square(rows, list(names)) for title, rows in titled.items() if len(rows)}
    stacked = len(names) > 8
    side, margin = max(0.5 * len(names), 1.8), 0.075 * max(map(len, names.values()))
    rows, columns = (len(panels), 1) if stacked else (1, len(panels))
    figure = drawing.new_figure(columns * side + margin + 1.3, rows * (side + 0.3) + 0.75 * margin + 0.7)
    figure.set_layout_engine("compressed")  # cells are square: without it the maps drift apart
    grid = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    least, most = min(barriers["barrier"].min(), 0.0), barriers["barrier"].max()
    norm = Normalize(least, most if most > least else least + 1)
    for index, (axes, (title, square)) in enumerate(zip(grid, panels.items(), strict=True)):
        _draw_map(axes, square, norm)
        axes.set_title(title)
        below, left = not stacked or index == len(panels) - 1, stacked or index == 0
        shown = list(names.values())
        axes.set_xticks(range(len(names)), shown if below else [], rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), shown if left else [])
    figure.colorbar(ScalarMappable(norm, _HEAT), ax=grid, label="barrier (nats)", aspect=30, pad=0.02)
    first, last = int(barriers["step"].min()), int(barriers["step"].max())
    at = f"at step {last:,}" if first == last else f"at each pair's last step, {first:,} to {last:,}"
    drawing.figure_title(figure, f"Loss barriers between runs {at}")
    if any(np.isnan(square).any() for square in panels.values()):
        drawing.legend_below(figure, [Patch(facecolor="white", edgecolor="0.75", hatch="////")], ["not measured"])
    return figure


def _runs(barriers: pd.DataFrame) -> list[str]:
    """Return the runs in the order of the table, those of one method together."""
    ends = [barriers[["run_a", "method_a"]], barriers[["run_b", "method_b"]]]
    method_of = {str(run): str(method) for end in ends for run, method in end.itertuples(index=False)}
    methods = list(dict.fromkeys(method_of.values()))
    return sorted(method_of, key=lambda run: methods.index(method_of[run]))


def _square(barriers: pd.DataFrame, runs: Sequence[str]) -> NDArray[np.float64]:
    """Return barriers by run_a and run_b; a pair that was measured in one order stands in both."""
    square = np.full((len(runs), len(runs)), np.nan)
    for run_a, run_b, barrier in barriers[["run_a", "run_b", "barrier"]].itertuples(index=False):
        square[runs.index(str(run_a)), runs.index(str(run_b))] = barrier
    return np.where(np.isnan(square), square.T, square)


def _draw_map(axes: Axes, square: NDArray[np.float64], norm: Normalize) -> None:
    axes.imshow(np.ma.masked_invalid(square), cmap=_HEAT, norm=norm, aspect="equal")
    axes.patch.set(facecolor="white", edgecolor="0.75", hatch="////")
    axes.grid(False)
    axes.tick_params(length=0)
    for (row, column), barrier in np.ndenumerate(square):
        if np.isfinite(barrier):
            # white on the dark half of the colours
            axes.text(
                column, row, _cell(barrier), ha="center", va="center", fontsize=7.5,
                color="white" if norm(barrier) > 0.5 else "black",
            )  # fmt: skip


def _cell(barrier: float) -> str:
    return f"{barrier:.2f}" if abs(barrier) >= 0.1 else f"{barrier:.{1 if abs(barrier) < 1e-3 else 2}g}"
