"""Downstream tasks during training."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_lowrank.downstream.results import (
    evaluation_entries,
    forget_evaluations,
    read_evaluations,
    replace_evaluations,
    write_evaluations,
)
from hf_lowrank.families.callback import BUDGET, MetricCallback
from hf_lowrank.families.records import Measurement, Record
from hf_lowrank.families.spaces import unsharded
from hf_lowrank.sharding import all_gather_object, raise_together, rank_and_world

__all__ = ["EvaluationCallback"]


class EvaluationCallback(MetricCallback):
    """Accuracy and the like on tasks of lm-evaluation-harness.

    The model answers as it is trained, in its native form. The numbers are logged as `eval_<task>/<metric>` and stand
    in the report's `evaluations`, where `hf-lowrank evaluate` puts its own. With several processes each takes some of
    the tasks, on a model that FSDP2 shards after it was gathered.

    Args:
        tasks: names of tasks, groups and tags, wildcards, or a suite of `hf-lowrank evaluate`.
        every: optimizer steps between two evaluations; the end of training is evaluated as well.
        limit: the first so many items of each task, or a share below 1; None for all.
        num_fewshot: examples in the prompt; None for each task's own number.
        batch_size: requests in a forward pass; None for the Trainer's evaluation batch.
        include_path: folder of tasks, or several.
        tokenizer: None for the Trainer's `processing_class`.
        log_items: whether results by item are kept with prompt, target and answer.
        budget: share of the training time for all metric callbacks together; None for no limit.

    Raises:
        ValueError: a task is not known or its data cannot be had, or a number makes no sense.
    """

    name: ClassVar[str] = "downstream"

    def __init__(
        self,
        tasks: str | Sequence[str] = "quick",
        every: int = 1000,
        *,
        limit: float | None = None,
        num_fewshot: int | None = None,
        batch_size: int | None = None,
        include_path: str | Path | Sequence[str | Path] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
        log_items: bool = False,
        budget: float | None = BUDGET,
    ) -> None:
        super().__init__(every, budget)
        # the harness is slow to import, and only who evaluates needs it
        from hf_lowrank.downstream.request import checked_limit, load_requests

        for what, number, least in (("num_fewshot", num_fewshot, 0), ("batch_size", batch_size, 1)):
            if number is not None and number < least:
                raise ValueError(f"{what}={number}: give {least} or more")
        words = tasks.split(",") if isinstance(tasks, str) else list(tasks)
        folders = [include_path] if isinstance(include_path, str | Path) else include_path
        self.limit = checked_limit(limit)
        self.num_fewshot = num_fewshot
        self.batch_size = batch_size
        self.tokenizer = tokenizer
        self.log_items = log_items
        self._loaded = [
            (loaded, self._with_own(settings))
            for loaded, settings in load_requests(words, tuple(Path(folder) for folder in folders))
        ]

    def bind(self, trainer: Trainer) -> None:
        super().bind(trainer)
        given = trainer.processing_class
        if self.tokenizer is None and isinstance(given, PreTrainedTokenizerBase):
            self.tokenizer = given
        if self.tokenizer is None:
            raise ValueError(
                "EvaluationCallback has no tokenizer: give the Trainer a processing_class, or the callback a tokenizer"
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.tokenizer = self.tokenizer or kwargs.get("processing_class")
        super().on_train_begin(args, state, control, **kwargs)

    def restore(self, model: torch.nn.Module, args: TrainingArguments, state: TrainerState) -> None:
        if self.tokenizer is None:
            raise ValueError("there is no tokenizer: give the callback one, or the Trainer a processing_class")

    def _first(self, args: TrainingArguments, state: TrainerState, model: torch.nn.Module) -> None:
        """A model that has learnt nothing answers by chance."""

    def measure(self, model: torch.nn.Module, args: TrainingArguments, state: TrainerState) -> Measurement:
        if not hasattr(model, "config"):
            raise ValueError(f"{type(model).__name__} is no transformers model: the harness cannot ask it")
        whole = unsharded(model)
        training = [module for module in whole.modules() if module.training]
        try:
            mine = raise_together(lambda: self._evaluate(whole, args, state), shared=rank_and_world()[1] > 1)
        finally:
            # not train(), which would switch modules that were not training
            for module in training:
                module.training = True
        rows = [row for of_process in all_gather_object(mine) for row in of_process]
        order = [name for loaded, _ in self._loaded for name in loaded.tasks]
        rows.sort(key=lambda row: order.index(row["task"]))
        rows += [row for loaded, settings in self._loaded for row in _of_groups(loaded, rows, settings, state)]
        records = [
            Record(f"eval_{entry['task']}/{entry['metric']}", entry["value"], entry["stderr"], state.global_step)
            for entry in evaluation_entries(rows)
        ]
        return Measurement(records, rows)

    def _evaluate(self, model: Any, args: TrainingArguments, state: TrainerState) -> list[dict[str, Any]]:
        """The rows of this process's share of the tasks."""
        from hf_lowrank.downstream.harness import evaluate_task, quiet
        from hf_lowrank.downstream.model import LowRankLM, model_facts

        # a pool of processes for standard errors would be forked from a process that trains
        os.environ.setdefault("DISABLE_MULTIPROC", "1")
        rank, world = rank_and_world()
        tasks = [(task, settings) for loaded, settings in self._loaded for task in loaded.tasks.values()]
        with quiet():
            size = self.batch_size or args.per_device_eval_batch_size
            language_model = LowRankLM(model, self.tokenizer, batch_size=size)
            rows, facts = [], model_facts(model)
            for task, settings in tasks[rank::world]:
                rows += evaluate_task(language_model, task, settings, step=state.global_step, about=facts)
        return [{**row, "fingerprint": None, "weights": None} for row in rows]

    def _with_own(self, settings: Any) -> Any:
        """A suite's settings, with what was asked for here; the harness's own seeds."""
        shots = settings.num_fewshot if self.num_fewshot is None else self.num_fewshot
        return replace(settings, num_fewshot=shots, limit=self.limit, seed=None, log_items=self.log_items)

    def keep(self, found: Measurement) -> None:
        rows = read_evaluations(self.folder) or []
        write_evaluations(self.folder, replace_evaluations(rows, found.rows))

    def holds(self, step: int) -> bool:
        return any(row["step"] == step for row in read_evaluations(self.folder) or [])

    def _read_back(self, step: int) -> None:
        """Keep what was evaluated up to `step`; a new run starts without a file."""
        forget_evaluations(self.folder, step if step > 0 else -1)
        self._measured_at = max((row["step"] or 0 for row in read_evaluations(self.folder) or []), default=None)


def _of_groups(loaded: Any, rows: list[dict[str, Any]], settings: Any, state: TrainerState) -> list[dict[str, Any]]:
    from hf_lowrank.downstream.harness import evaluate_group

    found = [row for group in loaded.groups for row in evaluate_group(group, rows, settings, state.global_step)]
    return [{**row, "fingerprint": None, "weights": None} for row in found]
