"""A report's two tables as plain data: the headline metrics and the facts of the run.

Nothing here knows about Markdown or HTML: texts are plain and may hold whatever a report holds.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, TypeVar

from hf_lowrank.report.catalogue import HeadlineMetric, headline_metrics
from hf_lowrank.report.model import Batch, Data, EvaluationEntry, MetricEntry, Report, Run, details

__all__ = [
    "UNKNOWN",
    "Fact",
    "HeadlineRow",
    "describe",
    "evaluation_rows",
    "fact_rows",
    "format_bytes",
    "format_count",
    "format_duration",
    "format_value",
    "headline_rows",
    "measured_with",
]

UNKNOWN = "not recorded"

_Entry = TypeVar("_Entry", MetricEntry, EvaluationEntry)


@dataclass(frozen=True)
class HeadlineRow:
    """One line of the headline table: a metric under one setting in one space, at the last step it was measured."""

    metric: HeadlineMetric
    entry: MetricEntry

    @property
    def text(self) -> str:
        """Value and standard error to sensible digits."""
        return format_value(self.entry.value, self.entry.stderr)


@dataclass(frozen=True)
class Fact:
    """One line of the facts table; `key` stays the same over versions, `text` is `UNKNOWN` where nothing is known."""

    key: str
    label: str
    text: str


def headline_rows(report: Report) -> list[HeadlineRow]:
    """Return the headline metrics that `report` has, H1 to H16 in order, loss and perplexity before, curvature after.

    Of each metric and space the entries of the last measured step are taken, one row a setting; where one setting was
    measured twice at that step, the later entry counts.
    """
    rows = []
    for metric in headline_metrics():
        entries = [entry for entry in report.metrics if entry.name == metric.name]
        for space in sorted({entry.space for entry in entries}, key=str):
            latest = _latest([entry for entry in entries if entry.space == space])
            rows += [HeadlineRow(metric, entry) for entry in latest]
    return rows


def evaluation_rows(report: Report) -> list[EvaluationEntry]:
    """Return the downstream results of `report`, each task, metric and setting at its last evaluated step.

    They stand in the order in which they were first evaluated; where one was evaluated twice at a step, the later
    result counts.
    """
    by_setting: dict[tuple[Any, ...], list[EvaluationEntry]] = {}
    for entry in report.evaluations:
        fields = (entry.task, entry.metric, entry.num_fewshot, entry.limit, entry.task_version)
        by_setting.setdefault((*fields, describe(entry.settings)), []).append(entry)
    return [entry for entries in by_setting.values() for entry in _latest(entries)]


def measured_with(entry: MetricEntry | EvaluationEntry) -> str:
    """Return on one line how a number was measured, without what its metric's name says already."""
    return describe({key: value for key, value in details(entry).items() if key not in ("filter", "higher_is_better")})


def fact_rows(report: Report) -> list[Fact]:
    """Return what the run was, line by line; quantities that the report does not know read `UNKNOWN`."""
    facts = [*_model_facts(report.run), *_data_facts(report.data), *_cost_facts(report.run)]
    return [Fact(key, label, text or UNKNOWN) for key, label, text in facts]


def format_value(value: float | None, stderr: float | None = None) -> str:
    """Return `3.612 ± 0.021`: the error to two significant digits, the value to the same decimal place.

    Without an error the value has four significant digits. Below 1e-3 and from 1e6 on, value and error share an
    exponent: `(1.234 ± 0.056)e-07`. What is not finite or not there reads `n/a`.
    """
    if value is None or not math.isfinite(value):
        return "n/a"
    if stderr is None or not math.isfinite(stderr):
        return _plain(value)
    if stderr == 0:
        return f"{_plain(value)} ± 0"
    error = Decimal(f"{stderr:.1e}")
    size = max(abs(Decimal(value)), error)
    exponent = 0 if Decimal("1e-3") <= size < Decimal("1e6") else size.adjusted()
    scaled, error = Decimal(value).scaleb(-exponent), error.scaleb(-exponent)
    decimals = max(1 - error.adjusted(), 0)
    if scaled and scaled.adjusted() + decimals >= 8:  # an error far below the value would print a row of noise digits
        return f"{value:.6g} ± {stderr:.1e}"
    text = f"{scaled:z.{decimals}f} ± {error:.{decimals}f}"
    return f"({text})e{exponent:+03d}" if exponent else text


def format_count(count: float | None) -> str | None:
    """Return `2,066,816 (2.07 M)`, or None for None; small counts stand alone."""
    if count is None:
        return None
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if count >= limit:
            return f"{count:,.0f} ({count / limit:.3g} {unit})"
    return f"{count:,.0f}"


