"""What the reports of several runs have in common: each quantity, measured in one way, over the runs and their steps.

Numbers are put side by side only where name, space and settings agree and, for whatever is measured on text, the
evaluation set as well. Everything else becomes a series of its own.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pandas as pd

from hf_lowrank.report.catalogue import HEADLINE_METRICS
from hf_lowrank.report.markdown import one_line
from hf_lowrank.report.model import details
from hf_lowrank.report.tables import describe

__all__ = [
    "COSTS", "DESCRIPTIVE", "ComparedRun", "Kind", "Point", "Series", "collect", "data_identity", "differing_settings",
]  # fmt: skip

Kind = Literal["metric", "evaluation", "cost"]

# what varies with the model or the run at hand and not with how a number was measured
DESCRIPTIVE = frozenset(
    (
        *("matrices", "total", "layers", "stderr", "explained", "checkpoints", "note", "error"),
        *("form", "dtype", "context_length", "requests", "truncated_requests", "chance", "higher_is_better"),
        "bootstrap_iterations",
    )
)
# what varies along one run: these split the columns of a table, not the points of a curve
_STEP_BOUND = frozenset(("since", "other_step", "baseline_step"))
_CONSECUTIVE = "interpolation/consecutive/"
_HASH = "evaluation_hash"

# name -> (label, unit)
COSTS: Mapping[str, tuple[str, str]] = {
    "parameters": ("Parameters", "count"),
    "parameters_trained": ("Parameters trained", "count"),
    "optimizer_state_bytes": ("Optimizer state", "bytes"),
    "peak_memory_bytes": ("Peak memory", "bytes"),
    "flops": ("Floating-point operations", "flops"),
    "wall_time_seconds": ("Wall time", "seconds"),
}


@dataclass(frozen=True)
class ComparedRun:
    """A run that takes part in a comparison.

    Attributes:
        label: what it is called, different from all others'.
        report: its valid report.
        tables: its parquet tables by name (`training`, `landscape`, ...), checked; empty ones where there are none.
        repo: `user/name` or `user/name@revision` where it comes from the Hub.
        problems: what of its metrics could not be read, a sentence each.
    """

    label: str
    report: Mapping[str, Any]
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    repo: str | None = None
    problems: Sequence[str] = ()


@dataclass(frozen=True)
class Point:
    """A number of one run (by its index) at one step; `bound` are the settings that belong to that step alone."""

    run: int
    step: int | None
    value: float | None
    stderr: float | None
    settings: Mapping[str, Any]
    bound: Mapping[str, Any]


@dataclass
class Series:
    """One quantity measured in one way.

    Attributes:
        kind, name, space: what it is; an evaluation's name is `task/metric`.
        settings: what all points share, apart from what is step-bound or merely describes the model.
        points: of all runs, by run and step.
        unsure: runs that do not record their evaluation set, put here because everything else agrees.
        outdated: runs that have the same quantity from a later step, measured in another way.
    """

    kind: Kind
    name: str
    space: str | None
    settings: dict[str, Any]
    points: list[Point]
    unsure: frozenset[int] = frozenset()
    outdated: frozenset[int] = frozenset()

    def of_run(self, run: int) -> list[Point]:
        """The points of one run by step; of two at one step and with the same step-bound settings the later."""
        kept = {(-1 if p.step is None else p.step, _key(p.bound)): p for p in self.points if p.run == run}
        return [kept[key] for key in sorted(kept)]

    def last(self, run: int) -> list[Point]:
        """The points of one run's last step: several only where their step-bound settings differ.

        None where the run has the quantity from a later step in another series: half trained, it is another model.
        """
        points = [] if run in self.outdated else self.of_run(run)
        return [point for point in points if point.step == points[-1].step]


@dataclass(frozen=True)
class _Entry:
    kind: Kind
    name: str
    space: str | None
    point: Point
    defining: dict[str, Any]


def collect(runs: Sequence[ComparedRun]) -> list[Series]:
    """Return every series that the runs' reports make: headline metrics, downstream tasks, costs, then the others."""
    buckets: dict[tuple[str, ...], list[_Entry]] = {}
    for entry in _placed([entry for index, run in enumerate(runs) for entry in _entries(index, run.report)]):
        key = (entry.kind, entry.name, str(entry.space), _key(entry.defining))
        buckets.setdefault(key, []).append(entry)
    identities = [data_identity(run.report) for run in runs]
    found = [series for entries in buckets.values() for series in _by_evaluation_set(entries, identities)]
    _mark_outdated([series for series in found if series.kind == "metric"])
    return sorted(found, key=_place)


