"""Where runs are not comparable: what differs between them, and which metrics were measured in different ways.

A notice of level `conflict` means that numbers side by side would mislead; `note` is for what a reader should know.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from hf_lowrank.compare.series import DESCRIPTIVE, ComparedRun, Series, differing_settings
from hf_lowrank.report.catalogue import HEADLINE_METRICS
from hf_lowrank.report.markdown import one_line
from hf_lowrank.report.tables import UNKNOWN, describe, format_count

__all__ = ["Notice", "differing_facts", "metric_notices", "run_notices", "settings_key"]

_HEADLINE = {metric.name: metric for metric in HEADLINE_METRICS}
_CROSS = "interpolation/cross_"
_MOST_LABELS = 8  # of runs in one part of a notice
# settings that differ between runs as they should
_OF_THE_RUN = frozenset(
    ("note", "error", "explained", "checkpoints", "form", "chance", "higher_is_better", "requests")
)


@dataclass(frozen=True)
class Notice:
    """Something that readers of a comparison must know.

    Attributes:
        level: `conflict` or `note`.
        title: what it is about.
        text: what follows from it.
        parts: (value, the labels of the runs that have it), the most common first.
    """

    level: Literal["conflict", "note"]
    title: str
    text: str
    parts: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def shown(self) -> list[tuple[str, str]]:
        """The parts with their labels in words, long lists cut."""
        found = []
        for value, labels in self.parts:
            more = len(labels) - _MOST_LABELS
            found.append((value, ", ".join(labels[:_MOST_LABELS]) + (f" and {more} more" if more > 0 else "")))
        return found

    @property
    def line(self) -> str:
        """The notice on one line, as plain text."""
        values = "; ".join(f"{value} ({labels})" for value, labels in self.shown)
        return ": ".join(part for part in (self.title, self.text, values) if part)


@dataclass(frozen=True)
class _Fact:
    """Something that runs should share; `find` gives its value, which `show` puts in words, None where unknown."""

    key: str
    title: str
    text: str
    find: Callable[[Mapping[str, Any]], Any]
    level: Literal["conflict", "note"] = "conflict"
    show: Callable[[Any], str] = str


def _of_data(*keys: str) -> Callable[[Mapping[str, Any]], Any]:
    def find(report: Mapping[str, Any]) -> Any:
        data = report["data"] or {}
        values = tuple(None if data.get(key) is None else one_line(data[key]) for key in keys)
        return None if all(value is None for value in values) else values

    return find


def _of_run(*keys: str) -> Callable[[Mapping[str, Any]], Any]:
    def find(report: Mapping[str, Any]) -> Any:
        found: Any = report["run"]
        for key in keys:
            found = found[key]
        return describe(found) if isinstance(found, Mapping) else found

    return find


def _training_data(report: Mapping[str, Any]) -> Any:
    data = report["data"]
    return None if data is None else tuple(data[key] for key in ("name", "config", "revision_or_hash"))


def _model(report: Mapping[str, Any]) -> Any:
    model = report["run"]["model"]
    return (model["architecture"], model["size"], model.get("config_hash"))


def _unfinished(report: Mapping[str, Any]) -> Any:
    run = report["run"]
    stopped = run["max_steps"] is not None and run["steps"] < run["max_steps"] and not run.get("checkpoint_of")
    return f"stopped at step {run['steps']:,} of {run['max_steps']:,}" if stopped else "complete"


def _code(report: Mapping[str, Any]) -> Any:
    versions = report["run"]["versions"]
    return describe({name: versions.get(name) for name in ("hf_lowrank", "torch", "transformers")}) or None


def _optimizer(report: Mapping[str, Any]) -> Any:
    return (
        describe({key: report["run"]["optimizer"][key] for key in ("betas", "weight_decay", "max_grad_norm")}) or None
    )


def _words(values: Sequence[Any]) -> str:
    """Join what is known of a fact; hashes are cut to what tells them apart at a glance."""
    return " ".join(text if len(text) < 40 else text[:12] for text in (one_line(v) for v in values if v is not None))


_FACTS = (
    _Fact("data", "Training data", "the runs were not trained on the same text", _training_data, show=_words),
    _Fact("tokens", "Tokens seen", "one run was trained longer than another", _of_run("tokens_seen"),
          show=lambda count: str(format_count(count))),
    _Fact("model", "Model", "the runs did not start from the same architecture and size", _model, show=_words),
    _Fact("tokenizer", "Tokenizer", "losses and perplexities are per token, and tokens are not the same",
          _of_data("tokenizer_hash", "tokenizer_name"), show=_words),
    _Fact("validation", "Validation data", "losses were not measured on the same text",
          _of_data("split_seed", "validation_sequences", "validation_tokens"),
          show=lambda v: ", ".join(
              f"{part} {name}" for part, name in zip(v, ("split seed", "sequences", "tokens"), strict=True) if part)),
    _Fact("sequence", "Sequence length", "longer context makes tokens easier to predict",
          _of_data("sequence_length"), show=_words),
    _Fact("packing", "Packing", "documents were cut in another way", _of_data("packing"), show=_words),
    _Fact("precision", "Precision", "the runs were not computed in the same precision", _of_run("precision")),
    _Fact("unfinished", "Unfinished", "a run stopped before its schedule ended", _unfinished),
    _Fact("rate", "Peak learning rate", "", _of_run("learning_rate"), "note", lambda rate: f"{rate:g}"),
    _Fact("schedule", "Learning-rate schedule", "", _of_run("lr_schedule"), "note"),
    _Fact("batch", "Sequences a step", "", _of_run("batch", "global_sequences"), "note"),
    _Fact("optimizer", "Optimizer settings", "", _optimizer, "note"),
    _Fact("code", "Versions", "", _code, "note"),
    _Fact("hardware", "Hardware", "times and memory are not comparable", _of_run("hardware"), "note"),
)  # fmt: skip


def settings_key(report: Mapping[str, Any]) -> str:
    """Return what runs that differ in nothing but their seed share, as text."""
    run = report["run"]
    method = {key: value for key, value in run["method_config"].items() if value is not None}
    same = [fact for fact in _FACTS if fact.key not in ("unfinished", "code", "hardware")]
    return repr((run["method"], describe(method), run["steps"], [fact.find(report) for fact in same]))


def differing_facts(runs: Sequence[ComparedRun], reference: int | None) -> list[tuple[str, ...]]:
    """Return for each run the titles of the conflicting facts in which it is not as the reference is.

    Without a reference the most common value of each fact counts, of equally common ones the first run's. A value that
    is not recorded cannot be told to be the same.
    """
    found: list[list[str]] = [[] for _ in runs]
    for fact in _FACTS:
        if fact.level == "conflict":
            values = [fact.find(run.report) for run in runs]
            known = [value for value in values if value is not None]
            if not known:
                continue
            usual = max(known, key=known.count) if reference is None else values[reference]
            for index, value in enumerate(values):
                if value != usual:
                    found[index].append(fact.title.lower())
    return [tuple(titles) for titles in found]


def run_notices(runs: Sequence[ComparedRun]) -> list[Notice]:
    """Return a notice a fact that the runs do not share, conflicts first."""
    notices = []
    for fact in _FACTS:
        values = [fact.find(run.report) for run in runs]
        if any(value != values[0] for value in values):
            shown = [UNKNOWN if value is None else one_line(fact.show(value)) for value in values]
            notices.append(Notice(fact.level, fact.title, fact.text, _parts(shown, [run.label for run in runs])))
    return sorted(notices, key=lambda notice: notice.level != "conflict")


def _parts(values: Sequence[str], labels: Sequence[str]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    of_value: dict[str, list[str]] = {}
    for value, label in zip(values, labels, strict=True):
        of_value.setdefault(value, []).append(label)
    ordered = sorted(of_value.items(), key=lambda part: -len(part[1]))
    return tuple((value, tuple(members)) for value, members in ordered)


def metric_notices(series: Sequence[Series], runs: Sequence[ComparedRun]) -> list[Notice]:
    """Return notices on metrics: measured in ways that cannot be compared, at different steps, or not quite known.

    Metrics for which the same is to be said share a notice.
    """
    labels = [run.label for run in runs]
    gathered: dict[tuple[Any, ...], list[str]] = {}
    of_name: dict[tuple[str, str], list[Series]] = {}
    for one in series:
        of_name.setdefault((one.kind, one.name), []).append(one)
        for said in _within(one, labels):
            gathered.setdefault((_level(one), *said), []).append(one.name)
        if one.unsure:
            gathered.setdefault(_unsure(one, labels), []).append(one.name)
    for together in of_name.values():
        parts = _ways(together, labels)
        if parts:
            text = "measured in different ways, so in columns of their own"
            gathered.setdefault((_level(together[0]), text, parts), []).append(together[0].name)
    notices = [Notice(level, _titles(names), text, parts) for (level, text, parts), names in gathered.items()]
    return sorted(notices, key=lambda notice: notice.level != "conflict")


def _level(series: Series) -> Literal["conflict", "note"]:
    return "conflict" if series.name in _HEADLINE or series.kind == "evaluation" else "note"


def _titles(names: Sequence[str]) -> str:
    shown = [_HEADLINE[name].label if name in _HEADLINE else name for name in dict.fromkeys(names)]
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 5 else ", ".join(["", *shown[4:]]))


def _ways(together: Sequence[Series], labels: Sequence[str]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return (how it was measured, runs) where two runs have a metric and no way of measuring it in common."""
    # every run has another one at its barriers' other end
    peer = {"other", "other_step", "other_method", "other_seed"} if together[0].name.startswith(_CROSS) else set()
    measured = [one for one in together if any(point.value is not None for point in one.points)]
    found = [
        ({**one.settings, **point.bound, "weights": one.space}, run)
        for one in measured
        for run in sorted({point.run for point in one.points})
        for point in one.last(run)
        if point.value is not None
    ]
    differing = sorted((differing_settings([noted for noted, _ in found]) | {"weights"}) - peer)
    ways: dict[str, set[int]] = {}
    for noted, run in found:
        ways.setdefault(describe({key: noted.get(key) for key in differing}), set()).add(run)
    ways_of = {run: {way for way, of in ways.items() if run in of} for way_runs in ways.values() for run in way_runs}
    if all(ways_of[a] & ways_of[b] for a, b in combinations(sorted(ways_of), 2)):
        return ()
    return tuple((way, tuple(labels[run] for run in sorted(of))) for way, of in ways.items())


