"""A run beside its baseline: what a report keeps of the other run's report, and what of the two can be compared."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hf_lowrank.report.io import metric_entry
from hf_lowrank.report.model import details
from hf_lowrank.report.tables import (
    HeadlineRow,
    describe,
    evaluation_rows,
    evaluation_settings,
    format_count,
    format_value,
    headline_rows,
)

__all__ = ["Comparison", "baseline_of", "comparisons", "differences"]

# measured between a run and another one: they say nothing about the baseline by itself
_BETWEEN_RUNS = ("activation/", "interpolation/cross_")
_ROWS = "evaluation_hash"
_ITEMS = ("seed", "seeds", "samples", "tasks", "context_length", "add_special_tokens")
# what must agree before losses mean the same, and how it is called
_DATA = {
    "name": "data",
    "config": "data configuration",
    "revision_or_hash": "data revision",
    "tokenizer_hash": "tokenizer",
    "sequence_length": "sequence length",
    "packing": "packing",
}


@dataclass(frozen=True)
class Comparison:
    """One quantity of a run beside its baseline's, both measured in the same way.

    `label` is for people, `name` the metric's or the task's; `difference` is the run's minus the baseline's, its
    standard error as if the two were independent.
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

    @property
    def text(self) -> str:
        return format_value(self.value, self.stderr)

    @property
    def baseline_text(self) -> str:
        return format_value(self.baseline, self.baseline_stderr)

    @property
    def difference(self) -> str:
        errors = [error for error in (self.stderr, self.baseline_stderr) if error is not None]
        text = format_value(self.value - self.baseline, math.hypot(*errors) if errors else None)
        return text if text.startswith(("-", "(-")) else f"+{text}"


def baseline_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the report of another run says about `report`'s run as its baseline (report.json's `baseline`)."""
    run, state = report["run"], report["run"]["optimizer_state_bytes"]
    return {
        "name": run["name"],
        "method": run["method"],
        "method_label": run.get("method_label"),
        "steps": run["steps"],
        "tokens_seen": run["tokens_seen"],
        "parameters": run["model"]["parameters"],
        "optimizer_state_bytes": state["predicted"] if state["measured"] is None else state["measured"],
        "learning_rate": run["learning_rate"],
        "data": report["data"],
        "metrics": [
            metric_entry(row.name, row.value, step=row.step, stderr=row.stderr, settings=row.settings, space=row.space)
            for row in headline_rows(report)
            if not row.name.startswith(_BETWEEN_RUNS)
        ],
        "evaluations": evaluation_rows(report),
    }


def comparisons(report: Mapping[str, Any]) -> list[Comparison]:
    """Return the headline metrics and downstream results that run and baseline have under the same settings."""
    baseline = report.get("baseline")
    if baseline is None:
        return []
    theirs = {_setting(entry["name"], entry["space"], details(entry)): entry for entry in baseline["metrics"]}
    found = []
    for row in headline_rows(report):
        other = theirs.get(_setting(row.name, row.space, row.settings))
        if other is not None and row.value is not None and other["value"] is not None and _same_rows(row, other):
            pair = (row.value, row.stderr, other["value"], other["stderr"])
            found.append(Comparison(row.id, row.label, row.name, row.space, row.settings, *pair))
    evaluated = {_evaluation_setting(entry): entry for entry in baseline["evaluations"]}
    for entry in evaluation_rows(report):
        other = evaluated.get(_evaluation_setting(entry))
        if entry["value"] is not None and other is not None and other["value"] is not None:
            pair = (entry["value"], entry["stderr"], other["value"], other["stderr"])
            settings = {"num_fewshot": entry["num_fewshot"], "limit": entry["limit"], **evaluation_settings(entry)}
            found.append(Comparison(None, entry["task"], entry["metric"], None, settings, *pair))
    return found


def differences(report: Mapping[str, Any]) -> list[str]:
    """Return in what run and baseline differ beyond the method, so that their numbers are not of the same thing."""
    baseline = report.get("baseline")
    return [] if baseline is None else list(_differences(report, baseline))


def _differences(report: Mapping[str, Any], baseline: Mapping[str, Any]) -> Iterator[str]:
    run, mine, theirs = report["run"], report["data"], baseline["data"]
    if mine is None or theirs is None:
        yield f"data (not recorded for {'this run' if mine is None else 'the baseline'})"
    else:
        for key, label in _DATA.items():
            if mine[key] != theirs[key]:
                yield f"{label} ({mine[key]} here, {theirs[key]} there)"
    for key, label in (("tokens_seen", "tokens seen"), ("steps", "optimizer steps")):
        if run[key] != baseline[key]:
            here, there = (format_count(count) or "not recorded" for count in (run[key], baseline[key]))
            yield f"{label} ({here} here, {there} there)"


def _setting(name: str, space: str | None, settings: Mapping[str, Any]) -> tuple[str, str | None, str]:
    return name, space, describe({key: value for key, value in settings.items() if key != _ROWS})


def _same_rows(row: HeadlineRow, other: Mapping[str, Any]) -> bool:
    """Whether two numbers are of the same rows, as far as it is recorded: in training their count alone is noted."""
    hashes = row.settings.get(_ROWS), other["settings"].get(_ROWS)
    return None in hashes or hashes[0] == hashes[1]


def _evaluation_setting(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two results share that are of the same items and examples, whatever form the weights had."""
    keys = ("task", "metric", "num_fewshot", "limit", "task_version")
    settings = details(entry)
    return *(entry[key] for key in keys), describe({key: settings.get(key) for key in _ITEMS})