def _placed(entries: Sequence[_Entry]) -> list[_Entry]:
    """Put what could not be measured, and knows hardly a setting, where the other runs' numbers stand."""
    numbers: dict[tuple[Any, ...], list[_Entry]] = {}
    for entry in entries:
        if entry.point.value is not None:
            numbers.setdefault((entry.kind, entry.name, entry.space), []).append(entry)
    return [
        entry
        if entry.point.value is not None
        else _beside(entry, numbers.get((entry.kind, entry.name, entry.space), []))
        for entry in entries
    ]


def _beside(entry: _Entry, numbers: Sequence[_Entry]) -> _Entry:
    """An entry without a number with the settings of the numbers that it contradicts nowhere, if there are any."""
    near = [one for one in numbers if entry.defining.items() <= one.defining.items()]
    near = [one for one in near if one.point.step == entry.point.step] or near
    if not near:
        return entry
    keys = [_key(one.defining) for one in near]
    model = near[keys.index(max(keys, key=keys.count))]
    known = {_HASH: model.point.settings[_HASH]} if _HASH in model.point.settings else {}
    point = replace(entry.point, settings={**entry.point.settings, **known}, bound=model.point.bound)
    return replace(entry, point=point, defining=model.defining)


def _mark_outdated(found: Sequence[Series]) -> None:
    last: dict[tuple[int, str, str | None], int] = {}
    for series in found:
        for point in series.points:
            key = (point.run, series.name, series.space)
            last[key] = max(last.get(key, -1), -1 if point.step is None else point.step)
    for series in found:
        newest: dict[int, int] = {}
        for point in series.points:
            newest[point.run] = max(newest.get(point.run, -1), -1 if point.step is None else point.step)
        series.outdated = frozenset(
            run for run, step in newest.items() if 0 <= step < last[run, series.name, series.space]
        )


