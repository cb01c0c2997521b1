"""All numbers of several runs as one tidy frame, and the columns of the table in which they stand.

A column holds numbers that were measured in one way (`hf_lowrank.report.comparability`), each at its run's last
measured step. Texts are on one line and may hold whatever the reports hold.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from hf_lowrank.compare.matched import Taken
from hf_lowrank.report.catalogue import entry_of, headline_metric, headline_metrics
from hf_lowrank.report.comparability import EVALUATION_HASH, Kind, Number, latest, numbers
from hf_lowrank.report.evidence import Kept
from hf_lowrank.report.markdown import one_line
from hf_lowrank.report.model import Report
from hf_lowrank.report.values import describe

__all__ = [
    "COSTS", "Column", "ComparedRun", "collect", "columns_of", "defining_settings", "metric_words", "telling_apart",
]  # fmt: skip

_SPACES = {None: 0, "dense": 1, "linearised": 2, "native": 3}
# name -> (label, unit)
COSTS: Mapping[str, tuple[str, str]] = {
    "parameters": ("Parameters", "count"),
    "parameters_trained": ("Parameters trained", "count"),
    "optimizer_state_bytes": ("Optimizer state", "bytes"),
    "peak_memory_bytes": ("Peak memory", "bytes"),
    "flops": ("Floating-point operations", "flops"),
    "wall_time_seconds": ("Wall time", "seconds"),
    "tokens_per_second": ("Tokens a second, in training", "count"),
    "optimizer_seconds_per_step": ("Optimizer, a step", "seconds"),
    "refresh_seconds_per_step": ("Refreshes, a step on average", "seconds"),
    "steps_taken": ("Steps to get there", "count"),
    "tokens_taken": ("Tokens to get there", "count"),
}
# of the whole run, not of the place at which it is taken
_OF_THE_END = ("flops", "wall_time_seconds")


@dataclass(frozen=True)
class ComparedRun:
    """A run that takes part in a comparison.

    Attributes:
        label: what it is called, different from all others'.
        report: its valid report.
        tables: its checked parquet tables by name (`training`, `landscape`, ...).
        repo: `user/name` or `user/name@revision` if it comes from the Hub.
        problems: a sentence for each table that could not be read.
        kept: what the run keeps of its measurements, by which numbers are compared unit by unit.
        taken: where in its training it is taken; None for its end.
    """

    label: str
    report: Report
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    repo: str | None = None
    problems: Sequence[str] = ()
    kept: Kept = field(default_factory=Kept)
    taken: Taken | None = None


@dataclass(frozen=True)
class Column:
    """A metric measured in one way.

    Attributes:
        kind, name, space: what it is; the name of a downstream result is `task/metric`.
        id, label, group, unit: H1 to H16 or None, and words for people.
        settings: all settings on one line.
        distinct: the space, and the settings in which columns of the same metric differ.
        headline: whether it belongs in a short table.
    """

    kind: Kind
    name: str
    space: str | None
    id: str | None
    label: str
    group: str
    unit: str
    settings: str
    distinct: str
    headline: bool

    @property
    def title(self) -> str:
        """Number, label and what distinguishes it from other columns, on one line."""
        named = f"{self.id} {self.label}" if self.id else self.label
        return f"{named} ({self.distinct})" if self.distinct else named


def collect(runs: Sequence[ComparedRun]) -> pd.DataFrame:
    """Return every number of every run, one line for each run, quantity and step.

    `run` is the run's index, `number` the number itself; `kind`, `metric`, `space`, `step`, `value` and `stderr` are
    its fields. Numbers of one `series` are points of one curve. `column` is -1 for numbers that are not in the table.
    """
    of_runs = _placed([[*numbers(run.report), *_interpolated(run), *_costs(run)] for run in runs])
    series: dict[tuple[Any, ...], Number] = {}
    lines = []
    for run, measured in enumerate(of_runs):
        speaking = {id(number) for number in _speaking(runs[run], measured)}
        for number in measured:
            # a number on an unknown text has a series and a column of its own
            owner = () if number.comparable else (run,)
            series.setdefault((*number.quantity, *owner), number)
            column = (*number.column, *owner) if id(number) in speaking else None
            lines.append((run, number, (*number.quantity, *owner), column))
    places = {metric.name: place for place, metric in enumerate(headline_metrics())}
    ranks = {key: rank for rank, key in enumerate(sorted(series, key=lambda key: _place(series[key], places)))}
    lines.sort(key=lambda line: (ranks[line[2]], line[0], line[1].column))
    columns = {key: at for at, key in enumerate(dict.fromkeys(column for *_, column in lines if column is not None))}
    points = pd.DataFrame(
        [
            {
                "run": run,
                "kind": number.kind,
                "metric": number.name,
                "space": number.space,
                "step": number.step,
                "value": number.value,
                "stderr": number.stderr,
                "series": ranks[key],
                "column": -1 if column is None else columns[column],
                "number": number,
            }
            for run, number, key, column in lines
        ]
    ).astype({"step": float, "value": float, "stderr": float})
    # larger numbers cannot be squared and summed; nothing that is measured comes near
    points["value"] = points["value"].where(points["value"].abs() <= 1e150)
    points["stderr"] = points["stderr"].where(points["value"].notna() & (points["stderr"] <= 1e150))
    return points


def _interpolated(run: ComparedRun) -> Sequence[Number]:
    return () if run.taken is None else run.taken.numbers


def _speaking(run: ComparedRun, measured: Sequence[Number]) -> list[Number]:
    """Return the numbers that stand in the table for a run: the latest, or those of where it is taken."""
    if run.taken is None:
        return latest(measured)
    there = {id(number) for number in run.taken.numbers}
    exact = [n for n in measured if n.kind == "cost" or (n.step is not None and n.step == run.taken.exact)]
    return [*latest(exact), *(number for number in measured if id(number) in there)]


def _costs(of_run: ComparedRun) -> Iterator[Number]:
    run, taken = of_run.report.run, of_run.taken
    values = {
        "parameters": run.model.parameters,
        "parameters_trained": run.model.parameters_trained,
        "optimizer_state_bytes": run.optimizer_state_bytes.best,
        "peak_memory_bytes": run.peak_memory_bytes.value,
        "flops": run.flops,
        "wall_time_seconds": run.wall_time_seconds,
        **(run.speed or {}),
    }
    if taken is not None:
        values |= {"steps_taken": taken.step, "tokens_taken": taken.tokens}
        if taken.exact != run.steps:
            values |= dict.fromkeys(_OF_THE_END)
    for name, value in values.items():
        if value is not None:
            # peaks compare only if they were taken in the same way
            settings = {"kind": run.peak_memory_bytes.kind} if name == "peak_memory_bytes" else {}
            yield Number("cost", name, None, settings, {}, {}, None, value, None)


def _placed(of_runs: Sequence[Sequence[Number]]) -> list[list[Number]]:
    """Give numbers that could not be measured, and have few settings, the settings of other runs' numbers."""
    measured: dict[tuple[Any, ...], list[Number]] = {}
    for numbers_of_run in of_runs:
        for number in numbers_of_run:
            if number.value is not None and number.comparable:
                measured.setdefault((number.kind, number.name, number.space), []).append(number)

    def beside(number: Number) -> Number:
        if number.value is not None:
            return number
        known = {key: value for key, value in number.settings.items() if value is not None}
        others = measured.get((number.kind, number.name, number.space), [])
        near = [other for other in others if known.items() <= other.settings.items()]
        near = [other for other in near if other.step == number.step] or near
        if not near:
            return number
        quantities = [other.quantity for other in near]
        usual = near[quantities.index(max(quantities, key=quantities.count))]
        return replace(number, settings=usual.settings, reference=usual.reference)

    return [[beside(number) for number in numbers_of_run] for numbers_of_run in of_runs]


