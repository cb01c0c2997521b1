"""What a measurement gives: records for the report and the log, rows for a table."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hf_lowrank.metrics.perplexity import Estimate
from hf_lowrank.report.files import atomic_path
from hf_lowrank.report.io import metric_entry

__all__ = [
    "EVALUATION",
    "EVALUATIONS",
    "FAMILIES",
    "Measurement",
    "Record",
    "finite",
    "forget",
    "jackknife",
    "metrics_folder",
    "read_measurement",
    "read_records",
    "record",
    "write_measurement",
]

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


# results on downstream tasks, a file of another shape beside the families'
EVALUATIONS = "evaluations.json"
# rows that a run was validated on, beside its checkpoints
EVALUATION = "evaluation.parquet"


def metrics_folder(output_dir: str | Path) -> Path:
    """Where a run keeps its metrics."""
    return Path(output_dir) / "publish" / "metrics"


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All records in a metrics folder, as plain data, by file and then in the order they were measured."""
    files = [path for path in sorted(folder.glob("*.json")) if path.name != EVALUATIONS]
    return [record for path in files for record in json.loads(path.read_text())]


def read_measurement(folder: Path, name: str) -> Measurement | None:
    """What was measured of a family, None where nothing is there; any error that JSON and parquet know."""
    table, listed = folder / f"{name}.parquet", folder / f"{name}.json"
    if not listed.is_file():
        return None
    records = [Record(**entry) for entry in json.loads(listed.read_text())]
    rows = pd.read_parquet(table).to_dict("records") if table.is_file() else []
    return Measurement(records, [{str(key): value for key, value in row.items()} for row in rows])


def write_measurement(folder: Path, name: str, measurement: Measurement) -> None:
    """Replace what is there of a family; a reader meets the old files or the new ones."""
    folder.mkdir(parents=True, exist_ok=True)
    if measurement.rows:
        with atomic_path(folder / f"{name}.parquet") as path:
            pd.DataFrame(measurement.rows).to_parquet(path, index=False)
    else:
        (folder / f"{name}.parquet").unlink(missing_ok=True)
    records = [metric_entry(**asdict(record)) for record in measurement.records]
    with atomic_path(folder / f"{name}.json") as path:
        path.write_text(json.dumps(records, indent=1) + "\n")


def forget(folder: Path, name: str, gone: Callable[[Record | dict[str, Any]], bool]) -> None:
    """Drop the records and rows of a family that `gone` says yes to; remove the files where nothing is left."""
    try:
        measurement = read_measurement(folder, name)
    # unreadable: as good as none
    except Exception:
        measurement = Measurement([], [])
    if measurement is None:
        return
    kept = Measurement([r for r in measurement.records if not gone(r)], [r for r in measurement.rows if not gone(r)])
    if kept.records:
        write_measurement(folder, name, kept)
    else:
        for suffix in (".json", ".parquet"):
            (folder / f"{name}{suffix}").unlink(missing_ok=True)
