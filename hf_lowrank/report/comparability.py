"""What makes runs and numbers comparable: the one place that decides it, for card, table, page and study alike.

This module answers two questions. In which facts do runs differ (`differences`)? A `conflict` means that their numbers
side by side would mislead, a `note` is something that a reader should know. And which numbers are of the same
quantity, measured in the same way (`Number`)? A run is given by its report, or by what another run's report keeps of
it as its baseline.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hf_lowrank.report.markdown import one_line
from hf_lowrank.report.model import Baseline, Data, EvaluationEntry, MetricEntry, Report, Run
from hf_lowrank.report.values import UNKNOWN, describe, format_count

__all__ = [
    "EVALUATION_HASH", "FACTS", "PEER", "REMARKS", "Difference", "Kind", "Level", "Number", "SharedFact",
    "data_identity", "data_order", "differences", "latest", "numbers", "settings_key",
]  # fmt: skip

Level = Literal["conflict", "note"]
Kind = Literal["metric", "evaluation", "cost"]
# a part of a fact -> its value, None if it is not recorded
Parts = Mapping[str, Any]

# the setting that identifies the text on which a number was measured; null if that was not recorded
EVALUATION_HASH = "evaluation_hash"
# the setting that names the run at the other end; every run has another one, as it should
PEER = "other"
# keys of `about` in which two numbers may differ although they were measured alike
REMARKS = frozenset(
    (
        *("note", "error", "explained", "checkpoints", "form", "chance", "higher_is_better", "requests", "filter"),
        *("dof", "corrected", "residual_norm"),
    )
)


# ---- facts that runs must share ----


def _words(parts: Parts) -> str:
    """Join what is recorded; of a long hash the first twelve digits."""
    texts = [one_line(value) for value in parts.values() if value is not None]
    return " ".join(re.sub(r"^((?:\w+:)?[0-9a-f]{12})[0-9a-f]{28,}$", r"\1", text) for text in texts)


def _count(parts: Parts) -> str:
    return " ".join(format_count(value) or "" for value in parts.values())


def _named(parts: Parts) -> str:
    return ", ".join(f"{value} {name}" for name, value in parts.items() if value is not None)


@dataclass(frozen=True)
class SharedFact:
    """Something that runs should share.

    Attributes:
        key, title: its name for programs and for people.
        why: what follows if runs do not share it.
        find: returns its parts for a run and its data.
        level: `conflict` if numbers side by side would mislead.
        show: puts the parts in which runs differ into words.
        of_data: whether it says what losses are measured on.
        of_setting: whether two seeds of one experiment must share it.
    """

    key: str
    title: str
    why: str
    find: Callable[[Run | Baseline, Data | None], Parts]
    level: Level = "conflict"
    show: Callable[[Parts], str] = _words
    of_data: bool = False
    of_setting: bool = True


def _of_data(**fields: str) -> Callable[[Run | Baseline, Data | None], Parts]:
    """Return a function that finds fields of the data, each by its name for people."""

    def find(run: Run | Baseline, data: Data | None) -> Parts:
        return {name: None if data is None else getattr(data, field) for name, field in fields.items()}

    return find


def _tokenizer(run: Run | Baseline, data: Data | None) -> Parts:
    # the name is often a path, so it counts only if there is no hash
    return {"tokenizer": None if data is None else data.tokenizer_hash or data.tokenizer_name}


def _model(run: Run | Baseline, data: Data | None) -> Parts:
    keys = ("architecture", "size", "config_hash")
    return {key: None if run.model is None else getattr(run.model, key) for key in keys}


def _planned_steps(run: Run | Baseline, data: Data | None) -> Parts:
    # a run that stopped early was planned like the others; that it stopped is a fact of its own
    return {"steps": max(run.steps, run.max_steps or 0)}


def _checkpoint(run: Run | Baseline, data: Data | None) -> Parts:
    if run.best_of is not None:
        return {"at": f"best step by {run.best_of.metric}"}
    # checkpoints of two runs at one step compare, whatever the runs did afterwards
    return {"at": "end of the run" if run.checkpoint_of is None else f"checkpoint of step {run.steps:,}"}


def _unfinished(run: Run | Baseline, data: Data | None) -> Parts:
    stopped = run.stopped_early
    return {"end": f"stopped at step {run.steps_done:,} of {run.max_steps:,}" if stopped else "complete"}


def _fields(name: str, *keys: str) -> Callable[[Run | Baseline, Data | None], Parts]:
    """Return a function that describes a part of the run: the given fields, or all."""

    def find(run: Run | Baseline, data: Data | None) -> Parts:
        part = getattr(run, name)
        return {"": describe(part if not keys else {key: part.get(key) for key in keys}) if part else None}

    return find


def _other_rate(run: Run | Baseline, data: Data | None) -> Parts:
    # reports from before the setting existed are of runs at one rate
    recorded = run.optimizer.other_lr_scale if run.optimizer and "other_lr_scale" in run.optimizer else 1.0
    return {"scale": None if recorded is None else f"{recorded:.6g}"}


def _start(run: Run | Baseline) -> str:
    # the same run has many paths, and each seed may start from its own
    start = run.init_from
    if start is None:
        return "initial values"
    return f"{start.form} weights of {start.method}, step {UNKNOWN if start.step is None else start.step}"


# in the order in which a reader would ask for them
FACTS = (
    SharedFact("data", "Training data", "the runs were not trained on the same text",
               _of_data(name="name", config="config", revision="revision_or_hash"), of_data=True),
    SharedFact("tokenizer", "Tokenizer", "losses and perplexities are per token, and tokens are not the same",
               _tokenizer, of_data=True),
    SharedFact("sequence", "Sequence length", "longer context makes tokens easier to predict",
               _of_data(length="sequence_length"), of_data=True),
    SharedFact("packing", "Packing", "documents were cut in another way", _of_data(packing="packing"), of_data=True),
    SharedFact("validation", "Validation data", "losses were not measured on the same text",
               _of_data(**{"split seed": "split_seed", "sequences": "validation_sequences",
                           "tokens": "validation_tokens"}), show=_named, of_data=True),
    SharedFact("tokens", "Tokens seen", "one run was trained longer than another",
               lambda run, data: {"tokens": run.tokens_seen}, show=_count),
    SharedFact("steps", "Optimizer steps", "one run was planned to take more steps than another",
               _planned_steps, show=_count),
    SharedFact("model", "Model", "the runs did not start from the same architecture and size", _model),
    SharedFact("precision", "Precision", "the runs were not computed in the same precision",
               lambda run, data: {"precision": run.precision}),
    SharedFact("checkpoint", "Checkpoint", "a checkpoint from the middle of a run is no run's end", _checkpoint),
    SharedFact("unfinished", "Unfinished", "a run stopped before its schedule ended", _unfinished, of_setting=False),
    SharedFact("init_from", "Started from", "a run that starts from trained weights has seen more than its own tokens",
               lambda run, data: {"source": _start(run)}),
    SharedFact("rate", "Peak learning rate", "",
               lambda run, data: {"rate": None if run.learning_rate is None else f"{run.learning_rate:g}"}, "note"),
    SharedFact("other_rate", "Other parameters' rate over the targets'", "", _other_rate, "note"),
    SharedFact("schedule", "Learning-rate schedule", "", _fields("lr_schedule"), "note"),
    SharedFact("batch", "Sequences a step", "",
               lambda run, data: {"batch": None if run.batch is None else run.batch.global_sequences}, "note"),
    SharedFact("optimizer", "Optimizer settings", "",
               _fields("optimizer", "betas", "weight_decay", "max_grad_norm"), "note"),
    SharedFact("code", "Versions", "", _fields("versions", "hf_lowrank", "torch", "transformers"), "note",
               of_setting=False),
    SharedFact("hardware", "Hardware", "times and memory are not comparable", _fields("hardware"), "note",
               of_setting=False),
)  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """A fact that runs do not share.

    Attributes:
        fact: which one.
        words: its value in every run, `UNKNOWN` if it is not recorded.
        odd: of every run, whether its value differs from the reference run's, or from the most common one.
    """

    fact: SharedFact
    words: tuple[str, ...]
    odd: tuple[bool, ...]

    @property
    def level(self) -> Level:
        return self.fact.level


def _values(source: Report | Baseline) -> list[Parts]:
    run = source.run if isinstance(source, Report) else source
    return [fact.find(run, source.data) for fact in FACTS]


def differences(sources: Sequence[Report | Baseline], reference: int | None = None) -> list[Difference]:
    """Return the facts in which runs differ, conflicts first.

    Args:
        sources: two or more runs, each as its report or as the baseline in another run's report.
        reference: index of the run with which the others are compared. By default they are compared with the most
            common recorded value of each fact; of equally common ones the first counts.
    """
    differing = []
    for fact, values in zip(FACTS, zip(*map(_values, sources), strict=True), strict=True):
        parts = [name for name in values[0] if any(value[name] != values[0][name] for value in values)]
        if not parts:
            continue
        recorded = [value for value in values if any(part is not None for part in value.values())]
        usual = max(recorded, key=recorded.count) if reference is None else values[reference]
        words = [one_line(fact.show({name: value[name] for name in parts})) or UNKNOWN for value in values]
        differing.append(Difference(fact, tuple(words), tuple(value != usual for value in values)))
    return sorted(differing, key=lambda difference: difference.level != "conflict")


def data_identity(report: Report) -> str:
    """Return what losses were measured on, as text: training losses compare only if it is equal."""
    return repr([value for fact, value in zip(FACTS, _values(report), strict=True) if fact.of_data])


def data_order(report: Report) -> str | None:
    """Return as text what runs share if they saw the same data in the same order from the same seed.

    None if that is not known.
    """
    run, data = report.run, report.data
    if run.seeds.seed is None or data is None or data.revision_or_hash is None or run.batch.global_sequences is None:
        return None
    # Trainer orders the data by the seed if there is no seed for the data
    order = run.seeds.seed if run.seeds.data_seed is None else run.seeds.data_seed
    return repr((run.seeds.seed, order, run.batch.global_sequences, data_identity(report)))


def settings_key(report: Report) -> str:
    """Return as text what runs share if they differ only in their seed."""
    run = report.run
    # seeds reach their best at different steps
    chosen = run.best_of is not None
    facts = [fact for fact in FACTS if fact.of_setting and not (chosen and fact.key == "tokens")]
    shared = [fact.find(run, report.data) for fact in facts]
    # the rate of the other parameters is one of the facts, and configs of older reports lack it
    method_config = {key: value for key, value in run.method_config.items() if key != "other_lr_scale"}
    return repr((run.method, describe(method_config), None if chosen else run.steps, shared))


# ---- numbers of the same quantity ----


@dataclass(frozen=True)
class Number:
    """A number of a run and how it was measured.

    Attributes:
        kind, name, space: what it is; the name of a downstream result is `task/metric`.
        settings: what defines it; a null or empty setting counts as not set.
        reference: what it refers to at its own step.
        about: what only describes it.
        step, value, stderr: the number.
        entry: the report's entry from which it comes.
        parts: the numbers between which it is interpolated, each with its weight; none if it was measured.
    """

    kind: Kind
    name: str
    space: str | None
    settings: Mapping[str, Any]
    reference: Mapping[str, Any]
    about: Mapping[str, Any]
    step: int | None
    value: float | None
    stderr: float | None
    entry: MetricEntry | EvaluationEntry | None = None
    parts: "tuple[tuple[Number, float], ...]" = ()

    @property
    def quantity(self) -> tuple[str, ...]:
        """Equal for numbers of the same quantity that were measured in the same way, whatever their step."""
        return (self.kind, self.name, str(self.space), _canonical(self.settings))

    @property
    def column(self) -> tuple[str, ...]:
        """Equal for numbers to compare: the same quantity with the same reference.

        An update since step 100 and one since step 200 are points of one curve, but not numbers to compare.
        """
        return (*self.quantity, _canonical(self.reference))

    @property
    def sampling(self) -> bool:
        """Whether the standard error is that of sampling; a Lanczos residual bounds a numerical error."""
        return not str(self.about.get("stderr", "")).startswith("residual")

    @property
    def dof(self) -> float | None:
        """Degrees of freedom of the standard error, None if they are not known."""
        dof = self.about.get("dof")
        return float(dof) if isinstance(dof, int | float) and 0 < dof < math.inf else None

    @property
    def comparable(self) -> bool:
        """Whether it can be compared with another run's number: not if its text is unknown."""
        return self.settings.get(EVALUATION_HASH, "") is not None


