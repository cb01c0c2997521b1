"""What a measurement gives: records for the report and the log, rows for a table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_lowrank.metrics.perplexity import Estimate

__all__ = ["FAMILIES", "Measurement", "Record", "finite", "jackknife", "record"]

# in the order in which they are measured: the cheap ones first
FAMILIES = ("loss", "spectral", "activation", "interpolation", "curvature", "landscape")


@dataclass(frozen=True)
class Record:
    """One number of the report.

    Attributes:
        name: `dimension/subject/metric`, in the study's terms.
        value: the number, None where it could not be measured.
        stderr: its standard error; None where it is exact for the given weights.
        step: optimizer step it was measured at.
        settings: everything the number depends on beside the weights.
        space: `dense`, `linearised` (no dense matrix exists) or `native`.
    """

    name: str
    value: float | None
    stderr: float | None
    step: int
    settings: dict[str, Any] = field(default_factory=dict)
    space: str | None = None


@dataclass
class Measurement:
    """What one measurement found: records for the report and the log, rows for the parquet file."""

    records: list[Record]
    rows: list[dict[str, Any]]

    def __add__(self, other: "Measurement") -> "Measurement":
        return Measurement(self.records + other.records, self.rows + other.rows)


def finite(value: float) -> float | None:
    """None for NaN and infinity, which JSON has no word for."""
    return value if math.isfinite(value) else None


def record(
    name: str, found: Estimate | float, step: int, settings: dict[str, Any], space: str | None = None
) -> Record:
    """A record of an estimate, or of a number that is exact."""
    estimate = found if isinstance(found, Estimate) else Estimate(found, math.nan)
    value, stderr = finite(estimate.value), finite(estimate.stderr)
    if value is None:
        settings = {**settings, "note": f"not finite: {estimate.value}"}
    return Record(name, value, None if value is None else stderr, step, settings, space)


def jackknife(value: float, left_out: Sequence[float] | NDArray[np.float64]) -> Estimate:
    """An estimate with its jackknife standard error, from the values with one unit left out each."""
    others = np.asarray(left_out, dtype=np.float64)
    count = len(others)
    if count < 2:
        return Estimate(value, math.nan)
    return Estimate(value, math.sqrt((count - 1) / count * float(((others - others.mean()) ** 2).sum())))
