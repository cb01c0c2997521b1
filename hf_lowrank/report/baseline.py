"""A run beside its baseline: what a report keeps of the other run's report, and their numbers side by side."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_lowrank.report.comparability import Number, latest, numbers
from hf_lowrank.report.io import validate_report
from hf_lowrank.report.model import Baseline, Report, Run
from hf_lowrank.report.significance import Delta, Sample, difference
from hf_lowrank.report.tables import evaluation_rows, headline_rows
from hf_lowrank.report.values import format_value

__all__ = ["Pair", "baseline_of", "beside_baseline"]


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


def beside_baseline(report: Report) -> list[Pair]:
    """Return the headline metrics and downstream results that run and baseline have measured in the same way."""
    if report.baseline is None:
        return []
    there = {number.column: number for number in latest(numbers(report.baseline))}
    shown = [(row.metric.id, row.metric.label, row.metric.name, row.number) for row in headline_rows(report)]
    for number in latest(numbers(report)):
        if number.kind == "evaluation":
            task, _, metric = number.name.rpartition("/")
            shown.append((None, task, metric, number))
    pairs = []
    for identifier, label, name, number in shown:
        base = there.get(number.column)
        if base and number.comparable and number.value is not None and base.value is not None:
            delta = difference(Sample.of(number), Sample.of(base))
            pairs.append(Pair(identifier, label, name, number, base, delta))
    return pairs
