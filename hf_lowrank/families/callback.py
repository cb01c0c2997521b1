"""What the metric callbacks share: when they measure, where numbers go, and what happens when one fails.

A metric callback works on any Trainer. Bound by `hf_lowrank.attach` it logs through `Trainer.log`, so that every
reporter sees its numbers; under a bare `add_callback` it writes its files and `state.log_history` alone.

Its files are those of records.py. A resumed run keeps what was measured up to its checkpoint and drops the rest.

All processes measure, each its share of the matrices or sequences; the main one writes.
"""

import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lowrank.families.best import best_model, state_at
from hf_lowrank.families.family import Context, Family
from hf_lowrank.families.records import (
    Measurement,
    Record,
    metrics_folder,
    read_measurement,
    remove_measurement,
    write_measurement,
)
from hf_lowrank.families.spaces import SPACES, spaces_of
from hf_lowrank.metrics.sequences import EvaluationSet, check_next_token, check_rows
from hf_lowrank.report.model import Report
from hf_lowrank.sharding import all_gather_object

__all__ = ["BUDGET", "MetricCallback", "SequenceCallback"]

logger = logging.getLogger(__name__)

# share of the training time that all metric callbacks of a run may take together
BUDGET = 0.02
# seconds that they may take in any case: a run of minutes would have no metrics otherwise
GRACE = 2.0
# what a language model takes of a batch, and what is kept of it on disk
MODEL_INPUTS = ("input_ids", "labels", "attention_mask", "token_type_ids", "position_ids")


class _Clock:
    """How long a run has taken, and how much of that time its metrics took."""

    def __init__(self, state: TrainerState) -> None:
        self.started, self.spent, self.exempt = time.monotonic(), 0.0, 0.0
        self.state = state
        self.members: dict[str, MetricCallback] = {}

    def training(self) -> float:
        """Seconds of training alone."""
        return time.monotonic() - self.started - self.spent - self.exempt