def _within(one: Series, labels: Sequence[str]) -> list[tuple[str, tuple[tuple[str, tuple[str, ...]], ...]]]:
    """Return what must be said of numbers in one column: other steps, other sets of matrices, unknown texts."""
    last = {
        run: now[-1]
        for run in sorted({point.run for point in one.points})
        if (now := [point for point in one.last(run) if point.value is not None])
    }
    said = []
    names = [labels[run] for run in last]
    steps = _parts(["no step" if p.step is None else f"step {p.step:,}" for p in last.values()], names)
    if len(steps) > 1:
        said.append(("not measured at the same step", steps))
    told: list[tuple[tuple[str, ...], ...]] = []
    for key in sorted(DESCRIPTIVE - _OF_THE_RUN):
        values = _parts([describe({key: p.settings.get(key)}) or f"{key} {UNKNOWN}" for p in last.values()], names)
        groups = tuple(members for _, members in values)
        # the matrices that were measured, and all of them
        if len(values) > 1 and not (key == "total" and groups in told):
            said.append((f"not of the same {key}", values))
            told.append(groups)
    return said


def _unsure(one: Series, labels: Sequence[str]) -> tuple[Any, ...]:
    """Return the notice on runs whose evaluation set is not recorded: level, text, parts."""
    parts = ((UNKNOWN, tuple(labels[run] for run in sorted(one.unsure))),)
    if {point.run for point in one.points} == one.unsure:
        return _level(one), "what it was measured on is not recorded, so nobody can tell whether it is the same", parts
    return "note", "the evaluation set is not recorded, and taken for the others' since data and settings agree", parts
