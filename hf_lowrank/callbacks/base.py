"""What the metric callbacks share: when they measure, where numbers go, and what happens when one fails.

A metric callback works on any Trainer. Bound by `hf_lowrank.attach` it logs through `Trainer.log`, so that every
reporter sees its numbers; under a bare `add_callback` it writes its files and `state.log_history` alone.

On disk, under `<output_dir>/publish/metrics/`: `<name>.parquet` (one row a subject and step) and `<name>.json` (the
records that go into the report). A resumed run keeps what was measured up to its checkpoint and drops the rest.
"""

import json
import logging
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lowrank.report.files import replacing
from hf_lowrank.report.schema import metric_entry

__all__ = ["Measurement", "MetricCallback", "Record", "metrics_folder", "read_records"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One number of the report.

    Attributes:
        name: `dimension/subject/metric`, as metrics.md spells it.
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


def metrics_folder(output_dir: str | Path) -> Path:
    """Where a run keeps its metrics."""
    return Path(output_dir) / "publish" / "metrics"


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All records in a metrics folder, as plain data, by file and then in the order they were measured."""
    return [record for path in sorted(folder.glob("*.json")) for record in json.loads(path.read_text())]


class MetricCallback(TrainerCallback):
    """Base of the metric callbacks: subclasses give `name` and `measure`.

    Args:
        every: optimizer steps between two measurements; the start and the end of training are measured as well.
    """

    name: ClassVar[str]

    def __init__(self, every: int) -> None:
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every={every!r}: give a whole number of optimizer steps, 1 or more")
        self.every = every
        self.trainer: Trainer | None = None
        self.failed: str | None = None
        self.records: list[Record] = []
        self.rows: list[dict[str, Any]] = []
        self._measured_at: int | None = None
        self._warned = False

    def measure(self, model: torch.nn.Module, args: TrainingArguments, state: TrainerState) -> Measurement:
        """Measure now. Called on every process; only the main one's result is kept."""
        raise NotImplementedError

    def restore(self, step: int) -> None:
        """Called once when training starts or goes on at `step`; subclasses restore what they carry along."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.records, self.rows, self.failed, self._measured_at = [], [], None, None
        self.folder = metrics_folder(str(args.output_dir))
        if state.is_world_process_zero:
            self._read_back(state.global_step)
        self.restore(state.global_step)
        if state.global_step == 0:
            self._run(args, state, kwargs["model"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self.every == 0:
            self._run(args, state, kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._measured_at != state.global_step:
            self._run(args, state, kwargs["model"])

    def _run(self, args: TrainingArguments, state: TrainerState, model: torch.nn.Module) -> None:
        if self.failed is not None:
            return
        self._measured_at = state.global_step
        try:
            measurement = self.measure(model, args, state)
            if state.is_world_process_zero:
                self.records += measurement.records
                self.rows += measurement.rows
                self._write()
        # a metric must never end somebody's training run: it says why it failed and stays off
        except Exception as error:
            self.failed = f"{type(error).__name__}: {error}"
            logger.warning("%s failed at step %d and is switched off: %s", self.name, state.global_step, self.failed)
            return
        self._log({r.name: r.value for r in measurement.records if r.value is not None}, state)

    def _log(self, values: dict[str, float], state: TrainerState) -> None:
        if not values:
            return
        if self.trainer is not None:
            # logging clears this flag, and the training loss that is due at the same step would not be logged
            due = self.trainer.control.should_log
            self.trainer.log(dict(values))
            self.trainer.control.should_log = due
            return
        state.log_history.append({**values, "epoch": state.epoch, "step": state.global_step})
        if not self._warned and state.is_world_process_zero:
            logger.warning(
                "%s writes its numbers to %s and log_history only; hf_lowrank.attach(trainer, ...) shows them to "
                "TensorBoard, W&B and the like as well",
                type(self).__name__,
                self.folder,
            )
            self._warned = True

    def _read_back(self, step: int) -> None:
        """Keep what an earlier part of this run measured up to `step`; a new run starts with empty files."""
        table, listed = self.folder / f"{self.name}.parquet", self.folder / f"{self.name}.json"
        if step > 0 and table.is_file() and listed.is_file():
            try:
                rows = pd.read_parquet(table)
                records = [Record(**r) for r in json.loads(listed.read_text())]
                self.rows = rows[rows["step"] <= step].to_dict("records")
            # damaged by a disk, a copy or an editor: it costs the earlier numbers, not the run
            except Exception as error:
                logger.warning("%s: earlier measurements cannot be read and are dropped: %s", self.name, error)
            else:
                self.records = [r for r in records if r.step <= step]
                self._measured_at = max((r.step for r in self.records), default=None)
                return
        table.unlink(missing_ok=True)
        listed.unlink(missing_ok=True)

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / f"{self.name}.parquet") as path:
            pd.DataFrame(self.rows).to_parquet(path, index=False)
        records = [metric_entry(**asdict(record)) for record in self.records]
        with replacing(self.folder / f"{self.name}.json") as path:
            path.write_text(json.dumps(records, indent=1) + "\n")


def finite(value: float) -> float | None:
    """None for NaN and infinity, which JSON has no word for."""
    return value if math.isfinite(value) else None
