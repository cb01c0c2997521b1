"""The units of work of a run's measurement: what each needs, and which records are its own."""

from dataclasses import dataclass
from typing import Any

from hf_lowrank.families.records import Record
from hf_lowrank.measure.source import Checkpoint

__all__ = ["Unit", "headline_of"]

# file in publish/metrics by family, where it is not the family's own name
FILES = {"loss": "validation"}
HEADLINE = {
    "loss": ("validation_loss", "perplexity"),
    "spectral": tuple(
        f"spectral/{name}"
        for name in (
            "weight/effective_rank_score", "weight/stable_rank", "weight/spectral_gap",
            "update/relative_norm", "update/effective_rank_score", "update/stable_rank",
        )
    ),
    "activation": ("activation/relative_l2", "activation/cosine", "activation/cka"),
    "curvature": ("curvature/top_eigenvalue", "curvature/trace"),
    "landscape": tuple(
        f"landscape/{name}"
        for name in ("random/sharpness", "random/variance", "svd_1/sharpness", "svd_k/sharpness", "svd_k/variance")
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """A piece of work that is done or not.

    Attributes:
        family: of `FAMILIES`.
        step: of the record.
        checkpoints: the models it needs; the first is the run's own at `step`.
        space: of the weights, where the unit is for one.
        subject: `consecutive`, `cross`, `trajectory`, or None.
        other: name of the run at the other end, None where there is none.
    """

    family: str
    step: int
    checkpoints: tuple[Checkpoint, ...]
    space: str | None = None
    subject: str | None = None
    other: str | None = None

    @property
    def file(self) -> str:
        """Stem of the files its results go to."""
        return FILES.get(self.family, self.family)

    @property
    def key(self) -> str:
        """What tells it from the run's other units."""
        parts = (self.family, self.step, self.space, self.subject, self.other)
        return "/".join(str(part) for part in parts if part is not None)

    @property
    def label(self) -> str:
        """For people."""
        about = " ".join(part for part in (self.family, self.subject, self.space) if part)
        return f"step {self.step}: {about}" + (f" with {self.other}" if self.other else "")

    def owns_record(self, record: Record) -> bool:
        """Whether a record is one that this unit finds."""
        subject = record.name.split("/")[1] if "/" in record.name else ""
        return record.step == self.step and self._owns(subject, record.space, record.settings.get("other"))

    def owns_row(self, row: dict[str, Any]) -> bool:
        """Whether a row is one that this unit finds."""
        return int(row["step"]) == self.step and self._owns(
            str(row.get("subject", "")), row.get("space"), row.get("other")
        )

    def _owns(self, subject: str, space: Any, other: Any) -> bool:
        if self.family == "landscape":
            trajectory = subject.startswith("trajectory")
            return trajectory if self.subject == "trajectory" else not trajectory and space == self.space
        if self.family == "interpolation":
            return subject == "consecutive" and space == self.space if self.other is None else other == self.other
        # linearised stands where there is no dense matrix
        return self.space is None or (space == "native") == (self.space == "native")


def headline_of(unit: Unit) -> tuple[str, ...]:
    """The names of the headline metrics that a unit gives."""
    if unit.family == "interpolation":
        return (f"interpolation/{'consecutive' if unit.other is None else 'cross_method'}/barrier",)
    if unit.subject == "trajectory":
        return ("landscape/trajectory_1/sharpness",)
    return HEADLINE[unit.family]
