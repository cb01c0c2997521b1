"""A report's two tables as plain data: the headline metrics and the facts of the run.

Nothing here knows about Markdown or HTML: texts are plain and may hold whatever a report holds.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from hf_lowrank.report.catalogue import headline_metrics
from hf_lowrank.report.model import details

__all__ = [
    "UNKNOWN",
    "Fact",
    "HeadlineRow",
    "describe",
    "evaluation_rows",
    "evaluation_settings",
    "fact_rows",
    "format_bytes",
    "format_count",
    "format_duration",
    "format_value",
    "headline_rows",
]

UNKNOWN = "not recorded"


@dataclass(frozen=True)
class HeadlineRow:
    """One line of the headline table: a metric under one setting in one space, at the last step it was measured.

    `id` is H1 to H16, or None for a scalar beside the sixteen; `text` is value and standard error to sensible digits.
    """

    id: str | None
    name: str
    label: str
    value: float | None
    stderr: float | None
    text: str
    step: int | None
    space: str | None
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Fact:
    """One line of the facts table; `key` stays the same over versions, `text` is `UNKNOWN` where nothing is known."""

    key: str
    label: str
    text: str


def headline_rows(report: Mapping[str, Any]) -> list[HeadlineRow]:
    """Return the headline metrics that `report` has, H1 to H16 in order, loss and perplexity before, curvature after.

    Of each metric and space the entries of the last measured step are taken, one row a setting; where one setting was
    measured twice at that step, the later entry counts.
    """
    rows = []
    for metric in headline_metrics():
        entries = [entry for entry in report["metrics"] if entry["name"] == metric.name]
        for space in sorted({entry["space"] for entry in entries}, key=str):
            in_space = [entry for entry in entries if entry["space"] == space]
            last = max(_step(entry) for entry in in_space)
            by_setting = {describe(details(entry)): entry for entry in in_space if _step(entry) == last}
            for entry in by_setting.values():
                rows.append(
                    HeadlineRow(
                        id=metric.id,
                        name=metric.name,
                        label=metric.label,
                        value=entry["value"],
                        stderr=entry["stderr"],
                        text=format_value(entry["value"], entry["stderr"]),
                        step=entry["step"],
                        space=space,
                        settings=details(entry),
                    )
                )
    return rows


def evaluation_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the downstream results of `report`, each task, metric and setting at its last evaluated step.

    They stand in the order in which they were first evaluated; where one was evaluated twice at a step, the later
    result counts.
    """
    last: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for entry in report["evaluations"]:
        keys = ("task", "metric", "num_fewshot", "limit", "task_version")
        # what is counted, unlike what is set, may change from step to step
        settings = {k: v for k, v in details(entry).items() if k not in ("truncated_requests", "note")}
        setting = (*(entry[key] for key in keys), describe(settings))
        if setting not in last or _step(entry) >= _step(last[setting]):
            last[setting] = entry
    return [{**entry, "settings": details(entry), "about": {}} for entry in last.values()]


