"""What the metric callbacks share: when they measure, where numbers go, and what happens when one fails.

A metric callback works on any Trainer. Bound by `hf_lowrank.attach` it logs through `Trainer.log`, so that every
reporter sees its numbers; under a bare `add_callback` it writes its files and `state.log_history` alone.

On disk, under `<output_dir>/publish/metrics/`: `<name>.parquet` (one row a subject and step) and `<name>.json` (the
records that go into the report). A resumed run keeps what was measured up to its checkpoint and drops the rest.

All processes measure, each its share of the matrices or sequences; the main one writes.
"""

import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lowrank.families.records import Measurement, Record, metrics_folder, read_measurement, write_measurement
from hf_lowrank.metrics.sequences import EvaluationSet, check_next_token, check_rows
from hf_lowrank.sharding import all_gather_object

__all__ = ["BUDGET", "MetricCallback", "SequenceCallback"]

logger = logging.getLogger(__name__)

# share of the training time that all metric callbacks of a run may take together
BUDGET = 0.02
# seconds that are theirs in any case: a run of minutes would have no metrics otherwise
GRACE = 2.0
# what a language model takes of a batch, and what is kept of it on disk
MODEL_INPUTS = ("input_ids", "labels", "attention_mask", "token_type_ids", "position_ids")


class _Clock:
    """How long a run has taken and how much of that its metrics."""

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
    """All generators that training draws from, as they were."""
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
    """Base of the metric callbacks: subclasses give `name` and `measure`.

    Args:
        every: optimizer steps between two measurements; the start and the end of training are measured as well.
        budget: share of the training time that all metric callbacks of a run may take together, 2 seconds being free;
            a measurement between start and end that does not fit is left out. None for no limit.

    Raises:
        ValueError: `every` below 1, or a budget that is no share.
    """

    name: ClassVar[str]
    # what to do instead of giving two of the same kind
    alternative: ClassVar[str] = "give one of them"

    def __init__(self, every: int, budget: float | None = BUDGET) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every={every!r}: give a whole number of optimizer steps, 1 or more")
        if budget is not None and not (isinstance(budget, int | float) and 0.0 <= budget < math.inf):
            raise ValueError(f"budget={budget!r}: give a share of the training time, 0.02 for 2 %, or None")
        self.every = every
        self.budget = budget
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
        raise NotImplementedError

    def keep(self, found: Measurement) -> None:
        """Write what was found; called on the main process."""
        self.records += found.records
        self.rows += found.rows
        write_measurement(self.folder, self.name, Measurement(self.records, self.rows))

    def restore(self, model: torch.nn.Module, args: TrainingArguments, state: TrainerState) -> None:
        """Called once when training starts or goes on; subclasses restore what they carry along."""

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
        # now and not when training has ended: Trainer may have put the best weights in the place of the last by then
        last = state.global_step == state.max_steps or control.should_training_stop
        if last or (state.global_step % self.every == 0 and self._fits(state)):
            self._run(args, state, kwargs["model"], exempt=last)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._measured_at != state.global_step and not args.load_best_model_at_end:
            self._run(args, state, kwargs["model"], exempt=True)
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

    def _run(self, args: TrainingArguments, state: TrainerState, model: torch.nn.Module, exempt: bool = False) -> None:
        if self.failed is not None:
            return
        started = time.monotonic()
        self._measured_at = state.global_step
        found: list[Measurement] = []

        def measure_and_write() -> None:
            with random_state_kept():
                found.append(self.measure(_bare(model), args, state))
            if state.is_world_process_zero and (found[0].records or found[0].rows):
                self.keep(found[0])

        self._guarded(measure_and_write, state)
        self._cost = time.monotonic() - started
        self._charge(self._cost, exempt)
        if self.failed is None:
            self._log({r.name: r.value for r in found[0].records if r.value is not None}, state)

    def _charge(self, seconds: float, exempt: bool = False) -> None:
        """Count time as this callback's; what has no budget takes none of the others'."""
        if exempt or self.budget is None:
            self._clock.exempt += seconds
        else:
            self._clock.spent += seconds

    def _guarded(self, action: Callable[[], None], state: TrainerState) -> None:
        """Do something that may fail; the callback is then off, on every process, and training goes on."""
        error: str | None = None
        try:
            action()
        # a metric must never end somebody's training run: it says why it failed and stays off
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
                earlier = read_measurement(self.folder, self.name)
            # damaged by a disk, a copy or an editor: it costs the earlier numbers, not the run
            except Exception as error:
                logger.warning("%s: earlier measurements cannot be read and are dropped: %s", self.name, error)
            else:
                if earlier is not None:
                    self.rows = [row for row in earlier.rows if row["step"] <= step]
                    self.records = [r for r in earlier.records if r.step <= step]
                    self._measured_at = max((r.step for r in self.records), default=None)
                    return
        for suffix in (".parquet", ".json"):
            (self.folder / f"{self.name}{suffix}").unlink(missing_ok=True)


class SequenceCallback(MetricCallback):
    """Base of the callbacks that measure on sequences.

    Args:
        dataset: tokenized rows, such as a Trainer's `eval_dataset`; bound by `attach`, the Trainer's collator makes
            batches of them.
        every, budget: as for every metric callback.
        sequences: how many of them, spread evenly.
    """

    # whether the loss of the next token is measured, which not every model has
    on_loss: ClassVar[bool] = True

    def __init__(self, dataset: Any, every: int, budget: float | None = BUDGET, sequences: int = 32) -> None:
        super().__init__(every, budget)
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
            self._evaluation = self._made(trainer.args, collator)
            (check_next_token if self.on_loss else check_rows)(model, self._evaluation.rows)

    def evaluation(self, args: TrainingArguments) -> EvaluationSet:
        """The sequences, the same for the whole run."""
        if self._evaluation is None:
            self._evaluation = self._made(args, None)
        return self._evaluation

    def _made(self, args: TrainingArguments, collator: Any) -> EvaluationSet:
        return EvaluationSet.from_dataset(
            self.dataset, self.sequences, args.per_device_eval_batch_size, collator, shared=args.world_size > 1
        )


def output_folder(args: TrainingArguments) -> Path:
    """The run's folder."""
    return Path(str(args.output_dir))
