"""What readers of a comparison must know: in what runs differ, and which metrics were measured in different ways.

What makes runs and numbers comparable is decided by `hf_lowrank.report.comparability`; here it is put into words.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pandas as pd

from hf_lowrank.compare.matched import Taken
from hf_lowrank.report.catalogue import headline_metric
from hf_lowrank.report.comparability import PEER, REMARKS, Difference, Level, Number
from hf_lowrank.report.values import UNKNOWN, describe

__all__ = ["Notice", "by_kind", "folded", "metric_notices", "place_notices", "run_notices"]

_MOST_LABELS = 8  # of runs in one part of a notice

# (value, the labels of the runs that have it)
Parts = tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Notice:
    """Something that readers of a comparison must know.

    Attributes:
        level: `conflict` if numbers side by side would mislead, else `note`.
        title: what it is about.
        text: what follows from it.
        parts: (value, the labels of the runs that have it), the most common first.
        metrics: the metrics that it is about, if it is about metrics.
    """

    level: Level
    title: str
    text: str
    parts: Parts = ()
    metrics: tuple[str, ...] = ()

    @property
    def shown(self) -> list[tuple[str, str]]:
        """The parts, each with its labels as text; long lists are cut."""
        shown = []
        for value, labels in self.parts:
            more = len(labels) - _MOST_LABELS
            shown.append((value, ", ".join(labels[:_MOST_LABELS]) + (f" and {more} more" if more > 0 else "")))
        return shown

    @property
    def values(self) -> str:
        """The parts on one line, as plain text."""
        return "; ".join(f"{value} ({labels})" for value, labels in self.shown)

    @property
    def details(self) -> str:
        """All but the title on one line, as plain text."""
        return ". ".join(part for part in (self.text, self.values) if part)

    @property
    def line(self) -> str:
        """The notice on one line, as plain text."""
        return ": ".join(part for part in (self.title, self.text, self.values) if part)


def by_kind(notices: Sequence[Notice]) -> list[tuple[str, list[Notice]]]:
    """Return notices on metrics that say the same together, each kind with one line for all of them."""
    kinds: dict[tuple[Any, ...], list[Notice]] = {}
    for place, notice in enumerate(notices):
        # what is not the same may be another thing at every metric: steps, matrices, settings
        kind = notice.text.partition(" same ")[0] if notice.metrics else place
        kinds.setdefault((notice.level, kind), []).append(notice)
    return [(_folded(members), members) for members in kinds.values()]


def folded(notices: Sequence[Notice]) -> list[str]:
    """Return a line for each kind of notice; one on metrics names the first of them and how many they are."""
    return [line for line, _ in by_kind(notices)]


def _folded(members: Sequence[Notice]) -> str:
    first = members[0]
    names = list(dict.fromkeys(name for notice in members for name in notice.metrics))
    if len(names) < 2:
        return first.line
    texts = ", ".join(dict.fromkeys(notice.text for notice in members))
    return f"{_title(names[0])} and {len(names) - 1} more metric{'s' if len(names) > 2 else ''}: {texts}"


def run_notices(differing: Sequence[Difference], labels: Sequence[str]) -> list[Notice]:
    """Return a notice for each fact in which the runs differ."""
    return [Notice(each.level, each.fact.title, each.fact.why, _parts(each.words, labels)) for each in differing]


def _parts(values: Sequence[str], labels: Sequence[str]) -> Parts:
    of_value: dict[str, list[str]] = {}
    for value, label in zip(values, labels, strict=True):
        of_value.setdefault(value, []).append(label)
    ordered = sorted(of_value.items(), key=lambda part: -len(part[1]))
    return tuple((value, tuple(members)) for value, members in ordered)


def metric_notices(points: pd.DataFrame, labels: Sequence[str], one_place: bool = False) -> list[Notice]:
    """Return notices on metrics that were measured in different ways, at different steps or on unknown texts.

    Metrics with the same problem share a notice.

    Args:
        points: all numbers of a comparison (`hf_lowrank.compare.frame.collect`).
        labels: the runs' names.
        one_place: whether the runs are taken at one place, which need not be the same step.
    """
    metrics: dict[tuple[Any, ...], list[str]] = {}

    def say(level: Level, metric: str, text: str, parts: Parts) -> None:
        metrics.setdefault((level, text, parts), []).append(metric)

    shown = points[(points["column"] >= 0) & points["value"].notna() & (points["kind"] != "cost")]
    for (kind, metric), of_metric in shown.groupby(["kind", "metric"], sort=False):
        level: Level = "conflict" if kind == "evaluation" or headline_metric(metric) else "note"
        numbers = list(zip(of_metric["run"], of_metric["number"], strict=True))
        for _, of_series in of_metric.groupby("series"):
            last = of_series.drop_duplicates("run", keep="last")
            for text, parts in _within(last["number"].tolist(), [labels[run] for run in last["run"]], one_place):
                say(level, metric, text, parts)
        unknown = dict.fromkeys(labels[run] for run, number in numbers if not number.comparable)
        if unknown:
            alone = of_metric["run"].nunique() == 1
            text = "what it was measured on is not recorded, so it is comparable with no other run's"
            say("note" if alone else level, metric, text, ((UNKNOWN, tuple(unknown)),))
        ways = _ways([(run, number) for run, number in numbers if number.comparable], labels)
        if ways:
            say(level, metric, "measured in different ways, so in columns of their own", ways)
    return [
        Notice(level, _titles(names), text, parts, tuple(names)) for (level, text, parts), names in metrics.items()
    ]


def _title(name: str) -> str:
    metric = headline_metric(name)
    return name if metric is None else metric.label


def _titles(names: Sequence[str]) -> str:
    shown = [_title(name) for name in dict.fromkeys(names)]
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 5 else ", ".join(["", *shown[4:]]))


def place_notices(taken: Sequence[tuple[str, Taken]], words: str) -> list[Notice]:
    """Return notices on where runs, each with its label, are taken, and on what that means for their numbers."""
    text = "a run that is taken before its end has not finished its schedule"
    if any(place.loss is not None for _, place in taken):
        text = (
            "between two checkpoints every number is interpolated linearly in the loss, and so is its error; how far "
            f"the error of the loss moves the place is not part of it; {text}"
        )
    notices = [
        Notice("note", f"Taken at {words}", text, _parts([t.text for _, t in taken], [label for label, _ in taken]))
    ]
    others: dict[tuple[str, ...], list[str]] = {}
    for label, place in taken:
        others.setdefault(place.other, []).append(label)
    for names, labels in others.items():
        if names:
            why = "refers to another checkpoint on either side, so nothing is interpolated"
            notices.append(Notice("note", _titles(names), why, ((", ".join(names), tuple(labels)),)))
    between = tuple(label for label, place in taken if place.exact is None)
    if between:
        why = "curves along directions, paths and depth are those of the nearer checkpoint"
        nearer = [f"step {place.nearer:,}" for _, place in taken if place.exact is None]
        notices.append(Notice("note", "Curves", why, _parts(nearer, between)))
    return notices


def _ways(measured: Sequence[tuple[int, Number]], labels: Sequence[str]) -> Parts:
    """Return each way of measuring a metric with its runs, if two runs have no way in common."""
    settings: list[dict[str, Any]] = []
    for _, number in measured:
        # the other end of a barrier differs from run to run, and so does the name of its step
        between = PEER in number.settings
        defining = {key: value for key, value in number.settings.items() if key != PEER}
        settings.append({**defining, **({} if between else number.reference), "weights": number.space})
    ways: dict[str, set[int]] = {}
    for (run, _), way in zip(measured, settings, strict=True):
        differing = {key: value for key, value in way.items() if any(other.get(key) != value for other in settings)}
        ways.setdefault(describe({"weights": way["weights"], **differing}), set()).add(run)
    ways_of = {run: {way for way, runs in ways.items() if run in runs} for run, _ in measured}
    if all(ways_of[a] & ways_of[b] for a, b in combinations(sorted(ways_of), 2)):
        return ()
    return tuple((way, tuple(labels[run] for run in sorted(runs))) for way, runs in ways.items())


def _within(numbers: Sequence[Number], labels: Sequence[str], one_place: bool) -> list[tuple[str, Parts]]:
    """Return in what the numbers of one column differ: their steps, and what describes them."""
    said = []
    steps = _parts(["no step" if n.step is None else f"step {n.step:,}" for n in numbers], labels)
    if len(steps) > 1 and not one_place:
        said.append(("not measured at the same step", steps))
    told: list[tuple[tuple[str, ...], ...]] = []
    for key in sorted({key for number in numbers for key in number.about} - REMARKS):
        values = _parts([describe({key: n.about.get(key)}) or f"{key} {UNKNOWN}" for n in numbers], labels)
        groups = tuple(members for _, members in values)
        # if the measured matrices differ, so does their total
        if len(values) > 1 and not (key == "total" and groups in told):
            said.append((f"not of the same {key}", values))
            told.append(groups)
    return said
