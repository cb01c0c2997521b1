"""The pictures of a run, drawn from the parquet files in its `publish/metrics` folder.

matplotlib's object interface with the Agg canvas: pyplot's global state, and whatever backend a user has chosen, are
left alone. The same tables give the same bytes.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, Locator, MaxNLocator, StrMethodFormatter

from hf_lowrank.report.files import replacing
from hf_lowrank.report.headline import HEADLINE_METRICS, HeadlineMetric

__all__ = ["draw_figures"]

_DPI = 150
# Okabe and Ito's palette, which colour-blind readers can tell apart, without its yellow, too pale on white
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LINES = ("-", "--", ":", "-.")
_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "savefig.bbox": None,
}
_SPECTRAL = tuple(metric for metric in HEADLINE_METRICS if metric.name.startswith("spectral/"))
_MARKED_POINTS = 40  # beyond this many points a line goes without markers


def draw_figures(publish: Path) -> list[Path]:
    """Draw `loss.png`, `spectra_over_steps.png` and `spectra_over_depth.png` into `publish/figures`; return the paths.

    Reads `metrics/training.parquet` (the Trainer's log history) and `metrics/spectral.parquet` (one row a matrix and
    step). A picture whose data are missing is not drawn, and one left from an earlier drawing is removed, so that a
    card never shows it. Raises `ValueError` for a table that cannot be read or lacks a column that it must have.
    """
    training = _read(publish / "metrics" / "training.parquet", "step")
    spectral = _read(publish / "metrics" / "spectral.parquet", "step", "space", "name", "layer", "module")
    if not spectral.empty:
        spectral = _one_space(spectral)
    drawn = []
    with matplotlib.rc_context(_STYLE):
        for name, figure in (
            ("loss.png", _loss(training)),
            ("spectra_over_steps.png", _over_steps(spectral)),
            ("spectra_over_depth.png", _over_depth(spectral)),
        ):
            path = publish / "figures" / name
            if figure is None:
                path.unlink(missing_ok=True)
                continue
            with replacing(path) as temporary:
                # Software would put matplotlib's version into the file
                figure.savefig(temporary, format="png", dpi=_DPI, metadata={"Software": None})
            drawn.append(path)
    return drawn


def _read(path: Path, *columns: str) -> pd.DataFrame:
    if not path.is_file():
        return pd.DataFrame()
    try:
        table = pd.read_parquet(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: not readable as parquet ({error})") from error
    missing = [column for column in columns if column not in table]
    if missing:
        raise ValueError(f"{path}: no column {', '.join(missing)}; there are {', '.join(map(str, table.columns))}")
    return table.replace([np.inf, -np.inf], np.nan)


def _one_space(spectral: pd.DataFrame) -> pd.DataFrame:
    """Keep the rows of one space, the dense one where there is one: spectra of factors and of products do not mix."""
    present = set(spectral["space"])
    chosen = next((space for space in ("dense", "linearised", "native") if space in present), None)
    return spectral[spectral["space"] == chosen]


def _new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _loss(training: pd.DataFrame) -> Figure | None:
    """Draw training and validation loss over steps, with perplexity on the right."""
    curves = []
    for column, label, colour in (("loss", "training", _COLOURS[0]), ("eval_loss", "validation", _COLOURS[4])):
        if column in training:
            points = training[["step", column]].dropna().sort_values("step")
            if len(points):
                curves.append((points["step"], points[column], label, colour))
    if not curves:
        return None
    figure = _new_figure(6.4, 4.0)
    axes = figure.add_subplot()
    for steps, loss, label, colour in curves:
        few = len(steps) <= _MARKED_POINTS
        axes.plot(
            steps,
            loss,
            color=colour,
            marker="o" if few else None,
            markersize=3,
            linewidth=1.5 if few else 1.0,
            label=label,
        )
    axes.set_title("Loss over training")
    axes.set_ylabel("cross-entropy (nats per token)")
    _step_axis(axes, pd.concat([steps for steps, *_ in curves]))
    _perplexity_axis(axes)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _perplexity_axis(axes: Axes) -> None:
    """Mark round perplexities on the right, where at least two of them fall into the axis' range."""
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


