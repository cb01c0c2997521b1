"""What the parts of report.json are made of: models that are mappings as well, and the types of their fields."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "Closed", "Count", "InitFrom", "LearningRateSchedule", "Name", "Nonnegative", "OptimizerStateBytes", "Part",
    "PeakMemory", "Positive", "Seeds", "Speed",
]  # fmt: skip

Name = Annotated[str, Field(pattern=r"\S")]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Nonnegative = Annotated[float, Field(ge=0)]


class Part(BaseModel, Mapping[str, Any]):
    """A part of a report: a model that is also a mapping of the fields that were given."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    def __getitem__(self, key: str) -> Any:
        if key in type(self).model_fields:
            return getattr(self, key)
        return (self.model_extra or {})[key]

    def __setitem__(self, key: str, value: Any) -> None:
        setattr(self, key, value)

    def __contains__(self, key: object) -> bool:
        return key in self.model_fields_set

    def __iter__(self) -> Iterator[str]:  # type: ignore[override]
        yield from (name for name in type(self).model_fields if name in self.model_fields_set)
        yield from self.model_extra or ()

    def __len__(self) -> int:
        return len(self.model_fields_set)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and dict(self) == dict(other)

    def __or__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return {**self, **other}


class Closed(Part):
    """A part that has no fields but its own; the others hold whatever else a run wants to keep."""

    model_config = ConfigDict(extra="forbid")


class OptimizerStateBytes(Part):
    """What the optimizer keeps, in bytes.

    Attributes:
        adamw: what AdamW would hold for the dense model.
    """

    predicted: Count | None
    measured: Count | None
    adamw: Count | None

    @property
    def best(self) -> int | None:
        """Measured, or else predicted."""
        return self.predicted if self.measured is None else self.measured


class PeakMemory(Part):
    """The most memory that a process took, in bytes.

    Attributes:
        kind: how the peak was taken, such as cuda_allocated or process_rss.
    """

    value: Count | None
    kind: str | None


class Seeds(Part):
    """Seeds of the model and of the order of the data."""

    seed: int | None
    data_seed: int | None


class LearningRateSchedule(Part):
    """How the learning rate changed over the steps."""

    type: str | None
    warmup_steps: Annotated[int | float, Field(ge=0)] | None


class Speed(Closed):
    """How fast the run trained, in its last part if it was resumed.

    Attributes:
        tokens_per_second: of all processes in training alone, without validation, metrics, saving and the first step.
        optimizer_seconds_per_step: in the optimizer's step, refreshes of projectors included.
        refresh_seconds_per_step: to refresh projectors, merge adapters or refactorise, spread over all steps; null for
            a method without.
    """

    tokens_per_second: Nonnegative | None
    optimizer_seconds_per_step: Nonnegative | None
    refresh_seconds_per_step: Nonnegative | None


class InitFrom(Closed):
    """The run whose weights a run started from, at step 0.

    Attributes:
        source: folder or Hub repo, as it was given.
        method: the other run's.
        step: how many optimizer steps its weights had seen; null if that is not known.
        form: dense weights, or those of the method's own layers.
    """

    source: Name
    method: Name
    step: Count | None = None
    form: Literal["dense", "native"]
