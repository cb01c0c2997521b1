"""The pictures of a run, drawn from what is in its `publish/metrics` folder.

matplotlib's object interface with the Agg canvas: pyplot's global state, and whatever backend a user has chosen, are
left alone. The same tables give the same bytes.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from hf_lowrank.figures.activation import SIMILARITIES, similarity_over_depth, similarity_over_steps
from hf_lowrank.figures.axes import STYLE
from hf_lowrank.figures.interpolation import barrier_map, barriers_over_steps, interpolation_paths
from hf_lowrank.figures.landscape import curvature_over_steps, landscape_curves, sharpness_over_steps
from hf_lowrank.figures.tables import read_records, read_table
from hf_lowrank.figures.training import SPECTRAL, loss, spectra_over_depth, spectra_over_steps
from hf_lowrank.report.files import atomic_path

__all__ = ["TABLES", "draw_figures", "save_figure"]

_DPI = 150

# table -> columns of numbers, of texts, and numbers that may be missing
TABLES: dict[str, tuple[Sequence[str], Sequence[str], Sequence[str]]] = {
    "training": (["step"], [], ["loss", "eval_loss", "learning_rate", "grad_norm"]),
    "spectral": (["step", "layer"], ["space", "name", "module"], [metric.name for metric in SPECTRAL]),
    "landscape": (["step", "direction", "x", "loss"], ["space", "subject"], []),
    "interpolation": (["step", "other_step", "alpha", "loss"], ["space", "subject", "other"], ["stderr"]),
    "barrier_map": (["step", "barrier"], ["run_a", "method_a", "run_b", "method_b", "aligned"], []),
    "activation": (
        ["step", "layer", "baseline_step"],
        ["baseline"],
        [*SIMILARITIES, *(f"{name}_stderr" for name in SIMILARITIES)],
    ),
}


def draw_figures(publish: Path) -> list[Path]:
    """Draw every picture whose data are in `publish/metrics` into `publish/figures`; return the paths.

    One left from an earlier drawing whose data are missing now is removed, so that a card never shows it. Raises
    `ValueError` for a table that cannot be read or lacks a column that it must have; nothing is drawn then.
    """
    drawn = []
    data = _read(publish / "metrics")
    with matplotlib.rc_context(STYLE):
        for name, draw, source in _PICTURES:
            path = publish / "figures" / name
            figure = draw(data[source])
            if figure is None:
                path.unlink(missing_ok=True)
                continue
            drawn.append(save_figure(figure, path))
    return drawn


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, the same bytes for the same figure; return the path."""
    with atomic_path(path) as temporary:
        # Software would put matplotlib's version into the file
        figure.savefig(temporary, format="png", dpi=_DPI, metadata={"Software": None})
    return path


# (picture, what draws it, its data)
_PICTURES: tuple[tuple[str, Callable[[pd.DataFrame], Figure | None], str], ...] = (
    ("loss.png", loss, "training.parquet"),
    ("landscape_curves.png", landscape_curves, "landscape.parquet"),
    ("sharpness_over_steps.png", sharpness_over_steps, "landscape.json"),
    ("curvature_over_steps.png", curvature_over_steps, "curvature.json"),
    ("interpolation_paths.png", interpolation_paths, "interpolation.parquet"),
    ("barriers_over_steps.png", barriers_over_steps, "interpolation.json"),
    ("barrier_map.png", barrier_map, "barrier_map.parquet"),
    ("spectra_over_steps.png", spectra_over_steps, "spectral.parquet"),
    ("spectra_over_depth.png", spectra_over_depth, "spectral.parquet"),
    ("similarity_over_steps.png", similarity_over_steps, "activation.parquet"),
    ("similarity_over_depth.png", similarity_over_depth, "activation.parquet"),
)


def _read(metrics: Path) -> dict[str, pd.DataFrame]:
    """Read all tables and lists of records before anything is drawn."""
    return {
        **{f"{name}.parquet": read_table(metrics / f"{name}.parquet", *columns) for name, columns in TABLES.items()},
        **{name: read_records(metrics / name) for name in ("landscape.json", "interpolation.json", "curvature.json")},
    }