def format_bytes(size: float | None) -> str | None:
    """Return a size in binary units, `12.3 MiB`, or None for None."""
    if size is None:
        return None
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def format_duration(seconds: float | None) -> str | None:
    """Return a time span, `2 h 5 min`, `2 min 11 s` or `1.3 s`, or None for None."""
    if seconds is None:
        return None
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def describe(settings: Mapping[str, Any] | str | None) -> str:
    """Return settings as one line, `key=value, key=value` in the order of the keys.

    Equal settings give equal text; keys that hold nothing (null, an empty list or object) are left out.
    """
    if settings is None or isinstance(settings, str):
        return settings or ""
    return ", ".join(
        f"{key}={_short(value)}" for key, value in sorted(settings.items()) if value not in (None, [], {})
    )


def _plain(value: float) -> str:
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        return f"{value:.{max(3 - Decimal(value).adjusted(), 0)}f}"
    return f"{value:.3e}"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        return value
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _joined(*texts: str | None) -> str | None:
    return ", ".join(text for text in texts if text) or None


def _latest(entries: Sequence[_Entry]) -> list[_Entry]:
    """Return the entries of the last step; where two have the same settings, the later one."""
    last = max(-1 if entry.step is None else entry.step for entry in entries)
    at_last = [entry for entry in entries if entry.step == last or last == -1]
    return list({describe({**entry.settings, **entry.get("reference", {})}): entry for entry in at_last}.values())


def _named(settings: Mapping[str, Any], name: str) -> str | None:
    """Describe settings with the one that names them first and bare."""
    return _joined(settings[name], describe({key: value for key, value in settings.items() if key != name}))


def _counted(count: int | None, unit: str = "") -> str | None:
    return None if count is None else f"{count:,}{unit}"


def _model_facts(run: Run) -> list[tuple[str, str, str | None]]:
    model, state = run.model, run.optimizer_state_bytes
    sizes = {"measured": state.measured, "predicted": state.predicted, "for AdamW": state.adamw}
    settings = {key: value for key, value in run.method_config.items() if key != "method"}
    return [
        ("method", "Method", run.method),
        ("method_config", "Method's settings", describe(settings)),
        ("model", "Model", _joined(model.architecture, model.size)),
        ("parameters", "Parameters", format_count(model.parameters)),
        ("parameters_trained", "Parameters trained", format_count(model.parameters_trained)),
        (
            "optimizer_state",
            "Optimizer state",
            _joined(*(f"{format_bytes(size)} {label}" for label, size in sizes.items() if size is not None)),
        ),
    ]


def _data_facts(data: Data | None) -> list[tuple[str, str, str | None]]:
    if data is None:
        return [("data", "Data", None)]
    packing = data.packing
    if isinstance(packing, bool):
        packing = "packed" if packing else "one document a sequence"
    validation = _joined(
        _counted(data.validation_sequences, " sequences"),
        _counted(data.validation_tokens, " tokens"),
        None if data.split_seed is None else f"split seed {data.split_seed}",
    )
    return [
        ("data", "Data", _joined(data.name, data.config)),
        ("data_revision", "Data revision or content hash", data.revision_or_hash),
        ("train_sequences", "Training sequences", _counted(data.train_sequences)),
        ("sequence_length", "Sequence", _joined(_counted(data.sequence_length, " tokens"), packing)),
        ("validation", "Validation data", validation),
        ("tokenizer", "Tokenizer", data.tokenizer_name),
        ("tokenizer_hash", "Tokenizer hash", data.tokenizer_hash),
    ]


def _cost_facts(run: Run) -> list[tuple[str, str, str | None]]:
    planned = "" if run.max_steps is None else f" of {run.max_steps:,}"
    peak, kind = format_bytes(run.peak_memory_bytes.value), run.peak_memory_bytes.kind
    return [
        ("steps", "Optimizer steps", f"{run.steps:,}{planned}"),
        ("tokens_seen", "Tokens seen", format_count(run.tokens_seen)),
        ("batch", "Batch", _batch(run.batch)),
        ("learning_rate", "Peak learning rate", None if run.learning_rate is None else f"{run.learning_rate:g}"),
        ("lr_schedule", "Learning-rate schedule", _named(run.lr_schedule, "type")),
        ("optimizer", "Optimizer", _named(run.optimizer, "name")),
        ("precision", "Precision", run.precision),
        ("world_size", "Processes", _counted(run.world_size)),
        ("seeds", "Seeds", describe(run.seeds)),
        ("flops", "Floating-point operations", None if run.flops is None else f"{run.flops:.3g}"),
        ("peak_memory", "Peak memory", f"{peak} ({kind})" if peak and kind else peak),
        ("wall_time", "Wall time", format_duration(run.wall_time_seconds)),
        ("hardware", "Hardware", describe(run.hardware)),
        ("versions", "Versions", describe(run.versions)),
        ("git_commit", "Git commit", run.git_commit),
        ("date", "Date", run.date),
        ("license", "Licence", run.license),
    ]


def _batch(batch: Batch) -> str | None:
    factors = {
        "per device": batch.per_device,
        "accumulation": batch.gradient_accumulation,
        "processes": batch.world_size,
    }
    product = " × ".join(f"{label} {factor}" for label, factor in factors.items() if factor is not None)
    if batch.global_sequences is None:
        return product
    return f"{batch.global_sequences:,} sequences a step" + (f" ({product})" if product else "")
