"""A run's metrics on disk, in `<run>/publish/metrics/`.

`<family>.json` holds the records that go into the report, `<family>.parquet` the rows behind them. Downstream tasks
have a file of another shape there (evaluations.py).
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from hf_lowrank.downstream.results import EVALUATIONS
from hf_lowrank.measurements.base import Measurement, Record
from hf_lowrank.report.files import atomic_path
from hf_lowrank.report.schema import metric_entry

__all__ = ["EVALUATION", "forget", "metrics_folder", "read_measurement", "read_records", "write_measurement"]


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