def data_identity(report: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Return what tells the data of two runs apart, None where that is not recorded."""
    data = report["data"]
    if data is None or data["revision_or_hash"] is None or data["tokenizer_hash"] is None:
        return None
    keys = ("name", "config", "revision_or_hash", "tokenizer_hash", "sequence_length", "packing", "split_seed")
    return tuple(str(data[key]) for key in (*keys, "validation_sequences"))


def differing_settings(settings: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the keys in which settings differ; beside a peer's name its method and seed need not be told."""
    keys = {key for each in settings for key in each}
    differing = {key for key in keys if len({_key({"": each.get(key)}) for each in settings}) > 1}
    return differing - {"other_method", "other_seed"} if "other" in differing else differing


def _entries(index: int, report: Mapping[str, Any]) -> Iterator[_Entry]:
    for metric in report["metrics"]:
        yield _entry(index, "metric", metric["name"], metric["space"], metric, details(metric))
    for found in report["evaluations"]:
        settings = {key: found[key] for key in ("num_fewshot", "limit", "task_version")}
        name = f"{one_line(found['task'])}/{one_line(found['metric'])}"
        yield _entry(index, "evaluation", name, None, found, {**settings, **details(found)})
    run = report["run"]
    state, peak = run["optimizer_state_bytes"], run["peak_memory_bytes"]
    costs = {
        **{key: run["model"][key] for key in ("parameters", "parameters_trained")},
        "optimizer_state_bytes": state["predicted"] if state["measured"] is None else state["measured"],
        "peak_memory_bytes": peak["value"],
        **{key: run[key] for key in ("flops", "wall_time_seconds")},
    }
    for name, value in costs.items():
        if value is not None:
            # how a peak was taken decides what it means
            settings = {"kind": peak["kind"]} if name == "peak_memory_bytes" else {}
            yield _entry(index, "cost", name, None, {"value": value, "stderr": None, "step": None}, settings)


def _entry(
    index: int, kind: Kind, name: str, space: str | None, found: Mapping[str, Any], settings: Mapping[str, Any]
) -> _Entry:
    # the neighbouring checkpoint has another name at every step
    bound_keys = _STEP_BOUND | {"other"} if name.startswith(_CONSECUTIVE) else _STEP_BOUND
    bound = {key: value for key, value in settings.items() if key in bound_keys and value is not None}
    defining = {
        key: value
        for key, value in settings.items()
        if key not in bound_keys | DESCRIPTIVE | {_HASH} and value not in (None, [], {})
    }
    value = _number(found["value"])
    stderr = None if value is None else _number(found["stderr"])
    return _Entry(kind, one_line(name), space, Point(index, found["step"], value, stderr, settings, bound), defining)


def _number(value: float | None) -> float | None:
    """Return a number that can be squared and summed; nothing that is measured comes near 1e150."""
    return None if value is None or abs(value) > 1e150 else float(value)


def _by_evaluation_set(entries: Sequence[_Entry], identities: Sequence[tuple[Any, ...] | None]) -> Iterator[Series]:
    """Split entries that agree in their settings by what they were measured on."""
    first = entries[0]
    hashed: dict[str, list[_Entry]] = {}
    rest: dict[tuple[Any, ...] | None, list[_Entry]] = {}
    for entry in entries:
        known = entry.point.settings.get(_HASH)
        if known is not None:
            hashed.setdefault(str(known), []).append(entry)
        else:
            # tasks name their own data, and weights and costs are measured on none
            on_text = first.kind == "metric" and not first.name.startswith("spectral/")
            rest.setdefault(identities[entry.point.run] if on_text else (), []).append(entry)
    unsure: dict[str, set[int]] = {}
    for identity, unhashed in list(rest.items()):
        same = [
            known
            for known, members in hashed.items()
            if identity and any(identities[member.point.run] == identity for member in members)
        ]
        if len(same) == 1:
            hashed[same[0]] += rest.pop(identity)
            unsure.setdefault(same[0], set()).update(entry.point.run for entry in unhashed)
    for known, members in hashed.items():
        settings = {**first.defining, _HASH: known}
        yield _series(members, settings, frozenset(unsure.get(known, ())))
    for identity, members in rest.items():
        settings = dict(first.defining)
        if len(rest) + len(hashed) > 1:
            settings["evaluated_on"] = "not recorded" if identity is None else _shown(identity)
        yield _series(members, settings, _several(members) if identity is None else frozenset())


def _several(members: Sequence[_Entry]) -> frozenset[int]:
    runs = frozenset(member.point.run for member in members)
    return runs if len(runs) > 1 else frozenset()


def _shown(identity: Iterable[Any]) -> str:
    name, config, revision, tokenizer, *_ = map(str, identity)
    return f"{name} {config} {revision[:12]}, tokenizer {tokenizer[:12]}"


def _series(members: Sequence[_Entry], settings: dict[str, Any], unsure: frozenset[int]) -> Series:
    first = members[0]
    return Series(first.kind, first.name, first.space, settings, [member.point for member in members], unsure)


def _key(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


_HEADLINE = {metric.name: place for place, metric in enumerate(HEADLINE_METRICS)}
_SPACES = {None: 0, "dense": 1, "linearised": 2, "native": 3}


def _place(series: Series) -> tuple[Any, ...]:
    """Where a series stands: H1 to H16 with the scalars beside them, tasks, costs, other metrics by name."""
    if series.kind == "evaluation":
        at: tuple[float, str] = (100, series.name)
    elif series.kind == "cost":
        at = (101 + list(COSTS).index(series.name) / 10, "")
    else:
        place = _HEADLINE.get(series.name, math.inf)
        at = (place, "" if place < math.inf else series.name)
    return (*at, _SPACES[series.space], describe(series.settings))
