"""Any two numbers against each other, over runs and checkpoints: what the page's scatter plot is drawn from.

The page joins two quantities by run and step; what a whole run costs stands at each of its steps. Runs that differ in
their seed alone have one colour in several shades.
"""

from typing import Any

import pandas as pd

from hf_lowrank.compare.frame import COSTS, defining_settings, metric_words, telling_apart
from hf_lowrank.compare.table import Comparison
from hf_lowrank.figures.drawing import evenly
from hf_lowrank.report.catalogue import entry_of
from hf_lowrank.report.comparability import Number, settings_key
from hf_lowrank.report.markdown import one_line

__all__ = ["scatter"]

_MOST_POINTS = 200  # of a run in one quantity
# unit of a cost -> larger ones
_UNITS = {
    "bytes": ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")),
    "count": ((1e9, "billions"), (1e6, "millions")),
    "flops": tuple((10.0**power, f"10^{power}") for power in (21, 18, 15, 12, 9)),
    "seconds": ((3600, "hours"), (60, "minutes")),
}
_SMALLER = ("validation_loss", "perplexity")


def scatter(comparison: Comparison) -> dict[str, Any]:
    """Return runs, lists of steps and quantities as plain data.

    A run has its row, its colour (the row of the first of its seeds), its shade, and the step at which it is taken
    (None: its last). A quantity has `better` (`smaller`, `larger` or "" if neither is known) and its values: for each
    run the run's index, the index of a list of steps (-1: one value for the whole run) and the values, and the
    interpolated value if the run is taken between two checkpoints.
    """
    points = comparison.points.dropna(subset=["row", "value"])
    groups = [group for _, group in points.groupby("series")]
    numbers: list[Number] = [group["number"].iloc[0] for group in groups]
    labels = [comparison.runs[group["run"].iloc[0]].label for group in groups]
    defining = [defining_settings(number, label) for number, label in zip(numbers, labels, strict=True)]
    steps: dict[tuple[int, ...], int] = {}
    quantities: list[dict[str, Any]] = []
    for number, told, group in zip(numbers, telling_apart(numbers, defining), groups, strict=True):
        words = _words(number, told)
        unit, size = _unit(words["unit"], float(group["value"].abs().max()))
        scaled = group.assign(value=group["value"] / size)
        values = [_values(run, of_run, steps) for run, of_run in scaled.groupby("run")]
        words |= {"name": one_line(number.name), "unit": unit, "better": _better(number)}
        quantities.append({**words, "of": values})
    return {"runs": _runs(comparison), "steps": list(map(list, steps)), "quantities": quantities}


def _runs(comparison: Comparison) -> list[dict[str, Any]]:
    """Return what is said of each run; of a run without a row nothing."""
    row_of = {run: place for place, row in enumerate(comparison.rows) for run in row.members}
    kin: dict[str, list[int]] = {}
    said: list[dict[str, Any]] = []
    for index, run in enumerate(comparison.runs):
        if index not in row_of:
            said.append({})
            continue
        seed = run.report.run.seeds.seed
        group = kin.setdefault(settings_key(run.report) if seed is not None else f"{index}", [])
        group.append(row_of[index])
        place = {} if run.taken is None else {"step": run.taken.step, "place": run.taken.text}
        words = "" if seed is None else f"seed {seed}"
        said.append(
            {
                "label": run.label,
                "seed": words,
                "row": row_of[index],
                "kin": group[0],
                "shade": len(group) - 1,
                **place,
            }
        )
    return said


def _values(run: Any, points: pd.DataFrame, steps: dict[tuple[int, ...], int]) -> list[Any]:
    curve = points.dropna(subset=["step"]).drop_duplicates("step", keep="last").sort_values("step")
    between = points[points["step"].isna()]["value"]
    if curve.empty:
        # of the whole run, unless it is taken between two checkpoints
        whole = points["kind"].iloc[0] == "cost"
        return (
            [int(run), -1, _short(between[:1])] if whole else [int(run), _known(steps, ()), [], *_short(between[-1:])]
        )
    kept = curve.iloc[evenly(list(range(len(curve))), _MOST_POINTS)]
    places = tuple(int(step) for step in kept["step"])
    return [int(run), _known(steps, places), _short(kept["value"]), *_short(between[-1:])]


def _known(steps: dict[tuple[int, ...], int], places: tuple[int, ...]) -> int:
    return steps.setdefault(places, len(steps))


def _short(values: "pd.Series[float]") -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def _unit(unit: str, largest: float) -> tuple[str, float]:
    """Return a unit in which costs have few digits, and its size."""
    for size, name in _UNITS.get(unit, ()):
        if largest >= size:
            return name, size
    return ("" if unit == "count" else unit), 1.0


def _words(number: Number, told: str) -> dict[str, str]:
    """Return title, detail, group and unit."""
    weights = f"{number.space} weights" if number.space else ""
    detail = one_line(", ".join(part for part in (weights, told) if part))
    if number.kind == "cost":
        title, unit = COSTS[number.name]
        return {"title": title, "detail": detail, "group": "Cost", "unit": unit}
    if number.kind == "evaluation":
        task, _, measure = number.name.rpartition("/")
        title = f"{one_line(task)} ({one_line(measure)})"
        return {"title": title, "detail": detail, "group": "Downstream tasks", "unit": one_line(measure)}
    title, unit = metric_words(number.name)
    family = entry_of(number.name)
    return {"title": one_line(title), "detail": detail, "group": family.title if family else "Other", "unit": unit}


def _better(number: Number) -> str:
    higher = number.about.get("higher_is_better")
    if number.kind == "cost" or number.name in _SMALLER or higher is False:
        return "smaller"
    return "larger" if higher is True else ""
