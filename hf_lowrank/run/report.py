"""The report of a run, written as it goes: facts, metrics, figures, card and weights under `publish/`."""

import logging
import shlex
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from huggingface_hub import CommitInfo
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_lowrank.checkpoints import export, gather_model
from hf_lowrank.downstream.results import (
    EVALUATIONS,
    evaluation_entries,
    forget_evaluations,
    read_evaluations,
)
from hf_lowrank.families.best import BestModel, best_model
from hf_lowrank.families.callback import MODEL_INPUTS, MetricCallback, random_state_kept
from hf_lowrank.families.loss import loss_records, over_sequences
from hf_lowrank.families.records import (
    EVALUATION,
    Measurement,
    Record,
    forget,
    metrics_folder,
    read_measurement,
    read_records,
    write_measurement,
)
from hf_lowrank.figures import draw_figures
from hf_lowrank.hub.background import PushQueue
from hf_lowrank.hub.card import set_card_aside, update_card
from hf_lowrank.hub.network import describe_error
from hf_lowrank.hub.push import push
from hf_lowrank.metrics.perturb import evaluating
from hf_lowrank.metrics.sequences import (
    IGNORED,
    EvaluationSet,
    check_next_token,
    evaluation_settings,
    predicts_next_token,
    row_ids,
    sequence_losses,
    unpacked,
)
from hf_lowrank.model_config import remove_model
from hf_lowrank.report.baseline import baseline_of, differences_to_baseline
from hf_lowrank.report.catalogue import LOSS
from hf_lowrank.report.evidence import Kept
from hf_lowrank.report.files import atomic_path
from hf_lowrank.report.io import ReportError, read_report, up_to, write_report
from hf_lowrank.report.model import SCHEMA_VERSION
from hf_lowrank.report.samples import Samples
from hf_lowrank.run.console import print_summary
from hf_lowrank.run.facts import RunInfo, run_facts
from hf_lowrank.run.speed import SpeedCallback
from hf_lowrank.run.tracking import close_trackers_last, log_figures

__all__ = ["ReportCallback"]

logger = logging.getLogger(__name__)

# rows of the validation set that are kept, spread evenly
KEPT_ROWS = 1000
LOGGED = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm")