# by output folder: the callbacks of one run, which know nothing of each other, share a budget
_clocks: dict[str, _Clock] = {}


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave all random generators that training draws from as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _bare(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside DDP's or torch.compile's wrapper."""
    for wrapper in ("module", "_orig_mod"):
        inner = getattr(model, wrapper, None)
        model = inner if isinstance(inner, torch.nn.Module) else model
    return model


class MetricCallback(TrainerCallback):
    """Base of the metric callbacks: subclasses name their `family`, or give `name` and `measure`.

    Args:
        every: optimizer steps between two measurements; the start and the end of training are measured as well.
        budget: share of the training time that all metric callbacks of a run may take together, 2 seconds being free;
            a measurement between start and end that does not fit is left out. None for no limit.
        settings: the family's; None for its defaults.
        space: of the weights: `native`, as trained, `dense`, the matrices they compute, or `both`.

    Raises:
        ValueError: `every` below 1, a budget that is no share, or another space.
    """

    family: ClassVar[type[Family] | None] = None
    name: ClassVar[str]
    # what to do instead of giving two of the same kind
    alternative: ClassVar[str] = "give one of them"
    # the report of the run that this one is compared with
    baseline_report: Report | None = None
    # where that run keeps its metrics
    baseline_metrics: tuple[Path, ...] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.family is not None:
            cls.name = cls.family.entry.name

    def __init__(
        self, every: int, budget: float | None = BUDGET, *, settings: Any = None, space: str = "native"
    ) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every={every!r}: give a whole number of optimizer steps, 1 or more")
        if budget is not None and not (isinstance(budget, int | float) and 0.0 <= budget < math.inf):
            raise ValueError(f"budget={budget!r}: give a share of the training time, 0.02 for 2 %, or None")
        if space not in SPACES:
            raise ValueError(f"space={space!r}: it is {', '.join(map(repr, SPACES))}")
        self.every = every
        self.budget = budget
        self.settings = self.family.Settings() if settings is None and self.family is not None else settings
        self.space = space
        self.trainer: Trainer | None = None
        self.failed: str | None = None
        self.skipped = 0
        self.records: list[Record] = []
        self.rows: list[dict[str, Any]] = []
        self._measured_at: int | None = None
        self._cost = 0.0
        self._warned = False
        self._clock = _Clock(TrainerState())

    def bind(self, trainer: Trainer) -> None:
        """Log through a Trainer; called by `hf_lowrank.attach` before training.

        Raises:
            ValueError: the callback cannot measure what this Trainer trains.
        """
        self.trainer = trainer

    def measure(self, model: torch.nn.Module, args: TrainingArguments, state: TrainerState) -> Measurement:
        """Measure now. Called on every process; only the main one's result is kept."""
        return self.measure_at(self.context(model, args, state))

    def context(self, model: torch.nn.Module, args: TrainingArguments, state: TrainerState, **more: Any) -> Context:
        """What the family measures; `more` are further fields, such as the models to compare with."""
        return Context(model, state.global_step, self.settings, shared=args.world_size > 1, **more)

    def measure_at(self, at: Context) -> Measurement:
        """Measure in every space that was asked for."""
        assert self.family is not None
        measured = Measurement()
        for space in self.spaces(at.model):
            measured += self.family().measure(replace(at, space=space))
        return measured

    def spaces(self, model: torch.nn.Module) -> tuple[str, ...]:
        """The spaces to measure in."""
        return spaces_of(model, self.space)

    @property
    def file(self) -> str:
        """Stem of the files that it writes."""
        return self.name if self.family is None else self.family.entry.file

    def keep(self, measured: Measurement) -> None:
        """Write a measurement; called on the main process."""
        self.records += measured.records
        self.rows += measured.rows
        # the best model is measured last
        self.records.sort(key=lambda record: record.step)
        self.rows.sort(key=lambda row: int(row["step"]))
        write_measurement(self.folder, self.file, Measurement(self.records, self.rows))

    def holds(self, step: int) -> bool:
        """Whether something was measured at a step; asked on the main process."""
        return any(record.step == step for record in self.records)

    def restore(self, model: torch.nn.Module, args: TrainingArguments, state: TrainerState) -> None:
        """Called once when training starts or is resumed; subclasses restore what they carry along."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.records, self.rows, self.failed, self._measured_at = [], [], None, None
        self.skipped, self._cost = 0, 0.0
        self.folder = metrics_folder(str(args.output_dir))
        self._join_clock(str(args.output_dir), state)
        if state.is_world_process_zero:
            self._read_back(state.global_step)
        self._measured_at = all_gather_object(self._measured_at)[0]
        self._guarded(lambda: self._restore(_bare(kwargs["model"]), args, state), state)
        if state.global_step == 0:
            self._first(args, state, kwargs["model"])

    def _restore(self, model: torch.nn.Module, args: TrainingArguments, state: TrainerState) -> None:
        if self._clock.members.setdefault(self.name, self) is not self:
            raise ValueError(f"two {type(self).__name__} write the same files: {self.alternative}")
        self.restore(model, args, state)

    def _first(self, args: TrainingArguments, state: TrainerState, model: torch.nn.Module) -> None:
        self._run(args, state, model, exempt=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # not at the end of training: Trainer may have replaced the last weights by the best ones by then
        last = state.global_step == state.max_steps or control.should_training_stop
        if last or (state.global_step % self.every == 0 and self._fits(state)):
            self._run(args, state, kwargs["model"], exempt=last)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        best = best_model(args, state)
        if best is None:
            if self._measured_at != state.global_step:
                self._run(args, state, kwargs["model"], exempt=True)
        elif not all_gather_object(self.holds(best.step))[0]:
            # the log is at a later step
            self._run(args, state_at(state, best.step), kwargs["model"], exempt=True, log=False)
        _clocks.pop(str(args.output_dir), None)

    def _join_clock(self, output_dir: str, state: TrainerState) -> None:
        """Share a clock with the callbacks that follow the same Trainer through the same run."""
        clock = _clocks.get(output_dir)
        if clock is None or clock.state is not state or clock is self._clock:
            clock = _clocks[output_dir] = _Clock(state)
        self._clock = clock

    def _fits(self, state: TrainerState) -> bool:
        """Whether another measurement fits into the budget; the main process decides for all."""
        if self.failed is not None:
            return False
        if self.budget is None:
            return True
        allowed = GRACE + self.budget * self._clock.training()
        fits = all_gather_object(self._clock.spent + self._cost <= allowed)[0]
        if not fits:
            if self.skipped == 0 and state.is_world_process_zero:
                takes = f"one measurement takes {self._cost:.2g} s and " if self._cost > 0 else ""
                logger.warning(
                    "%s at step %d: %sall metrics together may take %g %% of the training time, so some are left out; "
                    "raise budget= or every= to choose which",
                    self.name, state.global_step, takes, 100 * self.budget,
                )  # fmt: skip
            self.skipped += 1
        return fits

    def _run(
        self,
        args: TrainingArguments,
        state: TrainerState,
        model: torch.nn.Module,
        exempt: bool = False,
        log: bool = True,
    ) -> None:
        if self.failed is not None:
            return
        started = time.monotonic()
        self._measured_at = state.global_step
        measured = Measurement()

        def measure_and_write() -> None:
            nonlocal measured
            with random_state_kept():
                measured = self.measure(_bare(model), args, state)
            if state.is_world_process_zero and (measured.records or measured.rows):
                self.keep(measured)

        self._guarded(measure_and_write, state)
        self._cost = time.monotonic() - started
        self._charge(self._cost, exempt)
        if self.failed is None and log:
            self._log({r.name: r.value for r in measured.records if r.value is not None}, state)

    def _charge(self, seconds: float, exempt: bool = False) -> None:
        """Count time as spent on metrics; a callback without a budget takes nothing from the others' budget."""
        if exempt or self.budget is None:
            self._clock.exempt += seconds
        else:
            self._clock.spent += seconds

    def _guarded(self, action: Callable[[], None], state: TrainerState) -> None:
        """Do something that may fail: the callback is then switched off on every process, and training continues."""
        error: str | None = None
        try:
            action()
        # a metric must never end somebody's training run
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        errors = [other for other in all_gather_object(error) if other is not None]
        if errors:
            self.failed = error or errors[0]
            if state.is_world_process_zero:
                logger.warning(
                    "%s failed at step %d and is switched off: %s", self.name, state.global_step, self.failed
                )

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
        if step > 0:
            try:
                earlier = read_measurement(self.folder, self.file)
            # damaged by a disk, a copy or an editor: it costs the earlier numbers, not the run
            except Exception as error:
                logger.warning("%s: earlier measurements cannot be read and are dropped: %s", self.name, error)
            else:
                if earlier is not None:
                    self.rows = [row for row in earlier.rows if row["step"] <= step]
                    self.records = [r for r in earlier.records if r.step <= step]
                    self._measured_at = max((r.step for r in self.records), default=None)
                    return
        remove_measurement(self.folder, self.file)


class SequenceCallback(MetricCallback):
    """Base of the callbacks that measure on sequences.

    Args:
        dataset: tokenized rows, such as a Trainer's `eval_dataset`; bound by `attach`, the Trainer's collator makes
            batches of them.
        every, budget, settings, space: as for every metric callback.
        sequences: how many of them, spread evenly.
    """

    def __init__(
        self, dataset: Any, every: int, budget: float | None = BUDGET, sequences: int = 32, **more: Any
    ) -> None:
        super().__init__(every, budget, **more)
        if not isinstance(sequences, int) or sequences < 1:
            raise ValueError(f"sequences={sequences!r}: give a whole number of 1 or more")
        self.dataset = dataset
        self.sequences = sequences
        self._evaluation: EvaluationSet | None = None

    def bind(self, trainer: Trainer) -> None:
        super().bind(trainer)
        model = trainer.accelerator.unwrap_model(trainer.model)
        with random_state_kept():
            # what Trainer's own loop hands to the collator
            collator = trainer._get_collator_with_removed_columns(trainer.data_collator)
            self._evaluation = self._evaluation_set(trainer.args, collator)
            on_loss = self.family is None or self.family.on_loss
            (check_next_token if on_loss else check_rows)(model, self._evaluation.rows)

    def evaluation(self, args: TrainingArguments) -> EvaluationSet:
        """The sequences, the same for the whole run."""
        if self._evaluation is None:
            self._evaluation = self._evaluation_set(args, None)
        return self._evaluation

    def context(self, model: torch.nn.Module, args: TrainingArguments, state: TrainerState, **more: Any) -> Context:
        return super().context(model, args, state, sequences=self.evaluation(args), **more)

    def _evaluation_set(self, args: TrainingArguments, collator: Any) -> EvaluationSet:
        return EvaluationSet.from_dataset(
            self.dataset, self.sequences, args.per_device_eval_batch_size, collator, shared=args.world_size > 1
        )
