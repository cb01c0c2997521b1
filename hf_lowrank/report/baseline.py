"""A run beside its baseline: what a report keeps of the other run's report, and their numbers side by side."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_lowrank.report.catalogue import headline_metric, headline_metrics
from hf_lowrank.report.comparability import Number, latest, numbers
from hf_lowrank.report.io import validate_report
from hf_lowrank.report.model import EvaluationEntry, Report
from hf_lowrank.report.significance import Delta, Sample, difference
from hf_lowrank.report.tables import format_value

__all__ = ["Pair", "baseline_of", "beside_baseline"]

# measured between a run and another one: they say nothing about the baseline by itself
_BETWEEN_RUNS = ("activation/", "interpolation/cross_")
# what a report keeps of another run as it stands there; the rest of its facts decides nothing
_KEPT = (
    "name", "method", "method_label", "steps", "max_steps", "checkpoint_of", "tokens_seen", "model", "learning_rate",
    "lr_schedule", "optimizer", "batch", "precision", "versions", "hardware",
)  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """One quantity of a run beside its baseline's, both measured in the same way.

    `id` and `label` are for people, `name` is the metric's or the task's, `difference` the run's minus the baseline's.
    """

    id: str | None
    label: str
    name: str
    space: str | None
    settings: Mapping[str, Any]
    value: float
    stderr: float | None
    baseline: float
    baseline_stderr: float | None
    delta: Delta

    @property
    def text(self) -> str:
        return format_value(self.value, self.stderr)

    @property
    def baseline_text(self) -> str:
        return format_value(self.baseline, self.baseline_stderr)

    @property
    def difference(self) -> str:
        return self.delta.size


def baseline_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the report of another run says about `report`'s run as its baseline (report.json's `baseline`).

    That is every fact by which runs are told to be comparable, and the headline numbers of the run by itself.
    """
    read = validate_report(report)
    kept = [number for number in _headline_numbers(read) if not number.name.startswith(_BETWEEN_RUNS)]
    return {
        **{key: getattr(read.run, key) for key in _KEPT},
        "parameters": read.run.model.parameters,
        "optimizer_state_bytes": read.run.optimizer_state_bytes.best,
        "data": read.data,
        "metrics": [number.entry for number in kept if number.kind == "metric"],
        "evaluations": [number.entry for number in kept if number.kind == "evaluation"],
    }


def beside_baseline(report: Report) -> list[Pair]:
    """Return the headline metrics and downstream results that run and baseline have measured in the same way."""
    if report.baseline is None:
        return []
    theirs = {number.column: number for number in latest(numbers(report.baseline)) if number.comparable}
    mine = _headline_numbers(report)
    pairs = [(number, theirs[number.column]) for number in mine if number.column in theirs and number.comparable]
    return [_pair(ours, base) for ours, base in pairs if ours.value is not None and base.value is not None]


def _headline_numbers(report: Report) -> list[Number]:
    """Return what a card shows of a run: headline metrics in the order of their numbers, then downstream tasks."""
    places = {metric.name: place for place, metric in enumerate(headline_metrics())}
    shown = [number for number in latest(numbers(report)) if number.kind == "evaluation" or number.name in places]
    return sorted(shown, key=lambda number: (places.get(number.name, len(places)), str(number.space)))


def _pair(ours: Number, base: Number) -> Pair:
    assert ours.value is not None
    assert base.value is not None
    if isinstance(ours.entry, EvaluationEntry):
        number, label, name = None, ours.entry.task, ours.entry.metric
    else:
        metric = headline_metric(ours.name)
        assert metric is not None
        number, label, name = metric.id, metric.label, metric.name
    return Pair(
        id=number,
        label=label,
        name=name,
        space=ours.space,
        settings={**ours.settings, **ours.reference, **ours.about},
        value=ours.value,
        stderr=ours.stderr,
        baseline=base.value,
        baseline_stderr=base.stderr,
        delta=difference(Sample.of(ours), Sample.of(base)),
    )
