"""The figures of a study, one for each analysis; the same tables give the same bytes."""

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hf_lowrank.figures import drawing

__all__ = [
    "draw_activations", "draw_barriers", "draw_controls", "draw_metrics", "draw_perplexity", "draw_prediction",
]  # fmt: skip

_MOST_PANELS = 12


def _rows_figure(panels: int, most_rows: int) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side, whose rows are named at the left."""
    figure = drawing.new_figure(2.2 + 2.9 * panels, 1.3 + 0.24 * max(most_rows, 3))
    return figure, [figure.add_subplot(1, panels, index + 1) for index in range(panels)]


def _grid(panels: int, rows: int) -> tuple[Figure, list[Axes]]:
    columns = min(panels, 3)
    lines = -(-panels // columns)
    figure = drawing.new_figure(1.4 + 3.3 * columns, 0.7 + lines * (0.9 + 0.2 * max(rows, 3)))
    return figure, [figure.add_subplot(lines, columns, index + 1) for index in range(panels)]


def _intervals(axes: Axes, names: Sequence[str], rows: pd.DataFrame, colour: str = "", shift: float = 0.0) -> None:
    """Draw differences with their 95 % intervals, one name below the other; open marks are not told apart from 0."""
    for row in rows.to_dict("records"):
        place = len(names) - 1 - names.index(row["name"]) + shift
        shade = colour or drawing.COLOURS[0]
        if np.isfinite(row["low"]):
            axes.plot([row["low"], row["high"]], [place, place], color=shade, linewidth=1.3)
        told = row["q"] < 0.05
        axes.plot(
            row["difference"], place, "o", color=shade, markerfacecolor=shade if told else "white", markersize=4.5
        )
    axes.axvline(0, color="#56606b", linewidth=0.8)
    axes.set_yticks(range(len(names)), [drawing.label(name) for name in reversed(names)])
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.ticklabel_format(axis="x", style="sci", scilimits=(-3, 4))
    axes.locator_params(axis="x", nbins=4)


def _short(names: Sequence[str]) -> dict[str, str]:
    return {name: text.replace(r"\$", "$") for name, text in drawing.short_names(names).items()}


def draw_perplexity(table: pd.DataFrame) -> Figure | None:
    """Losses of all groups with their error over seeds, and the optimizer's memory: a row of panels for each size."""
    if table.empty:
        return None
    sizes = list(dict.fromkeys(table["size"]))
    most = int(table.groupby("size").size().max())
    figure, grid = _rows_figure(2, most * len(sizes))
    short = _short(table["group"].unique())
    names = [f"{short[row['group']]} ({row['size']})" for row in table.to_dict("records")]
    places = range(len(names) - 1, -1, -1)
    shades = [drawing.COLOURS[sizes.index(size) % len(drawing.COLOURS)] for size in table["size"]]
    for place, row, shade in zip(places, table.to_dict("records"), shades, strict=True):
        error = row["validation_loss_stderr"]
        grid[0].errorbar(row["validation_loss"], place, xerr=None if np.isnan(error) else error, fmt="o", color=shade,
                         markersize=4.5, capsize=2)  # fmt: skip
        grid[1].plot(row["optimizer_state_bytes"] / 2**20, place, "s", color=shade, markersize=4.5)
    for axes, label in zip(grid, ("validation loss (nats per token)", "optimizer state (MiB)"), strict=True):
        axes.set_yticks(list(places), [drawing.label(name) for name in names])
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.set_xlabel(label)
    grid[1].set_yticklabels([])
    grid[1].set_xlim(left=0)
    drawing.figure_title(figure, "Loss and memory at equal tokens", "bars show one standard error over seeds")
    return figure


