"""The tables of a report as plain data: headline metrics, downstream results and the facts of the run.

Texts are plain, without Markdown or HTML, and may hold whatever the report holds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_lowrank.report.catalogue import HeadlineMetric, headline_metrics
from hf_lowrank.report.comparability import Number, latest, numbers
from hf_lowrank.report.model import Batch, Data, EvaluationEntry, MetricEntry, Report, Run, Speed, details
from hf_lowrank.report.values import UNKNOWN, describe, format_bytes, format_count, format_duration, format_value

__all__ = ["Fact", "HeadlineRow", "evaluation_rows", "fact_rows", "headline_rows", "measured_with"]


@dataclass(frozen=True)
class HeadlineRow:
    """A line of the headline table: a metric with one setting in one space, at its last measured step."""

    metric: HeadlineMetric
    number: Number
    entry: MetricEntry

    @property
    def text(self) -> str:
        """Value and standard error to sensible digits."""
        return format_value(self.entry.value, self.entry.stderr)


@dataclass(frozen=True)
class Fact:
    """A line of the facts table: `key` is the same in all versions, `text` is `UNKNOWN` if nothing is recorded."""

    key: str
    label: str
    text: str


def headline_rows(report: Report) -> list[HeadlineRow]:
    """Return the latest headline metrics of a report: loss and perplexity, H1 to H16, then the others."""
    metrics = {metric.name: metric for metric in headline_metrics()}
    rows = []
    for number in latest(numbers(report)):
        if number.name in metrics and isinstance(number.entry, MetricEntry):
            rows.append(HeadlineRow(metrics[number.name], number, number.entry))
    places = list(metrics)
    return sorted(rows, key=lambda row: (places.index(row.metric.name), str(row.entry.space)))


def evaluation_rows(report: Report) -> list[EvaluationEntry]:
    """Return the latest downstream results of a report, in the order in which the tasks were first evaluated."""
    return [number.entry for number in latest(numbers(report)) if isinstance(number.entry, EvaluationEntry)]


def measured_with(entry: MetricEntry | EvaluationEntry) -> str:
    """Return on one line how a number was measured, without what the metric's name already says."""
    return describe({key: value for key, value in details(entry).items() if key not in ("filter", "higher_is_better")})


def fact_rows(report: Report) -> list[Fact]:
    """Return the facts of a run; a fact that the report does not hold reads `UNKNOWN`."""
    facts = [*_model_facts(report.run), *_data_facts(report.data), *_cost_facts(report.run)]
    return [Fact(key, label, text or UNKNOWN) for key, label, text in facts]


def _joined(*texts: str | None) -> str | None:
    return ", ".join(text for text in texts if text) or None


def _named(settings: Mapping[str, Any], name: str) -> str | None:
    """Describe settings: first the value of `name`, then the others as `key=value`."""
    return _joined(settings[name], describe({key: value for key, value in settings.items() if key != name}))


def _counted(count: int | None, unit: str = "") -> str | None:
    return None if count is None else f"{count:,}{unit}"


def _model_facts(run: Run) -> list[tuple[str, str, str | None]]:
    model, state = run.model, run.optimizer_state_bytes
    sizes = {"measured": state.measured, "predicted": state.predicted, "for AdamW": state.adamw}
    states = _joined(*(f"{format_bytes(size)} {label}" for label, size in sizes.items() if size is not None))
    settings = {key: value for key, value in run.method_config.items() if key != "method"}
    shares = {} if run.coverage is None else run.coverage.not_covered
    full_rank = _joined(*(f"{name} {100 * share:.2g} % of the parameters" for name, share in shares.items()))
    return [
        ("method", "Method", run.method),
        ("method_config", "Method's settings", describe(settings)),
        ("model", "Model", _joined(model.architecture, model.size)),
        ("parameters", "Parameters", format_count(model.parameters)),
        ("parameters_trained", "Parameters trained", format_count(model.parameters_trained)),
        *([("not_covered", "Full-rank in the blocks", full_rank)] if full_rank else []),
        ("optimizer_state", "Optimizer state", states),
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
    chosen = []
    if (best := run.best_of) is not None:
        value = "" if best.value is None else f" ({best.value:.4g})"
        text = f"step {run.steps:,}, the best of {best.steps:,} steps by {best.metric}{value}"
        chosen.append(("best_of", "Published step", text))
    if (start := run.init_from) is not None:
        seen = "" if start.step is None else f" after {start.step:,} steps"
        form = "dense weights" if start.form == "dense" else "weights"
        chosen.append(("init_from", "Started from", f"the {form} of {start.source} ({start.method}{seen})"))
    peak, kind = format_bytes(run.peak_memory_bytes.value), run.peak_memory_bytes.kind
    return [
        ("steps", "Optimizer steps", f"{run.steps:,}{planned}"),
        *chosen,
        ("tokens_seen", "Tokens seen", format_count(run.tokens_seen)),
        ("batch", "Batch", _batch(run.batch)),
        ("learning_rate", "Peak learning rate", _rate(run)),
        ("lr_schedule", "Learning-rate schedule", _named(run.lr_schedule, "type")),
        ("optimizer", "Optimizer", _named(run.optimizer, "name")),
        ("precision", "Precision", run.precision),
        ("world_size", "Processes", _counted(run.world_size)),
        ("seeds", "Seeds", describe(run.seeds)),
        ("flops", "Floating-point operations", None if run.flops is None else f"{run.flops:.3g}"),
        ("peak_memory", "Peak memory", f"{peak} ({kind})" if peak and kind else peak),
        ("wall_time", "Wall time", format_duration(run.wall_time_seconds)),
        *_speed_facts(run.speed),
        ("hardware", "Hardware", describe(run.hardware)),
        ("versions", "Versions", describe(run.versions)),
        ("git_commit", "Git commit", run.git_commit),
        ("date", "Date", run.date),
        ("license", "Licence", run.license),
    ]


def _speed_facts(speed: Speed | None) -> list[tuple[str, str, str | None]]:
    """What is known of a run's speed; reports of older versions hold nothing of it."""
    if speed is None:
        return []
    tokens = speed.tokens_per_second
    times = {
        ("optimizer_time", "Optimizer, a step"): speed.optimizer_seconds_per_step,
        ("refresh_time", "Refreshes, a step on average"): speed.refresh_seconds_per_step,
    }
    facts: list[tuple[str, str, str | None]] = []
    facts += [] if tokens is None else [("tokens_per_second", "Tokens a second, in training", f"{tokens:,.0f}")]
    return facts + [(*names, format_duration(value)) for names, value in times.items() if value is not None]


def _rate(run: Run) -> str | None:
    rate, scale = run.learning_rate, run.optimizer.other_lr_scale
    if rate is None:
        return None
    return f"{rate:g}" if scale in (None, 1) else f"{rate:g}, other parameters {rate * scale:g}"


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