def _place(number: Number, places: Mapping[str, int]) -> tuple[Any, ...]:
    """Return the sort key of a quantity: headline metrics, tasks, costs, then other metrics by name."""
    if number.kind == "evaluation":
        place: tuple[float, str] = (100, number.name)
    elif number.kind == "cost":
        place = (101 + list(COSTS).index(number.name) / 10, "")
    elif number.name in places:
        place = (places[number.name], "")
    else:
        place = (math.inf, number.name)
    return (*place, _SPACES[number.space], describe(dict(number.settings)))


# ---- columns ----


def telling_apart(numbers: Sequence[Number], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Describe for each number the settings in which numbers of the same metric differ."""
    texts = pd.DataFrame(
        [
            {key: json.dumps(value, sort_keys=True) for key, value in own.items() if value is not None}
            for own in settings
        ]
    )
    metrics = pd.Series([number.name for number in numbers], dtype=object)
    differing = texts.groupby(metrics).nunique(dropna=False) > 1
    return [
        describe({key: own[key] for key in texts.columns if key in own and differing.at[number.name, key]})
        for number, own in zip(numbers, settings, strict=True)
    ]


def defining_settings(number: Number, label: str) -> dict[str, Any]:
    """Return the settings that define a number, to show them; an unknown text is that of its run alone."""
    unknown = {} if number.comparable else {EVALUATION_HASH: f"not recorded ({label})"}
    return {**number.settings, **unknown}


def metric_words(name: str) -> tuple[str, str]:
    """Return a metric's title and unit; an unknown metric has its name as title and no unit."""
    metric = headline_metric(name)
    if metric is None:
        return name, ""
    return f"{metric.id} {metric.label}" if metric.id else metric.label, metric.axis


def columns_of(points: pd.DataFrame, runs: Sequence[ComparedRun]) -> list[Column]:
    """Return the columns of the table in order."""
    first = points[points["column"] >= 0].drop_duplicates("column").sort_values("column")
    labels = [runs[run].label for run in first["run"]]
    numbers: list[Number] = first["number"].tolist()
    settings = [
        {**defining_settings(number, label), **number.reference} for number, label in zip(numbers, labels, strict=True)
    ]
    return list(map(_column, numbers, settings, telling_apart(numbers, settings)))


def _column(number: Number, settings: Mapping[str, Any], told: str) -> Column:
    metric = headline_metric(number.name)
    if number.kind == "evaluation":
        task, _, measure = number.name.rpartition("/")
        label, group, unit = f"{task} ({measure})", "Downstream tasks", measure
    elif number.kind == "cost":
        (label, unit), group = COSTS[number.name], "Cost"
    else:
        label, unit = (metric.label, metric.axis) if metric else (number.name, "")
        family = entry_of(number.name)
        group = family.title if family else number.name.partition("/")[0].replace("_", " ").capitalize()
    return Column(
        kind=number.kind,
        name=number.name,
        space=number.space,
        id=metric.id if metric else None,
        label=label,
        group=group,
        unit=unit,
        settings=one_line(describe(dict(settings))),
        distinct=one_line(", ".join(part for part in (number.space, told) if part)),
        headline=metric is not None or number.kind == "evaluation",
    )