class ReportCallback(TrainerCallback):
    """Writes `publish/` and pushes it; `hf_lowrank.attach` adds it behind the metric callbacks.

    Report and training curve are written at every save; figures, card and weights at the end and before a push. Pushes
    go on beside the training, from copies of `publish/`, in order and one at a time; its end waits for them. A push
    that fails is logged with the command that repeats it, and tried again at the next save and at the end; it never
    ends the training run.

    Args:
        trainer: the Trainer it is attached to.
        info: what Trainer does not know about the run.
        push_strategy: Trainer's `hub_strategy`, or None when nothing is pushed.
        speed: measures how fast it trains.
        figures: whether the figures go to Trainer's trackers at the end.
    """

    def __init__(
        self, trainer: Trainer, info: RunInfo, push_strategy: str | None, speed: SpeedCallback, figures: bool = False
    ) -> None:
        self.trainer = trainer
        self.info = info
        self.speed, self.figures = speed, figures
        self.push_strategy = push_strategy
        self.pushes = PushQueue(self.try_push)
        self._earlier_seconds = 0.0
        self._started = time.monotonic()
        # facts that stay as they were when training ended, however often the report is written afterwards
        self._ended: dict[str, Any] = {}
        self._training = False
        # the model that Trainer has loaded at the end, where that is the best one
        self._best: BestModel | None = None
        # whether the report in the folder may be of an earlier run
        self._foreign = True

    @property
    def publish(self) -> Path:
        """The folder that others get."""
        return Path(str(self.trainer.args.output_dir)) / "publish"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Trainer may have put restored copies in the callbacks' place since they were attached
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, MetricCallback):
                callback.trainer = self.trainer
        close_trackers_last(self.trainer)
        self._started, self._ended, self._foreign = time.monotonic(), {}, state.global_step == 0
        self._training, self._best = True, None
        self._earlier_seconds = self._seconds_before() if state.global_step > 0 else 0.0
        if state.is_world_process_zero:
            self.pushes.clear(self.publish.parent)
            self._forget_after(state.global_step)
            if state.global_step == 0:
                set_card_aside(self.publish)
            self._keep_evaluation()

    def _seconds_before(self) -> float:
        try:
            return read_report(self.publish).run.wall_time_seconds or 0.0
        except (ReportError, FileNotFoundError):
            return 0.0

    def _forget_after(self, step: int) -> None:
        """Remove what an earlier run left in this folder, and what was measured beyond the checkpoint."""
        # metric callbacks look after their own files
        theirs = {c.file for c in self.trainer.callback_handler.callbacks if isinstance(c, MetricCallback)}
        folder = metrics_folder(str(self.trainer.args.output_dir))
        for path in list(folder.glob("*.*")):
            # up to the first dot: samples are in `<file>.samples.parquet`
            name = path.name.partition(".")[0]
            if name not in theirs and step == 0:
                path.unlink()
            elif path.name == EVALUATIONS:
                forget_evaluations(folder, step)
            elif name not in theirs and path.suffix == ".json":
                forget(folder, name, lambda measured_at: measured_at > step)

    def _keep_evaluation(self) -> None:
        """Write what is validated on beside the checkpoints, so that they can be measured on the same rows later."""
        dataset: Any = self.trainer.eval_dataset
        path = Path(str(self.trainer.args.output_dir)) / EVALUATION
        path.unlink(missing_ok=True)
        if isinstance(dataset, dict) or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            return
        try:
            # as the collator makes them: the labels may be its work, and rows may hold several sequences
            with random_state_kept():
                made = EvaluationSet.from_dataset(dataset, KEPT_ROWS, collator=self._collator())
            rows = {key: list(value.numpy()) for key, value in made.rows.items() if key in MODEL_INPUTS}
            with atomic_path(path) as temporary:
                pd.DataFrame(rows).to_parquet(temporary, index=False)
        # somebody's own data set: it can be named when the run is measured
        except Exception as error:
            level = logging.WARNING if predicts_next_token(self._bare_model()) else logging.INFO
            logger.log(level, "the validation rows are not kept for measuring checkpoints later: %s", error)

    def _collator(self) -> Any:
        """What makes Trainer's batches, without the columns that it leaves out."""
        return self.trainer._get_collator_with_removed_columns(self.trainer.data_collator)

    def _bare_model(self) -> torch.nn.Module:
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        pushes = self.push_strategy not in (None, "end")
        try:
            model = self.whole_model() if pushes else None
            if state.is_world_process_zero:
                self.write_report()
                if pushes:
                    self.write_all(model)
        # the report is written again at the end, and there it does raise
        except Exception as error:
            logger.warning("the report of step %d could not be written: %s", state.global_step, error)
            return
        if pushes and state.is_world_process_zero:
            try:
                self.pushes.add(self.publish, f"step {state.global_step}")
            except OSError as error:
                self._say_failed(error)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._training = False
        self._best = best_model(args, state)
        try:
            records = self._validation_records()
        # like any metric, this one must never end somebody's run
        except Exception as error:
            logger.warning("validation loss and perplexity could not be measured: %s", error)
            records = []
        model = self.whole_model()
        if not state.is_world_process_zero:
            return
        if records:
            self._write_records(records)
        self.write_all(model)
        report = read_report(self.publish)
        self._ended = {key: report.run[key] for key in ("wall_time_seconds", "peak_memory_bytes", "date")}
        if self.figures:
            log_figures(self.trainer, report, self.publish)
        if self.push_strategy is not None:
            self.pushes.finish(self.publish, "end of training")
        try:
            print_summary(report, self.publish)
        # a terminal may be unable to show a name, and what is done is done
        except Exception as error:
            logger.warning("the summary of the run could not be printed: %s", error)

    def _validation_loss(self) -> tuple[Samples, dict[str, Any]] | None:
        """Losses of the validation rows and the settings they depend on; every process evaluates its share."""
        trainer, model = self.trainer, self._bare_model()
        dataset: Any = trainer.eval_dataset
        if dataset is None or isinstance(dataset, dict):
            return None
        if not hasattr(model, "can_generate") or not predicts_next_token(model):
            return None
        with random_state_kept():
            some = self._collator()(list(islice(dataset, 2)))
        if "input_ids" in some and unpacked(some) is not some:
            # several sequences in a row: they are dealt to the processes one by one
            size, shared = trainer.args.per_device_eval_batch_size, trainer.args.world_size > 1
            sequences = EvaluationSet.from_dataset(dataset, None, size, self._collator(), shared)
            with evaluating(model):
                return over_sequences(*sequences.losses(model), sequences.units()), sequences.settings()
        wrapped: Any = trainer.model
        losses, tokens, rows = [], [], []
        with evaluating(wrapped):
            for batch in trainer.get_eval_dataloader():
                if "labels" not in batch or "input_ids" not in batch:
                    return None
                inputs = trainer._prepare_inputs(dict(batch))
                check_next_token(model, inputs)
                with trainer.compute_loss_context_manager():
                    measured = sequence_losses(wrapped, inputs)
                # processes pad their batches each to its own longest row
                padded = [
                    trainer.accelerator.pad_across_processes(inputs[key], dim=1, pad_index=pad)
                    for key, pad in (("input_ids", 0), ("labels", IGNORED))
                ]
                gathered = trainer.accelerator.gather_for_metrics((*measured, *padded))
                sums, counts, ids, labels = (part.cpu() for part in gathered)
                losses.append(sums)
                tokens.append(counts)
                rows.append((ids, labels))
        return over_sequences(torch.cat(losses), torch.cat(tokens), row_ids(rows)), evaluation_settings(rows)

    @property
    def _step(self) -> int:
        """The step of the Trainer's model."""
        return self.trainer.state.global_step if self._best is None else self._best.step

    def _validation_records(self) -> list[Record]:
        """Validation loss and perplexity with standard errors."""
        measured = self._validation_loss()
        if measured is None:
            return []
        loss, settings = measured
        return loss_records(loss, self._step, settings)

    def _write_records(self, records: list[Record]) -> None:
        folder, name = self.publish / "metrics", LOSS.file
        step = self._step
        # what was measured of earlier checkpoints stays
        forget(folder, name, lambda measured_at: measured_at == step)
        earlier = read_measurement(folder, name)
        write_measurement(folder, name, (earlier or Measurement()) + Measurement(records))

    def write_report(self) -> None:
        """Write report.json and the training curve for the state the Trainer is in."""
        seconds = self._earlier_seconds + time.monotonic() - self._started
        folder = metrics_folder(str(self.trainer.args.output_dir))
        curve = pd.DataFrame(self.trainer.state.log_history).reindex(columns=list(LOGGED))
        curve = curve.groupby("step", as_index=False).first()
        with atomic_path(folder / "training.parquet") as path:
            curve.to_parquet(path, index=False)
        run = run_facts(self.trainer, self.info, seconds, self._best) | {"speed": self.speed.facts()} | self._ended
        if self._training and run["steps"] < run["max_steps"]:
            run["checkpoint_of"] = {"steps": None}
        last_step = None if self._best is None else self._best.step
        report = {
            "schema_version": SCHEMA_VERSION,
            "run": run,
            "data": self.info.data,
            "metrics": up_to(last_step, read_records(folder)),
            "evaluations": up_to(last_step, evaluation_entries(read_evaluations(folder) or [])),
        }
        self._add_baseline(report, folder)
        write_report(report, self.publish / "report.json")
        self._foreign = False

    def _add_baseline(self, report: dict[str, Any], metrics: Path) -> None:
        """Add what is known of the run that this one is compared with, here or by `hf-lowrank measure`."""
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, MetricCallback) and callback.baseline_report is not None:
                report["baseline"] = baseline_of(callback.baseline_report)
                kept = Kept.read(metrics), Kept.read(*callback.baseline_metrics)
                report["baseline"]["differences"] = differences_to_baseline(report, *kept)
                return
        try:
            earlier = None if self._foreign else read_report(self.publish).baseline
        except (ReportError, FileNotFoundError):
            return
        if earlier is not None:
            report["baseline"] = earlier

    def whole_model(self) -> torch.nn.Module | None:
        """The model on the main process, None on the others; all call this, since its weights may be sharded."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model, keep_torch_compile=False)
        if isinstance(model, PreTrainedModel):
            return gather_model(model, keep=self.trainer.is_world_process_zero())
        return model

    def write_all(self, model: torch.nn.Module | None, repo_id: str | None = None) -> None:
        """Write everything that is published: report, weights of the whole model, figures, card."""
        self.write_report()
        if isinstance(model, PreTrainedModel):
            export(model, self.publish, self.trainer.processing_class)
        else:
            logger.warning("%s is no PreTrainedModel: its weights are not published", type(model).__name__)
            remove_model(self.publish)
        draw_figures(self.publish)
        update_card(self.publish, repo_id=repo_id or self._repo_id())

    def _repo_id(self) -> str | None:
        return self.trainer.hub_model_id or self.trainer.args.hub_model_id

    def try_push(self, folder: Path, commit_message: str) -> bool:
        """Push a publish folder; a failure is logged with the command that does it again."""
        try:
            self._push(folder, commit_message)
        # whatever the network or the Hub does, the training run goes on
        except Exception as error:
            self._say_failed(error)
            return False
        return True

    def _say_failed(self, error: Exception) -> None:
        args = self.trainer.args
        again = ["hf-lowrank", "push", str(args.output_dir), "--repo-id", self._repo_name()]
        again += ["--revision", args.hub_revision] if args.hub_revision else []
        if args.hub_private_repo is not None:
            again += ["--private" if args.hub_private_repo else "--no-private"]
        again += ["--checkpoints"] if self.push_strategy not in (None, "end") else []
        why = describe_error(error, args.hub_token) or type(error).__name__
        logger.warning("push to %s failed (%s): it is repeated by %s", self._repo_name(), why, shlex.join(again))

    def _repo_name(self) -> str:
        return self._repo_id() or Path(str(self.trainer.args.output_dir)).resolve().name

    def push(
        self, commit_message: str | None = None, revision: str | None = None, private: bool | None = None,
        token: str | None = None,
    ) -> CommitInfo:  # fmt: skip
        """Push `publish/`, tagged with the step of its report."""
        self.pushes.wait()
        return self._push(self.publish, commit_message, revision, private, token)

    def _push(
        self, folder: Path, commit_message: str | None, revision: str | None = None, private: bool | None = None,
        token: str | None = None,
    ) -> CommitInfo:  # fmt: skip
        args = self.trainer.args
        return push(
            folder,
            self._repo_name(),
            revision=revision or args.hub_revision,
            private=args.hub_private_repo if private is None else private,
            token=token or args.hub_token,
            commit_message=commit_message,
            # at the end, tags that are missing come from the checkpoints that were kept
            checkpoints=folder == self.publish and self.push_strategy not in (None, "end"),
        )
