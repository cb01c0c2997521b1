"""What a family of metrics is, and which families there are.

A family says in one class what it measures and on what. A package outside this one defines it in the same way:

    @family
    class Toy(Family):
        entry = Entry("toy", "Toy numbers", (HeadlineMetric(None, "toy/sum", "Sum of all weights", "sum"),))

        def measure(self, at):
            total = sum(float(p.sum()) for p in at.model.parameters())
            return Measurement([record("toy/sum", total, at.step)], [])

    class ToyCallback(MetricCallback):
        family = Toy

`hf-lowrank measure` finds it where the package names the module as a plugin (`hf_lowrank.plugins`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from torch import Tensor, nn

from hf_lowrank.families.records import Measurement, Record
from hf_lowrank.metrics.sequences import EvaluationSet
from hf_lowrank.plugins import load_plugins
from hf_lowrank.report.catalogue import Entry, register

__all__ = [
    "PRESETS", "Checkpoint", "Context", "Family", "Peer", "Preset", "Run", "RunStep", "Unit", "families", "family",
    "get_family",
]  # fmt: skip


class Checkpoint(Protocol):
    """A model of a run on disk; `weights` are its safetensors files."""

    @property
    def step(self) -> int: ...
    @property
    def weights(self) -> list[Path]: ...


class Run(Protocol):
    """A finished run that is measured, or that another one is compared with."""

    @property
    def name(self) -> str: ...
    @property
    def method(self) -> str: ...
    @property
    def seed(self) -> int | None: ...
    @property
    def checkpoints(self) -> Sequence[Checkpoint]: ...
    @property
    def final(self) -> Checkpoint: ...
    def at(self, step: int) -> Checkpoint | None: ...
    def settings(self) -> Mapping[str, Any]: ...
    def has_another_tokenizer(self, other: Any) -> bool: ...


@dataclass(frozen=True)
class RunStep:
    """A checkpoint of a run, from which a family cuts its units of work.

    Attributes:
        run: the run.
        now, previous: the checkpoint and the one before it.
        baseline: the run that others are compared with, None without one; it may be this run.
        others: further runs that are measured along with it.
        spaces: `native` and `dense`, or `dense` alone where no layer is replaced.
        exact_spaces: those of them whose weights compute what the model computes.
        settings: the family's.
    """

    run: Run
    now: Checkpoint
    previous: Checkpoint | None
    baseline: Run | None
    others: Sequence[Run]
    spaces: tuple[str, ...]
    exact_spaces: tuple[str, ...]
    settings: Any


@dataclass(frozen=True)
class Unit:
    """A piece of work that is done or not.

    Attributes:
        family: name of the family.
        now: the checkpoint that is measured.
        space: of the weights, where the unit is for one.
        subject: what tells it from the family's other units, one of `Family.subjects`.
        previous, baseline, other: what it refers to: an earlier checkpoint, the baseline's checkpoint, another run.
        earlier: checkpoints whose weights it reads beside these.
    """

    family: str
    now: Checkpoint
    space: str | None = None
    subject: str | None = None
    previous: Checkpoint | None = None
    baseline: Checkpoint | None = None
    other: Run | None = None
    earlier: tuple[Checkpoint, ...] = ()

    @property
    def step(self) -> int:
        """The step that is measured."""
        return self.now.step

    @property
    def checkpoints(self) -> tuple[Any, ...]:
        """The models it needs; the first is the run's own."""
        other = None if self.other is None else self.other.at(self.step)
        needed = (self.now, self.previous, self.baseline, other, *self.earlier)
        return tuple(checkpoint for checkpoint in needed if checkpoint is not None)

    @property
    def file(self) -> str:
        """Stem of the files its results go to."""
        return get_family(self.family).entry.file

    @property
    def key(self) -> str:
        """What tells it from the run's other units."""
        parts = (self.family, self.step, self.space, self.subject, None if self.other is None else self.other.name)
        return "/".join(str(part) for part in parts if part is not None)

    @property
    def label(self) -> str:
        """For people."""
        words = " ".join(part for part in (self.family, self.subject, self.space) if part)
        return f"step {self.step}: {words}" + (f" with {self.other.name}" if self.other else "")

    def owns_record(self, record: Record) -> bool:
        """Whether a record is a result of this unit."""
        subject = record.name.split("/")[1] if "/" in record.name else ""
        return self._owns(record.step, subject, record.space, record.settings.get("other"))

    def owns_row(self, row: Mapping[str, Any]) -> bool:
        """Whether a row is a result of this unit."""
        return self._owns(int(row["step"]), str(row.get("subject", "")), row.get("space"), row.get("other"))

    def _owns(self, step: int, subject: str, space: Any, other: Any) -> bool:
        return (
            step == self.step
            and get_family(self.family).unit_subject(subject) == self.subject
            # linearised stands if there is no dense matrix
            and (self.space is None or (space == "native") == (self.space == "native"))
            and (self.other is None or other == self.other.name)
        )

    def failed(self, reason: str, part: Measurement | None = None) -> Measurement:
        """The part that was measured, with records that say why the other headline metrics were not."""
        part = part or Measurement([], [])
        measured = {record.name for record in part.records}
        settings = {} if self.other is None else {"other": self.other.name}
        missing = [
            Record(name, None, None, self.step, settings, self.space, about={"note": reason})
            for name in get_family(self.family).headline(self.subject)
            if name not in measured
        ]
        return part + Measurement(missing, [])


