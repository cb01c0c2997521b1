"""Numbers by layer, of runs and over steps: what the page's heat maps are drawn from."""

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from hf_lowrank.compare.table import Comparison
from hf_lowrank.figures.activation import SIMILARITIES
from hf_lowrank.figures.drawing import evenly
from hf_lowrank.report.catalogue import SPECTRAL
from hf_lowrank.report.markdown import one_line

__all__ = ["heat_maps"]

_MOST_STEPS = 40  # of a run


def heat_maps(comparison: Comparison) -> list[dict[str, Any]]:
    """Return each quantity that layers have, as plain data.

    A map has `title`, `detail`, `unit`, and for each row of the comparison that has it: the row's index, steps, layers
    and a list of values for each step (None where there is none). Spectral metrics are means over a layer's matrices;
    several seeds are one map, their mean.
    """
    maps = []
    for title, detail, unit, name, table, chosen in _quantities(comparison):
        runs = [_of_row(comparison, row.members, name, table, chosen) for row in comparison.rows]
        of = [{"row": row, **found} for row, found in enumerate(runs) if found is not None]
        if any(len(one["layers"]) > 1 for one in of):
            maps.append({"title": title, "detail": detail, "unit": unit, "of": of})
    return maps


def _quantities(comparison: Comparison) -> Iterator[tuple[str, str, str, str, str, dict[str, str]]]:
    """Yield title, detail, unit, column, table of every quantity, and the values by which its rows are chosen."""
    for space in _values(comparison, "spectral", "space"):
        for metric in SPECTRAL.metrics:
            about = f"{metric.id} {metric.label}", f"{one_line(space)} weights", metric.axis
            yield (*about, metric.name, "spectral", {"space": space})
    for baseline in _values(comparison, "activation", "baseline"):
        for name, words in SIMILARITIES.items():
            about = f"{words} with the baseline's activations", one_line(baseline), ""
            yield (*about, name, "activation", {"baseline": baseline})


def _values(comparison: Comparison, table: str, column: str) -> list[str]:
    tables = [run.tables[table] for run in comparison.runs if table in run.tables]
    return list(dict.fromkeys(str(value) for each in tables for value in each[column].unique()))


def _of_row(
    comparison: Comparison, members: Sequence[int], name: str, table: str, chosen: dict[str, str]
) -> dict[str, Any] | None:
    parts = []
    for member in members:
        rows = comparison.runs[member].tables.get(table)
        if rows is None or name not in rows:
            continue
        for column, value in chosen.items():
            rows = rows[rows[column].astype(str) == value]
        parts.append(rows[["step", "layer", name]].dropna())
    found = pd.concat(parts) if parts else pd.DataFrame()
    found = found[found[name].abs() < 1e150] if len(found) else found
    if found.empty:
        return None
    grid = found.groupby(["step", "layer"])[name].mean().unstack("layer")
    grid = grid.loc[evenly(list(grid.index), _MOST_STEPS)]
    values = [[None if pd.isna(value) else float(f"{value:.4g}") for value in row] for row in grid.to_numpy()]
    return {"steps": [int(step) for step in grid.index], "layers": [int(each) for each in grid], "values": values}