def draw_metrics(table: pd.DataFrame) -> Figure | None:
    """Differences of each metric to full-rank's at matched loss (else at the last step), in both forms."""
    tested = table[table["difference"].notna()] if len(table) else table
    if tested.empty:
        return None
    place = "matched" if (tested["place"] == "matched").any() else "end"
    tested = tested[tested["place"] == place]
    # the largest size stands for the others, whose numbers are in the table
    size = list(dict.fromkeys(tested["size"]))[-1]
    tested = tested[tested["size"] == size].drop_duplicates(["metric", "form", "group"])
    metrics = list(dict.fromkeys(tested["metric"]))[:_MOST_PANELS]
    short = _short(tested["group"].unique())
    names = [short[name] for name in dict.fromkeys(tested["group"])]
    figure, grid = _grid(len(metrics), len(names))
    for index, (axes, metric) in enumerate(zip(grid, metrics, strict=True)):
        for shift, colour, form in ((0.14, drawing.COLOURS[1], "native"), (-0.14, drawing.COLOURS[0], "comparable")):
            rows = tested[(tested["metric"] == metric) & (tested["form"] == form)]
            _intervals(axes, names, rows.assign(name=rows["group"].map(short)), colour, shift)
        first = tested[tested["metric"] == metric].iloc[0]
        axes.set_title(fill(f"{first['id']} {first['label']}".strip(), 34))
        if index % 3:
            axes.set_yticklabels([])
    handles: list[Artist] = [Line2D([], [], color=drawing.COLOURS[i], marker="o") for i in (1, 0)]
    drawing.legend_below(figure, handles, ["native form", "comparable form (dense, filter-normalised)"])
    where = "at matched loss" if place == "matched" else "at the last step"
    drawing.figure_title(
        figure, f"Metrics minus full-rank's, {size}, {where}", "95 % intervals over seeds", "filled: q < 0.05"
    )
    return figure


def draw_barriers(pairs: pd.DataFrame, reference: Mapping[str, str]) -> Figure | None:
    """Barriers to full-rank and between seeds of each group: a panel for each size and alignment, a dot for a pair."""
    chord = pairs[pairs["definition"] == "barrier_chord"]
    chord = chord if len(chord) else pairs
    panels = [(keys, rows) for keys, rows in chord.groupby(["size", "aligned"], sort=False)]
    if not panels:
        return None
    short = _short(sorted({*chord["group_a"], *chord["group_b"]}))
    kinds: dict[str, None] = {}
    lines = []
    for (size, aligned), rows in panels:
        base = reference.get(str(size))
        for row in rows.to_dict("records"):
            ends = {row["group_a"], row["group_b"]}
            if len(ends) == 1:
                kind = f"{short[row['group_a']]}: its seeds"
            elif base in ends:
                kind = f"{short[next(iter(ends - {base}))]} to full-rank"
            else:
                continue
            kinds[kind] = None
            lines.append((size, aligned, kind, row["value"], row["same_start"], len(ends) == 1))
    names = sorted(kinds)
    if not names:
        return None
    figure, grid = _rows_figure(len(panels), len(names))
    for index, (axes, ((size, aligned), _)) in enumerate(zip(grid, panels, strict=True)):
        for of_size, of_aligned, kind, value, same, within in lines:
            if (of_size, of_aligned) == (size, aligned):
                shade = drawing.COLOURS[2] if within else drawing.COLOURS[0]
                axes.plot(value, len(names) - 1 - names.index(kind), "o", color=shade, markersize=4,
                          markerfacecolor="white" if same else shade)  # fmt: skip
        axes.axvline(0, color="#56606b", linewidth=0.8)
        axes.set_yticks(range(len(names)), [drawing.label(name) for name in reversed(names)] if index == 0 else [])
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.set_xlabel("barrier against the chord (nats)")
        axes.set_title(f"{drawing.label(str(size))}, {'aligned' if aligned else 'plain'}")
    handles: list[Artist] = [
        Line2D([], [], color=drawing.COLOURS[0], marker="o", linestyle="none"),
        Line2D([], [], color=drawing.COLOURS[0], marker="o", linestyle="none", markerfacecolor="white"),
        Line2D([], [], color=drawing.COLOURS[2], marker="o", linestyle="none"),
    ]
    labels = ["two methods", "two methods, one start", "two seeds"]
    drawing.legend_below(figure, handles, labels)
    drawing.figure_title(figure, "Barriers between methods and between seeds", "a mark is a pair of runs")
    return figure


def draw_activations(pairs: pd.DataFrame, reference: Mapping[str, str]) -> Figure | None:
    """CKA with full-rank by depth at the last step: a panel for each size, a line for each group, dashed the null."""
    rows = pairs[(pairs["metric"] == "activation/cka") & pairs["part"].str.isdigit()] if len(pairs) else pairs
    if rows.empty:
        return None
    sizes = list(dict.fromkeys(rows["size"]))
    figure, grid = drawing.panel_grid(len(sizes))
    groups = sorted(rows["group"].unique())
    for axes, size in zip(grid, sizes, strict=True):
        here = rows[rows["size"] == size]
        here = here[here["step"] == here["step"].max()].assign(layer=lambda table: table["part"].astype(int))
        for group, mine in here.groupby("group", sort=True):
            by_layer = mine.groupby("layer")["value"].agg(["mean", "sem"]).sort_index()
            look = _look(groups.index(group), group == reference.get(size))
            axes.errorbar(by_layer.index, by_layer["mean"], yerr=by_layer["sem"].fillna(0), capsize=2, **look)
        axes.set_xlabel("layer (0: embeddings)")
        axes.set_ylabel("CKA with full-rank")
        axes.set_title(drawing.label(str(size)))
        axes.xaxis.set_major_locator(drawing.whole_numbers(here["layer"].min(), here["layer"].max()))
    null = set(reference.values())
    labels = [f"{name}, another seed" if group in null else name for group, name in _short(groups).items()]
    handles: list[Artist] = [Line2D([], [], **_look(i, group in null)) for i, group in enumerate(groups)]
    drawing.legend_below(figure, handles, [drawing.label(label) for label in labels])
    drawing.figure_title(figure, "Activations against full-rank's", "bars: one standard error over pairs")
    return figure