@dataclass(frozen=True)
class Peer:
    """Another model that a measurement refers to: an earlier checkpoint's, the baseline's, another run's.

    Attributes:
        name: of its run, or `step <n>` if it is an earlier checkpoint.
        step: of its weights, None if that is not known.
        load: gives the model as trained; None if it is not at hand.
        tensor: what a callback has kept instead: gives a tensor by its name, None if that is not at hand.
        run: the run it belongs to, if it is another one.
    """

    name: str
    step: int | None
    load: Callable[[], nn.Module] | None = None
    tensor: Callable[[str], Tensor | None] | None = None
    run: Run | None = None


@dataclass(frozen=True)
class Context:
    """What a family measures: a model at a step, and what it is compared with.

    Attributes:
        model: as trained, whole or sharded by FSDP2.
        step: its optimizer step.
        settings: the family's.
        sequences: what the loss is taken on; None for a family that needs none.
        space: of the weights; see `in_space`.
        subject: of the unit of work; None for a family that has no subjects.
        previous, initial, baseline, other: models to compare with, None if there are none.
        run: the run, None during training.
        earlier: the weight files of each checkpoint up to this one, where a unit asks for them.
        shared: every process measures its share; all get the whole result.
        kept: a callback's: gets the tensors by name that are compared with at the next measurement.
        progress: is called after every piece of the work.
    """

    model: nn.Module
    step: int
    settings: Any = None
    sequences: EvaluationSet | None = None
    space: str = "native"
    subject: str | None = None
    previous: Peer | None = None
    initial: Peer | None = None
    baseline: Peer | None = None
    other: Peer | None = None
    run: Run | None = None
    earlier: Sequence[list[Path]] = ()
    shared: bool = False
    kept: dict[str, Tensor] | None = None
    progress: Callable[[], Any] = lambda: None


class Family:
    """A family of metrics.

    Attributes:
        entry: what readers of reports know about it.
        Settings: class of its settings, whose defaults are the preset `quick`.
        study: its settings in the preset `study`, if they are others.
        sequences: what it is measured on: `few` of the validation sequences, `all` of them, or None.
        subjects: where its units have subjects, how the subjects of their records begin (`<family>/<subject>/...`).
        needs_baseline: whether it compares with a baseline and measures nothing without one.
        on_loss: whether it measures the loss of the next token, which not every model has.
        cost: of a checkpoint, in passes over the sequences, roughly; the cheap families are measured first.
    """

    entry: ClassVar[Entry]
    # a family without settings has None
    Settings: ClassVar[Callable[..., Any]] = type(None)
    study: ClassVar[Any] = None
    sequences: ClassVar[Literal["few", "all"] | None] = "few"
    subjects: ClassVar[tuple[str, ...]] = ()
    needs_baseline: ClassVar[bool] = False
    on_loss: ClassVar[bool] = True
    cost: ClassVar[float] = 10

    def measure(self, at: Context) -> Measurement:
        """Measure a model; a `PartialError` holds what was measured before a part failed.

        Every process calls this where the model or the sequences are shared. The model ends as it was, bit for bit.
        """
        raise NotImplementedError

    def units(self, here: RunStep) -> Iterator[Unit]:
        """The work at a checkpoint of a finished run: here one unit for every space that has exact weights."""
        for space in here.exact_spaces:
            yield Unit(self.entry.name, here.now, space)

    def headline(self, subject: str | None) -> tuple[str, ...]:
        """The names of the headline metrics that a unit with this subject gives."""
        return tuple(n for n in self.entry.metric_names() if self.unit_subject(f"{n}/".split("/")[1]) == subject)

    def across_runs(
        self, runs: Sequence[Run], measured_of: Callable[[Run], Measurement]
    ) -> dict[str, list[dict[str, Any]]]:
        """Tables of several runs that were measured together, rows by the table's name: here none."""
        return {}

    def unit_subject(self, subject: str) -> str | None:
        """The subject of the unit whose records have this subject in their names."""
        return next((known for known in self.subjects if subject.startswith(known)), None)


_FAMILIES: dict[str, Family] = {}
F = TypeVar("F", bound=type[Family])


def family(cls: F) -> F:
    """Register a family.

    Raises:
        ValueError: another one has its name or one of its metrics.
    """
    register(cls.entry)
    _FAMILIES[cls.entry.name] = cls()
    return cls


def families() -> dict[str, Family]:
    """All families by name, in the order in which they are measured."""
    load_plugins()
    return dict(sorted(_FAMILIES.items(), key=lambda item: item[1].cost))


def get_family(name: str) -> Family:
    """The family of a name."""
    if name not in _FAMILIES:
        load_plugins()
    return _FAMILIES[name]


@dataclass(frozen=True)
class Preset:
    """Named settings for measuring whole runs.

    Attributes:
        name: `quick` or `study`.
        sequences: of the evaluation set, spread evenly over what there is.
        settings: by the families' names, instead of the preset's.
    """

    name: str = "quick"
    sequences: int = 32
    settings: Mapping[str, Any] = field(default_factory=dict)

    def of(self, family: Family) -> Any:
        """The settings of a family."""
        if family.entry.name in self.settings:
            return self.settings[family.entry.name]
        return family.study if self.name == "study" and family.study is not None else family.Settings()


# quick: about a minute a checkpoint for a model of 2 M parameters on two CPU cores; study: arXiv 2605.13652
PRESETS = {"quick": Preset(), "study": Preset("study", sequences=1000)}
