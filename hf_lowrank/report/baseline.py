"""A run beside its baseline: what a report keeps of the other run's report, and their numbers side by side."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hf_lowrank.report.comparability import Number, latest, numbers
from hf_lowrank.report.evidence import Kept
from hf_lowrank.report.io import validate_report
from hf_lowrank.report.model import Baseline, BaselineDifference, Report, Run
from hf_lowrank.report.significance import Delta, Sample, corrected, difference, tested_number
from hf_lowrank.report.tables import evaluation_rows, headline_rows
from hf_lowrank.report.values import format_value

__all__ = ["Pair", "baseline_of", "beside_baseline", "differences_to_baseline"]


@dataclass(frozen=True)
class Pair:
    """A number of a run beside its baseline's, both measured in the same way.

    `id` and `label` are for people, `name` is the metric's or that of a downstream task's metric, `delta` is the run's
    number minus the baseline's.
    """

    id: str | None
    label: str
    name: str
    number: Number
    baseline: Number
    delta: Delta

    @property
    def settings(self) -> dict[str, Any]:
        """How both were measured."""
        return {**self.number.settings, **self.number.reference, **self.number.about}

    @property
    def text(self) -> str:
        return format_value(self.number.value, self.number.stderr)

    @property
    def baseline_text(self) -> str:
        return format_value(self.baseline.value, self.baseline.stderr)


def baseline_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a report keeps of another run's `report` as its baseline (report.json's `baseline`).

    These are the facts that decide whether the two runs are comparable, and the other run's headline numbers.
    """
    other = validate_report(report)
    return {
        **{name: getattr(other.run, name) for name in Baseline.model_fields if name in Run.model_fields},
        "parameters": other.run.model.parameters,
        "optimizer_state_bytes": other.run.optimizer_state_bytes.best,
        "data": other.data,
        "metrics": [row.entry for row in headline_rows(other) if not row.metric.between_runs],
        "evaluations": evaluation_rows(other),
    }


def differences_to_baseline(report: Mapping[str, Any], ours: Kept, theirs: Kept) -> list[dict[str, Any]]:
    """Return what a report keeps of the differences to its baseline (`baseline.differences` of report.json).

    Args:
        report: with its baseline.
        ours, theirs: what the run and its baseline keep of their measurements.
    """
    found = []
    for number, base in _comparable(validate_report(report)):
        delta = difference(Sample.of(number, ours.of(number)), Sample.of(base, theirs.of(base)))
        found.append(
            {
                "name": number.name,
                "space": number.space,
                "settings": dict(number.settings),
                "reference": dict(number.reference),
                "value": number.value,
                "baseline": base.value,
                "difference": delta.value,
                **{key: getattr(delta, key) for key in ("stderr", "dof", "p", "test", "paired", "why")},
            }
        )
    return found


def beside_baseline(report: Report) -> list[Pair]:
    """Return the headline metrics and downstream results that run and baseline have measured in the same way.

    Their p-values are corrected for the number of tests (`significance.corrected`).
    """
    if report.baseline is None:
        return []
    labels = {row.number.column: (row.metric.id, row.metric.label, row.metric.name) for row in headline_rows(report)}
    stored = {_stored_key(each): each for each in report.baseline.differences}
    pairs, tested = [], []
    for number, base in _comparable(report):
        ours, theirs = Sample.of(number), Sample.of(base)
        # numbers that were measured again since then are compared anew
        known = stored.get((number.column[1:], number.value, base.value))
        delta = difference(ours, theirs) if known is None else _delta(known)
        task, _, metric = number.name.rpartition("/")
        pairs.append(Pair(*labels.get(number.column, (None, task, metric)), number, base, delta))
        tested.append(tested_number(number, ours, theirs))
    deltas = corrected([pair.delta for pair in pairs], tested)
    return [replace(pair, delta=delta) for pair, delta in zip(pairs, deltas, strict=True)]


def _stored_key(stored: BaselineDifference) -> tuple[Any, ...]:
    of = Number("metric", stored.name, stored.space, stored.settings, stored.reference, {}, None, stored.value, None)
    return (of.column[1:], stored.value, stored.baseline)


def _delta(stored: BaselineDifference) -> Delta:
    return Delta(
        stored.difference, stored.stderr, stored.p, stored.test, stored.why, dof=stored.dof, paired=stored.paired
    )


def _comparable(report: Report) -> list[tuple[Number, Number]]:
    """Return the numbers of run and baseline that compare: headline metrics, then downstream results."""
    assert report.baseline is not None
    there = {number.column: number for number in latest(numbers(report.baseline))}
    shown = [row.number for row in headline_rows(report)]
    shown += [number for number in latest(numbers(report)) if number.kind == "evaluation"]
    pairs = [(number, there[number.column]) for number in shown if number.comparable and number.column in there]
    return [(number, base) for number, base in pairs if number.value is not None and base.value is not None]