def _look(index: int, null: bool) -> dict[str, Any]:
    look = drawing.line_style(index, 1)
    return {**look, "color": "#000000", "linestyle": "--"} if null else look


def draw_controls(table: pd.DataFrame) -> Figure | None:
    """The parts of each method's difference in the loss: a panel for each size."""
    rows = table[table["metric"] == "validation_loss"] if len(table) else table
    rows = rows[rows["difference"].notna() & (rows["part"] != "factors")] if len(rows) else rows
    if rows.empty:
        return None
    short = _short(rows["group"].unique())
    rows = rows.assign(
        name=[f"{short[group]}: {part}" for group, part in zip(rows["group"], rows["part"], strict=True)]
    )
    sizes = list(dict.fromkeys(rows["size"]))
    names = list(dict.fromkeys(rows.sort_values("group", kind="stable")["name"]))
    figure, grid = _rows_figure(len(sizes), len(names))
    for index, (axes, size) in enumerate(zip(grid, sizes, strict=True)):
        _intervals(axes, names, rows[rows["size"] == size].drop_duplicates("name"))
        axes.set_title(drawing.label(str(size)))
        axes.set_xlabel("difference in loss (nats per token)")
        if index:
            axes.set_yticklabels([])
    drawing.figure_title(
        figure, "What changes the loss: rates or rank", "95 % intervals over seeds", "filled: q < 0.05"
    )
    return figure


def draw_prediction(table: pd.DataFrame, ranks: pd.DataFrame) -> Figure | None:
    """R^2 of the three sets of features by what is left out, and each metric's partial rank correlation."""
    if table.empty:
        return None
    rows = table[table["task"] == table["task"].iloc[0]]
    figure, grid = _rows_figure(2, max(len(ranks), 6))
    sets = (("loss", "loss alone"), ("metrics", "loss and metrics"), ("random", "loss and random numbers"))
    for index, row in enumerate(rows.to_dict("records")):
        for at, (name, _) in enumerate(sets):
            place = len(rows) - 1 - index + 0.22 * (1 - at)
            shade = drawing.COLOURS[(0, 2, 4)[at]]
            grid[0].plot([row[f"{name}_r2_low"], row[f"{name}_r2_high"]], [place, place], color=shade, linewidth=1.3)
            grid[0].plot(row[f"{name}_r2"], place, "o", color=shade, markersize=4.5)
    low = max(float(rows[[f"{name}_r2" for name, _ in sets]].min().min()) - 0.5, -2.0)
    grid[0].set_xlim(min(low, -0.1), 1.02)
    grid[0].set_yticks(range(len(rows)), [f"one {scheme} left out" for scheme in reversed(rows["left_out"].tolist())])
    grid[0].axvline(0, color="#56606b", linewidth=0.8)
    grid[0].set_xlabel("R² of runs left out")
    for place, each in enumerate(reversed(ranks.to_dict("records"))):
        fill_colour = drawing.COLOURS[0] if each["q"] < 0.05 else "white"
        grid[1].plot(
            each["partial_rank_correlation"], place, "o", color=drawing.COLOURS[0], markerfacecolor=fill_colour
        )
    grid[1].axvline(0, color="#56606b", linewidth=0.8)
    grid[1].set_xlim(-1.05, 1.05)
    grid[1].set_yticks(range(len(ranks)), [drawing.label(name) for name in reversed(ranks["metric"].tolist())])
    grid[1].set_xlabel("rank correlation with the scores given the loss")
    handles: list[Artist] = [Line2D([], [], color=drawing.COLOURS[at], marker="o") for at in (0, 2, 4)]
    drawing.legend_below(figure, handles, [words for _, words in sets])
    drawing.figure_title(
        figure, f"Downstream scores ({rows['task'].iloc[0]})", "95 % intervals over groups", "filled: q < 0.05"
    )
    return figure
