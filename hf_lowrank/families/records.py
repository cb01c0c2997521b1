"""What a measurement gives: records for the report and the log, rows for a table, and both on disk.

In `<run>/publish/metrics/` every family has three files: `<file>.json` holds the records that go into the report,
`<file>.parquet` the rows behind them, and `<file>.samples.parquet` what the records' errors are made of (see
`hf_lowrank.report.samples`). Results on downstream tasks have a file of another shape there.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hf_lowrank.metrics.perplexity import Estimate
from hf_lowrank.report.files import atomic_path
from hf_lowrank.report.io import EVALUATIONS, metric_entry, read_records
from hf_lowrank.report.samples import Key, Sampled, Samples, read_samples, sample_key, samples_path, write_samples
from hf_lowrank.report.version1 import upgrade_entry

__all__ = [
    "EVALUATION", "EVALUATIONS", "Measurement", "PartialError", "Record", "finite", "forget", "jackknife",
    "metrics_folder", "read_measurement", "read_records", "record", "remove_measurement", "write_measurement",
]  # fmt: skip

# the rows that a run was validated on, beside its checkpoints
EVALUATION = "evaluation.parquet"


@dataclass(frozen=True)
class Record:
    """One number of the report.

    Attributes:
        name: `family/subject/metric`, in the study's terms.
        value: the number, None if it could not be measured.
        stderr: its standard error; None if it is exact for the given weights.
        step: optimizer step it was measured at.
        settings: what defines the number: two numbers compare only where these agree.
        space: `dense`, `linearised` (no dense matrix exists) or `native`.
        reference: what the number refers to at its own step, such as an earlier checkpoint.
        about: what describes the number and defines nothing, such as what its standard error is over.
        samples: what its error is made of, None if it has none; not in report.json.
    """

    name: str
    value: float | None
    stderr: float | None
    step: int
    settings: dict[str, Any] = field(default_factory=dict)
    space: str | None = None
    reference: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    samples: Samples | None = field(default=None, compare=False, repr=False)

    @property
    def key(self) -> Key:
        """What tells it from the other records of a family."""
        return sample_key(self.name, self.space, self.step, self.settings, self.reference)


@dataclass
class Measurement:
    """Records for the report and the log, rows for the parquet file."""

    records: list[Record] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __add__(self, other: "Measurement") -> "Measurement":
        return Measurement(self.records + other.records, self.rows + other.rows)


class PartialError(Exception):
    """A part of a measurement failed; `part` is the other part."""

    def __init__(self, reason: str, part: Measurement) -> None:
        super().__init__(reason)
        self.part = part


def finite(value: float) -> float | None:
    """None for NaN and infinity, which JSON has no word for."""
    return value if math.isfinite(value) else None


def record(
    name: str,
    number: Estimate | Sampled | float,
    step: int,
    settings: Mapping[str, Any] | None = None,
    space: str | None = None,
    reference: Mapping[str, Any] | None = None,
    **about: Any,
) -> Record:
    """A record of a number; what is not finite becomes None with a note.

    The number is an estimate, or is exact, or comes with the samples that its error is made of: then `about` says what
    the error is over, has the degrees of freedom (`dof`) for its t quantile, and for a number with a bias of first
    order what it is without it (`corrected`). The 95 % interval is about that, or else about the value.
    """
    samples = number.samples if isinstance(number, Sampled) else None
    value = number if isinstance(number, int | float) else number.value
    stderr = number.stderr if isinstance(number, Estimate) else math.nan
    if not math.isfinite(value):
        about = {**about, "note": f"not finite: {value}"}
        return Record(name, None, None, step, dict(settings or {}), space, dict(reference or {}), about)
    if isinstance(number, Sampled) and samples is not None:
        stderr, dof = number.error()
        about = {"stderr": samples.over, **({"dof": round(dof, 2)} if math.isfinite(dof) else {}), **about}
        # what is more than rounding
        if abs(samples.value - value) > 1e-3 * stderr:
            about["corrected"] = samples.value
    where = (step, dict(settings or {}), space, dict(reference or {}), about)
    return Record(name, value, finite(stderr), *where, samples)


def jackknife(value: float, left_out: Sequence[float] | NDArray[np.float64]) -> Estimate:
    """An estimate with its jackknife standard error, from the values with one unit left out each."""
    others = np.asarray(left_out, dtype=np.float64)
    count = len(others)
    if count < 2:
        return Estimate(value, math.nan)
    return Estimate(value, math.sqrt((count - 1) / count * float(((others - others.mean()) ** 2).sum())))


def metrics_folder(output_dir: str | Path) -> Path:
    """Where a run keeps its metrics."""
    return Path(output_dir) / "publish" / "metrics"


def read_measurement(folder: Path, name: str) -> Measurement | None:
    """What is stored of a family, None if nothing is; raises whatever JSON and parquet raise for damaged files."""
    table, records = folder / f"{name}.parquet", folder / f"{name}.json"
    if not records.is_file():
        return None
    rows = pd.read_parquet(table).to_dict("records") if table.is_file() else []
    stored = [Record(**upgrade_entry(entry)) for entry in json.loads(records.read_text())]
    samples = read_samples(samples_path(folder, name))
    return Measurement(
        [replace(record, samples=samples.get(record.key)) for record in stored],
        [{str(key): value for key, value in row.items()} for row in rows],
    )


def write_measurement(folder: Path, name: str, measurement: Measurement) -> None:
    """Replace what is stored of a family; a reader meets the old files or the new ones."""
    folder.mkdir(parents=True, exist_ok=True)
    if measurement.rows:
        with atomic_path(folder / f"{name}.parquet") as path:
            pd.DataFrame(measurement.rows).to_parquet(path, index=False)
    else:
        (folder / f"{name}.parquet").unlink(missing_ok=True)
    samples = {record.key: record.samples for record in measurement.records if record.samples is not None}
    write_samples(samples_path(folder, name), samples)
    stored = [f.name for f in fields(Record) if f.name != "samples"]
    entries = [metric_entry(**{name: getattr(record, name) for name in stored}) for record in measurement.records]
    with atomic_path(folder / f"{name}.json") as path:
        path.write_text(json.dumps(entries, indent=1) + "\n")


def remove_measurement(folder: Path, name: str) -> None:
    """Remove the files of a family."""
    for path in (folder / f"{name}.json", folder / f"{name}.parquet", samples_path(folder, name)):
        path.unlink(missing_ok=True)


def forget(folder: Path, name: str, is_gone: Callable[[int], bool]) -> None:
    """Drop a family's records and rows of the steps that `is_gone` picks; remove the files if nothing is left."""
    try:
        stored = read_measurement(folder, name) or Measurement()
    # unreadable: as good as none
    except Exception:
        stored = Measurement()
    kept = Measurement(
        [record for record in stored.records if not is_gone(record.step)],
        [row for row in stored.rows if not is_gone(int(row["step"]))],
    )
    if kept.records:
        write_measurement(folder, name, kept)
    else:
        remove_measurement(folder, name)
