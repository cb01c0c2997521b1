"""Activations against a baseline's on the same tokens (H14 to H16)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerState, TrainingArguments

from hf_lowrank.checkpoints import check_same_size, list_checkpoints, load_model
from hf_lowrank.families.callback import BUDGET, SequenceCallback
from hf_lowrank.families.records import Measurement, record
from hf_lowrank.hub.fetch import fetch
from hf_lowrank.metrics.activations import SIMILARITIES, compare_activations
from hf_lowrank.metrics.perturb import evaluating
from hf_lowrank.metrics.sequences import EvaluationSet
from hf_lowrank.report import Report, read_report
from hf_lowrank.sharding import raise_together

__all__ = ["ActivationCallback", "measure_activations"]


def measure_activations(
    model: nn.Module,
    baseline: nn.Module,
    evaluation: EvaluationSet,
    step: int,
    baseline_name: str,
    baseline_step: int | None,
    progress: Callable[[], Any] = lambda: None,
) -> Measurement:
    """Relative L2, cosine and CKA, plain and debiased, layer by layer and averaged over layers.

    Raises:
        ValueError: the baseline is of another size, or one of the models gives no hidden states.
    """
    with evaluating(model), evaluating(baseline):
        mean, layers = compare_activations(model, baseline, evaluation, progress=progress)
    noted = {
        "baseline": baseline_name,
        "baseline_step": baseline_step,
        "average": "mean over layers, embeddings included",
        "layers": len(layers),
        **evaluation.settings(),
        "stderr": "jackknife over groups of sequences",
    }
    records = [record(f"activation/{name}", getattr(mean, name), step, noted) for name in SIMILARITIES]
    rows: list[dict[str, Any]] = []
    for layer, similarity in enumerate(layers):
        row: dict[str, Any] = {"step": step, "layer": layer, "baseline": baseline_name}
        row["baseline_step"] = -1 if baseline_step is None else baseline_step
        for name in SIMILARITIES:
            estimate = getattr(similarity, name)
            row |= {f"activation/{name}": estimate.value, f"activation/{name}_stderr": estimate.stderr}
        rows.append(row)
    return Measurement(records, rows)


class ActivationCallback(SequenceCallback):
    """Relative L2 distance, cosine and CKA of every layer's hidden states to those of a baseline on the same tokens.

    Args:
        dataset: tokenized rows, such as a Trainer's `eval_dataset`.
        baseline: a full-rank model of the same size and tokenizer: a Hub repo (`user/name`, `user/name@step-1000`), a
            published folder, a checkpoint, a run's folder (its checkpoint of the same step where there is one, else
            what it published), or a model.
        every: optimizer steps between two measurements; the start and the end of training are measured as well.
        sequences: how many rows of the data set, spread evenly.
        budget: share of the training time for all metric callbacks together; None for no limit.

    Attributes:
        baseline_report: the baseline's report, None where it has none.

    Raises:
        ValueError: there is no such baseline, its report is damaged, or, from `attach`, it is of another size.
    """

    name: ClassVar[str] = "activation"
    on_loss: ClassVar[bool] = False

    def __init__(
        self,
        dataset: Any,
        baseline: str | Path | PreTrainedModel,
        every: int = 1000,
        *,
        sequences: int = 32,
        budget: float | None = BUDGET,
    ) -> None:
        super().__init__(dataset, every, budget, sequences)
        self.baseline = baseline
        self.baseline_name = type(baseline).__name__ if isinstance(baseline, PreTrainedModel) else str(baseline)
        # fetched now: a name that is wrong is said before training, not after it
        if isinstance(baseline, PreTrainedModel):
            self._folder = None
        else:
            self._folder = Path(baseline) if Path(baseline).is_dir() else fetch(str(baseline))
        self.baseline_report = self._report()

    def _report(self) -> Report | None:
        try:
            return None if self._folder is None else read_report(self._folder)
        except FileNotFoundError:
            return None

    def bind(self, trainer: Trainer) -> None:
        super().bind(trainer)
        model = trainer.model
        if isinstance(model, PreTrainedModel):
            given = self.baseline
            known = given.config.to_dict() if isinstance(given, PreTrainedModel) else self._config()
            check_same_size(known, model.config.to_dict(), self.baseline_name)

    def _config(self) -> Path:
        return self._checkpoint(0)[0] / "config.json"

    def _checkpoint(self, step: int) -> tuple[Path, int | None]:
        """Where the baseline's weights for a step lie, and of which step they are where that is known."""
        assert self._folder is not None
        checkpoints = {int(path.name.rpartition("-")[2]): path for path in list_checkpoints(self._folder)}
        if step in checkpoints:
            return checkpoints[step], step
        published = self._folder / "publish"
        if (published / "config.json").is_file():
            return published, None
        if checkpoints and not (self._folder / "config.json").is_file():
            return checkpoints[max(checkpoints)], max(checkpoints)
        return self._folder, None

    def measure(self, model: torch.nn.Module, args: TrainingArguments, state: TrainerState) -> Measurement:
        step, device = state.global_step, next(model.parameters()).device
        baseline: torch.nn.Module
        if isinstance(self.baseline, PreTrainedModel):
            baseline, baseline_step = self.baseline, None
        else:
            folder, baseline_step = self._checkpoint(step)
            baseline = raise_together(lambda: load_model(folder), args.world_size > 1)
        home = next(baseline.parameters()).device
        torch.nn.Module.to(baseline, device)
        try:
            return measure_activations(model, baseline, self.evaluation(args), step, self.baseline_name, baseline_step)
        finally:
            torch.nn.Module.to(baseline, home)
