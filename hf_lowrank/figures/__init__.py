"""The pictures of a run, drawn from the files in its `publish/metrics` folder.

The catalogue of metrics lists the pictures with their files and functions. They are drawn with matplotlib's object
interface and the Agg canvas, which leave pyplot's state and the user's backend alone. The same tables give the same
bytes.
"""

from pathlib import Path
from pkgutil import resolve_name

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from hf_lowrank.figures.drawing import STYLE
from hf_lowrank.figures.tables import read_records, read_table, table_up_to
from hf_lowrank.report.catalogue import entries, tables
from hf_lowrank.report.files import atomic_path
from hf_lowrank.report.io import ReportError, read_report

__all__ = ["draw_figures", "save_figure"]

_DPI = 150


def draw_figures(publish: Path) -> list[Path]:
    """Draw every picture whose data are in `publish/metrics` into `publish/figures` and return the paths.

    Where the report is of the best step, metrics of later ones are left out; the training curve is shown as a whole.

    An earlier picture whose data are missing now is removed, so that no card shows it. Raises `ValueError`, before
    anything is drawn, if a table cannot be read or lacks a required column.
    """
    pictures = [(entry, picture) for entry in entries() for picture in entry.pictures]
    last_step = _last_step(publish)
    sources = {picture.source for _, picture in pictures}
    data = {source: _read(publish / "metrics" / source, last_step) for source in sources}
    paths = []
    with matplotlib.rc_context(STYLE):
        for entry, picture in pictures:
            path = publish / "figures" / picture.file
            draw = resolve_name(picture.draw or f"hf_lowrank.figures.{entry.name}:{path.stem}")
            figure = draw(data[picture.source])
            if figure is None:
                path.unlink(missing_ok=True)
            else:
                paths.append(save_figure(figure, path))
    return paths


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, the same bytes for the same figure; return the path."""
    with atomic_path(path) as temporary:
        # Software would put matplotlib's version into the file
        figure.savefig(temporary, format="png", dpi=_DPI, metadata={"Software": None})
    return path


def _last_step(publish: Path) -> int | None:
    try:
        return read_report(publish).run.last_step()
    except (FileNotFoundError, ReportError):
        return None


def _read(path: Path, last_step: int | None) -> pd.DataFrame:
    table = read_table(path, tables()[path.stem]) if path.suffix == ".parquet" else read_records(path)
    return table_up_to(last_step, path.stem, table)