def _canonical(settings: Mapping[str, Any]) -> str:
    return json.dumps({key: value for key, value in settings.items() if value not in (None, [], {})}, sort_keys=True)


def numbers(source: Report | Baseline) -> Iterator[Number]:
    """Yield the metrics and downstream results of a run."""
    entries: list[MetricEntry | EvaluationEntry] = [*source.metrics, *source.evaluations]
    for entry in entries:
        measured: dict[str, Any] = {key: entry.get(key) for key in ("step", "value", "stderr")}
        if isinstance(entry, MetricEntry):
            name, space, settings, reference = one_line(entry.name), entry.space, entry.settings, entry.reference
            yield Number("metric", name, space, settings, reference, entry.about, **measured, entry=entry)
        else:
            name = f"{one_line(entry.task)}/{one_line(entry.metric)}"
            settings = {key: entry[key] for key in ("num_fewshot", "limit", "task_version")} | entry.settings
            yield Number("evaluation", name, None, settings, {}, entry.about, **measured, entry=entry)


def latest(measured: Iterable[Number]) -> list[Number]:
    """Return the numbers that speak for a run: of each quantity those of its last step, in their first order.

    If a metric was measured again later in another way, its earlier numbers are left out: they are of a model that was
    trained less. If a number was measured twice at one step with one reference, the later entry counts.
    """
    columns: dict[tuple[str, ...], dict[int, Number]] = {}
    last: dict[tuple[str, ...], int] = {}
    for number in measured:
        columns.setdefault(number.column, {})[_step(number)] = number
        for scope in (number.quantity, _scope(number)):
            last[scope] = max(last.get(scope, -1), _step(number))
    return [
        number
        for by_step in columns.values()
        for step, number in by_step.items()
        if step == last[number.quantity] and (number.step is None or step == last[_scope(number)])
    ]


def _scope(number: Number) -> tuple[str, ...]:
    """Return what a later measurement replaces, of a metric even if it was measured in another way."""
    return (number.name, str(number.space)) if number.kind == "metric" else number.quantity


def _step(number: Number) -> int:
    return -1 if number.step is None else number.step