def evaluation_settings(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a downstream result depends on, without what its metric's name says."""
    told = ("filter", "higher_is_better")
    return {key: value for key, value in entry.get("settings", {}).items() if key not in told}


def fact_rows(report: Mapping[str, Any]) -> list[Fact]:
    """Return what the run was, line by line; quantities that the report does not know read `UNKNOWN`."""
    return [
        Fact(key, label, UNKNOWN if text is None or text == "" else text)
        for key, label, text in [
            *_model_facts(report["run"]),
            *_data_facts(report["data"]),
            *_cost_facts(report["run"]),
        ]
    ]


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


def _step(entry: Mapping[str, Any]) -> int:
    return -1 if entry["step"] is None else entry["step"]


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


def _named(settings: Mapping[str, Any], name: str) -> str | None:
    """Describe settings with the one that names them first and bare."""
    return _joined(settings[name], describe({key: value for key, value in settings.items() if key != name}))


def _model_facts(run: Mapping[str, Any]) -> list[tuple[str, str, str | None]]:
    model, state = run["model"], run["optimizer_state_bytes"]
    sizes = [
        f"{format_bytes(size)} {label}"
        for size, label in (
            (state["measured"], "measured"),
            (state["predicted"], "predicted"),
            (state["adamw"], "for AdamW"),
        )
        if size is not None
    ]
    return [
        ("method", "Method", run["method"]),
        (
            "method_config",
            "Method's settings",
            describe({k: v for k, v in run["method_config"].items() if k != "method"}),
        ),
        ("model", "Model", _joined(model["architecture"], model["size"])),
        ("parameters", "Parameters", format_count(model["parameters"])),
        ("parameters_trained", "Parameters trained", format_count(model["parameters_trained"])),
        ("optimizer_state", "Optimizer state", _joined(*sizes)),
    ]


def _data_facts(data: Mapping[str, Any] | None) -> list[tuple[str, str, str | None]]:
    if data is None:
        return [("data", "Data", None)]
    length, packing = data["sequence_length"], data["packing"]
    packed = {True: "packed", False: "one document a sequence", None: None}.get(packing, str(packing))
    tokens = data["validation_tokens"]
    validation = _joined(
        None if data["validation_sequences"] is None else f"{data['validation_sequences']:,} sequences",
        None if tokens is None else f"{tokens:,} tokens",
        None if data["split_seed"] is None else f"split seed {data['split_seed']}",
    )
    train = data["train_sequences"]
    return [
        ("data", "Data", _joined(data["name"], data["config"])),
        ("data_revision", "Data revision or content hash", data["revision_or_hash"]),
        ("train_sequences", "Training sequences", None if train is None else f"{train:,}"),
        ("sequence_length", "Sequence", _joined(None if length is None else f"{length:,} tokens", packed)),
        ("validation", "Validation data", validation),
        ("tokenizer", "Tokenizer", data["tokenizer_name"]),
        ("tokenizer_hash", "Tokenizer hash", data["tokenizer_hash"]),
    ]


def _cost_facts(run: Mapping[str, Any]) -> list[tuple[str, str, str | None]]:
    peak, seeds = run["peak_memory_bytes"], run["seeds"]
    rate, flops = run["learning_rate"], run["flops"]
    steps = f"{run['steps']:,}" + (f" of {run['max_steps']:,}" if run["max_steps"] is not None else "")
    peak_text = format_bytes(peak["value"])
    return [
        ("steps", "Optimizer steps", steps),
        ("tokens_seen", "Tokens seen", format_count(run["tokens_seen"])),
        ("batch", "Batch", _batch(run["batch"])),
        ("learning_rate", "Peak learning rate", None if rate is None else f"{rate:g}"),
        ("lr_schedule", "Learning-rate schedule", _named(run["lr_schedule"], "type")),
        ("optimizer", "Optimizer", _named(run["optimizer"], "name")),
        ("precision", "Precision", run["precision"]),
        ("world_size", "Processes", None if run["world_size"] is None else f"{run['world_size']:,}"),
        ("seeds", "Seeds", describe(seeds)),
        ("flops", "Floating-point operations", None if flops is None else f"{flops:.3g}"),
        ("peak_memory", "Peak memory", f"{peak_text} ({peak['kind']})" if peak_text and peak["kind"] else peak_text),
        ("wall_time", "Wall time", format_duration(run["wall_time_seconds"])),
        ("hardware", "Hardware", describe(run["hardware"])),
        ("versions", "Versions", describe(run["versions"])),
        ("git_commit", "Git commit", run["git_commit"]),
        ("date", "Date", run["date"]),
        ("license", "Licence", run["license"]),
    ]


def _batch(batch: Mapping[str, Any]) -> str | None:
    total = batch["global_sequences"]
    factors = [
        f"{label} {batch[key]}"
        for key, label in (
            ("per_device", "per device"),
            ("gradient_accumulation", "accumulation"),
            ("world_size", "processes"),
        )
        if batch[key] is not None
    ]
    if total is None:
        return " × ".join(factors) or None
    return f"{total:,} sequences a step" + (f" ({' × '.join(factors)})" if factors else "")