def _over_steps(spectral: pd.DataFrame) -> Figure | None:
    """Draw, for each metric, mean, quartiles and range over the matrices at every measured step."""
    panels = [metric for metric in _SPECTRAL if metric.name in spectral and spectral[metric.name].notna().any()]
    if not panels:
        return None
    figure, grid = _panel_grid(len(panels))
    colour = _COLOURS[0]
    for axes, metric in zip(grid, panels, strict=True):
        values = spectral[["step", metric.name]].dropna().groupby("step")[metric.name]
        mean, low, high = values.mean(), values.min(), values.max()
        steps = mean.index.to_numpy()
        if len(steps) == 1:  # a band of one point is invisible
            axes.vlines(steps, low, high, color=colour, alpha=0.3, linewidth=6)
            axes.vlines(steps, values.quantile(0.25), values.quantile(0.75), color=colour, alpha=0.5, linewidth=6)
        else:
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.fill_between(
                steps, values.quantile(0.25), values.quantile(0.75), color=colour, alpha=0.3, linewidth=0
            )
        axes.plot(steps, mean, color=colour, marker="o" if len(steps) <= _MARKED_POINTS else None, markersize=3)
        _value_axis(axes, metric, low.min(), high.max())
        _step_axis(axes, spectral["step"])
    figure.suptitle(f"Spectra over training: {_what(spectral)}", fontsize=10.5)
    figure.legend(
        [
            Line2D([], [], color=colour, marker="o", markersize=3),
            Patch(color=colour, alpha=0.45, linewidth=0),
            Patch(color=colour, alpha=0.15, linewidth=0),
        ],
        ["mean over matrices", "middle half", "smallest to largest"],
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    return figure


def _over_depth(spectral: pd.DataFrame) -> Figure | None:
    """Draw, for each metric, its value in every layer at the last step that has one, a line a kind of module."""
    panels = list(_depth_panels(spectral))
    if not panels:
        return None
    kinds = list(dict.fromkeys(kind for _, _, table in panels for kind in table.columns))
    layers = np.concatenate([table.index.to_numpy() for _, _, table in panels])
    last = max(step for _, step, _ in panels)
    figure, grid = _panel_grid(len(panels))
    for axes, (metric, step, table) in zip(grid, panels, strict=True):
        for kind in table.columns:
            values = table[kind].dropna()
            axes.plot(values.index, values, **_kind_style(kinds.index(kind), len(table)))
        _value_axis(axes, metric, table.min().min(), table.max().max())
        if step != last:
            axes.set_title(f"{axes.get_title()}, step {step:,}")
        axes.set_xlim(layers.min() - 0.5, layers.max() + 0.5)
        axes.xaxis.set_major_locator(_whole_numbers(layers.min(), layers.max()))
        axes.set_xlabel("layer (index from the input)")
    figure.suptitle(f"Spectra over depth at step {last:,}: {_what(spectral)}", fontsize=10.5)
    figure.legend(
        [Line2D([], [], **_kind_style(index, len(set(layers)))) for index in range(len(kinds))],
        [_label(kind) for kind in kinds],
        loc="outside lower center",
        ncols=min(len(kinds), 4),
        frameon=False,
    )
    return figure


def _depth_panels(spectral: pd.DataFrame) -> Iterator[tuple[HeadlineMetric, int, pd.DataFrame]]:
    """Yield (metric, step, table of layers by kinds of module) for every metric that has values in some layer."""
    for metric in _SPECTRAL:
        if metric.name not in spectral:
            continue
        rows = spectral[["step", "layer", "module", metric.name]].dropna()
        if rows.empty:
            continue
        step = int(rows["step"].max())
        rows = rows[rows["step"] == step]
        # the experts of one layer are one kind: a line each would bury the rest
        kinds = rows["module"].map(lambda module: re.sub(r"(?<=\.)\d+(?=\.|$)", "*", str(module)))
        table = rows.assign(kind=kinds).pivot_table(index="layer", columns="kind", values=metric.name, aggfunc="mean")
        yield metric, step, table[kinds.unique()]  # in the model's order, not the alphabet's


def _panel_grid(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(count, 3)
    rows = -(-count // columns)
    figure = _new_figure(1.2 + 3.0 * columns, 1.1 + 2.4 * rows)
    return figure, [figure.add_subplot(rows, columns, index + 1) for index in range(count)]


def _value_axis(axes: Axes, metric: HeadlineMetric, low: float, high: float) -> None:
    axes.set_title(metric.label)
    axes.set_ylabel(metric.axis)
    if low > 0 and high / low > 50:  # the first update of a run is often a hundred times the later ones
        axes.set_yscale("log")


def _step_axis(axes: Axes, steps: "pd.Series[Any]") -> None:
    first, last = steps.min(), steps.max()
    margin = 0.03 * (last - first) or 0.5
    axes.set_xlim(first - margin, last + margin)
    axes.xaxis.set_major_locator(_whole_numbers(first, last))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("optimizer step")


def _whole_numbers(first: float, last: float) -> Locator:
    # between two whole numbers MaxNLocator would tick fractions, integer=True or not
    return FixedLocator([first]) if first == last else MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], integer=True)


def _what(spectral: pd.DataFrame) -> str:
    count = spectral["name"].nunique()
    return f"{count:,} {'matrix' if count == 1 else 'matrices'}, {spectral['space'].iloc[0]} weights"


def _kind_style(index: int, points: int) -> dict[str, Any]:
    """Return a line's look: colour and marker change together, the line style once the colours are used up."""
    turn = index // len(_COLOURS)
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "marker": _MARKERS[index % len(_MARKERS)] if points <= _MARKED_POINTS else None,
        "linestyle": _LINES[turn % len(_LINES)],
        "markersize": 3.5,
        "linewidth": 1.2,
    }


def _label(text: str) -> str:
    """Return a legend label: no mathematics between dollars, and shown although it may begin with an underscore."""
    plain = text.replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain
