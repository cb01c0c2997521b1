"""What makes runs and numbers comparable: the one place that decides it, for card, table, page and study alike.

Two questions are answered here. In which facts do runs differ (`differences`)? A `conflict` means that their numbers
side by side would mislead, a `note` is for what a reader should know. And which numbers are of the same quantity,
measured in the same way (`Number`)? Everything is plain data; a run is known by its report, or by what another run's
report keeps of it as its baseline.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hf_lowrank.report.markdown import one_line
from hf_lowrank.report.model import Baseline, Data, EvaluationEntry, MetricEntry, Report, Run
from hf_lowrank.report.tables import UNKNOWN, describe, format_count

__all__ = [
    "EVALUATION_HASH", "FACTS", "PEER", "REMARKS", "Difference", "Kind", "Level", "Number", "SharedFact",
    "data_identity", "differences", "latest", "numbers", "settings_key",
]  # fmt: skip

Level = Literal["conflict", "note"]
Kind = Literal["metric", "evaluation", "cost"]
# a part of a fact -> its value, None where it is not recorded
Parts = Mapping[str, Any]

# in a number's settings: what identifies the text it was measured on; null where that was not recorded
EVALUATION_HASH = "evaluation_hash"
# in a number's settings: the run at the other end, different for every run as it should be
PEER = "other"
# what `about` may say differently of two numbers without anything having been done differently
REMARKS = frozenset(
    ("note", "error", "explained", "checkpoints", "form", "chance", "higher_is_better", "requests", "filter")
)


# ---- facts that runs must share ----


def _words(parts: Parts) -> str:
    """Join what is known; hashes are cut to what tells them apart at a glance."""
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
        why: what follows where runs do not share it.
        find: gives its parts, of a run and its data.
        level: `conflict` where numbers side by side would mislead.
        show: puts those parts into words in which runs differ.
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
    """Return a finder of fields of the data, each under its name for people."""

    def find(run: Run | Baseline, data: Data | None) -> Parts:
        return {name: None if data is None else getattr(data, field) for name, field in fields.items()}

    return find


def _tokenizer(run: Run | Baseline, data: Data | None) -> Parts:
    # a hash says what a tokenizer is; its name, often a path, only where there is no hash
    return {"tokenizer": None if data is None else data.tokenizer_hash or data.tokenizer_name}


def _model(run: Run | Baseline, data: Data | None) -> Parts:
    keys = ("architecture", "size", "config_hash")
    return {key: None if run.model is None else getattr(run.model, key) for key in keys}


def _planned_steps(run: Run | Baseline, data: Data | None) -> Parts:
    # a run that stopped early was planned like the others: that it stopped is a fact of its own
    return {"steps": max(run.steps, run.max_steps or 0)}


def _checkpoint(run: Run | Baseline, data: Data | None) -> Parts:
    # the checkpoints of two runs at one step are alike, whatever their runs did afterwards
    return {"at": "end of the run" if run.checkpoint_of is None else f"checkpoint of step {run.steps:,}"}


def _unfinished(run: Run | Baseline, data: Data | None) -> Parts:
    stopped = run.stopped_early
    return {"end": f"stopped at step {run.steps:,} of {run.max_steps:,}" if stopped else "complete"}


def _fields(name: str, *keys: str) -> Callable[[Run | Baseline, Data | None], Parts]:
    """Return a finder of some fields of a part of the run, by default of all."""

    def find(run: Run | Baseline, data: Data | None) -> Parts:
        part = getattr(run, name)
        return {"": describe(part if not keys else {key: part.get(key) for key in keys}) if part else None}

    return find


# conflicts in the order in which a reader would ask for them
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
    SharedFact("rate", "Peak learning rate", "",
               lambda run, data: {"rate": None if run.learning_rate is None else f"{run.learning_rate:g}"}, "note"),
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
        words: of every run what it is there, `UNKNOWN` where it is not recorded.
        odd: of every run whether it is not as in the reference run, or as in most runs where there is none.
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
        sources: two or more runs, each its report or what a report keeps of it as its baseline.
        reference: index of the run that the others are held against. Without one it is the most common value of each
            fact, of equally common ones the first run's. A value that is not recorded cannot be told to be the same.
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
    """Return what losses were measured on, as text; losses in training compare only where it is equal."""
    return repr([value for fact, value in zip(FACTS, _values(report), strict=True) if fact.of_data])


def settings_key(report: Report) -> str:
    """Return what runs that differ in nothing but their seed share, as text."""
    run = report.run
    shared = [value for fact, value in zip(FACTS, _values(report), strict=True) if fact.of_setting]
    return repr((run.method, describe(run.method_config), run.steps, shared))


# ---- numbers of the same quantity ----


@dataclass(frozen=True)
class Number:
    """A number of a run and how it was measured.

    Attributes:
        kind, name, space: what it is; the name of a downstream result is `task/metric`.
        settings: what defines it; what is null or empty there counts as not set.
        reference: what it refers to at its own step.
        about: what only describes it.
        step, value, stderr: the number.
        entry: the report's entry that it comes from.
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

    @property
    def quantity(self) -> tuple[str, ...]:
        """What numbers of the same quantity, measured in the same way, share, at whatever step."""
        return (self.kind, self.name, str(self.space), _canonical(self.settings))

    @property
    def column(self) -> tuple[str, ...]:
        """What numbers share that stand side by side: the same quantity with the same reference.

        An update since step 100 and one since step 200 are points of one curve, and no two numbers to compare.
        """
        return (*self.quantity, _canonical(self.reference))

    @property
    def sampling(self) -> bool:
        """Whether the standard error says how the number would vary over other samples.

        A Lanczos residual bounds an error of arithmetic.
        """
        return not str(self.about.get("stderr", "")).startswith("residual")

    @property
    def comparable(self) -> bool:
        """Whether it compares with another run's number at all: nothing is known to be the same as an unknown text."""
        return self.settings.get(EVALUATION_HASH, "") is not None


def _canonical(settings: Mapping[str, Any]) -> str:
    return json.dumps({key: value for key, value in settings.items() if value not in (None, [], {})}, sort_keys=True)


def numbers(source: Report | Baseline) -> Iterator[Number]:
    """Yield the metrics and downstream results of a run."""
    for metric in source.metrics:
        yield Number(
            kind="metric",
            name=one_line(metric.name),
            space=metric.space,
            settings=metric.settings,
            reference=metric.reference,
            about=metric.about,
            step=metric.step,
            value=metric.value,
            stderr=metric.stderr,
            entry=metric,
        )
    for result in source.evaluations:
        asked = {key: getattr(result, key) for key in ("num_fewshot", "limit", "task_version")}
        yield Number(
            kind="evaluation",
            name=f"{one_line(result.task)}/{one_line(result.metric)}",
            space=None,
            settings={**asked, **result.settings},
            reference={},
            about=result.about,
            step=result.step,
            value=result.value,
            stderr=result.stderr,
            entry=result,
        )


def latest(measured: Iterable[Number]) -> list[Number]:
    """Return those of one run's numbers that speak for it: of each quantity those of its last step.

    A metric that was measured again later in another way is left out, because half trained the model was another one.
    Where a number was measured twice at one step with one reference, the later entry counts.
    """
    by_place = {(number.column, number.step): number for number in measured}
    last: dict[tuple[str, ...], int] = {}
    for number in by_place.values():
        for scope in (number.quantity, _scope(number)):
            last[scope] = max(last.get(scope, -1), _step(number))
    return [
        number
        for number in by_place.values()
        if _step(number) == last[number.quantity] and (number.step is None or number.step == last[_scope(number)])
    ]


def _scope(number: Number) -> tuple[str, ...]:
    """What a later measurement supersedes: tasks say their settings, of a metric the way of measuring may change."""
    return (number.name, str(number.space)) if number.kind == "metric" else number.quantity


def _step(number: Number) -> int:
    return -1 if number.step is None else number.step
