"""Activations against a baseline's on the same tokens (H14 to H16)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, Trainer, TrainerState, TrainingArguments

from hf_lowrank.checkpoints import check_same_size, list_checkpoints, load_model
from hf_lowrank.families.callback import BUDGET, SequenceCallback
from hf_lowrank.families.family import Context, Family, Peer, RunStep, Unit, family
from hf_lowrank.families.records import Measurement, record
from hf_lowrank.hub.fetch import fetch
from hf_lowrank.metrics.activations import SIMILARITIES, GroupedEstimate, compare_activations
from hf_lowrank.metrics.perturb import evaluating
from hf_lowrank.report.catalogue import ACTIVATION
from hf_lowrank.report.io import read_report
from hf_lowrank.report.model import Report
from hf_lowrank.report.samples import Sampled, Samples, pseudo_values
from hf_lowrank.sharding import raise_together

__all__ = ["Activation", "ActivationCallback", "sampled_similarity"]


@family
class Activation(Family):
    """Relative L2, cosine and CKA, plain and debiased, layer by layer and averaged over layers.

    `measure` raises `ValueError` where the baseline is of another size or one of the models gives no hidden states.
    """

    entry = ACTIVATION
    needs_baseline = True
    on_loss = False
    cost = 3

    def units(self, here: RunStep) -> Iterator[Unit]:
        if here.baseline is not None:
            # of the same step, or what the baseline ended as
            checkpoint = here.baseline.at(here.now.step) or here.baseline.final
            yield Unit(self.entry.name, here.now, baseline=checkpoint)

    def measure(self, at: Context) -> Measurement:
        assert at.sequences is not None
        assert at.baseline is not None
        assert at.baseline.load is not None
        name, step, baseline = at.baseline.name, at.baseline.step, at.baseline.load()
        with evaluating(at.model), evaluating(baseline):
            mean, layers = compare_activations(at.model, baseline, at.sequences, progress=at.progress)
        settings = {"baseline": name, "average": "mean over layers, embeddings included", **at.sequences.settings()}
        measured, reference = Measurement(), {"baseline_step": step}
        for metric in SIMILARITIES:
            number = sampled_similarity(getattr(mean, metric))
            measured.records.append(
                record(f"activation/{metric}", number, at.step, settings, reference=reference, layers=len(layers))
            )
        for layer, similarity in enumerate(layers):
            row = {"step": at.step, "layer": layer, "baseline": name, "baseline_step": -1 if step is None else step}
            for metric in SIMILARITIES:
                estimate = getattr(similarity, metric)
                row |= {f"activation/{metric}": estimate.value, f"activation/{metric}_stderr": estimate.stderr}
            measured.rows.append(row)
        return measured


class ActivationCallback(SequenceCallback):
    """Relative L2 distance, cosine and CKA of every layer's hidden states to those of a baseline on the same tokens.

    Args:
        dataset: tokenized rows, such as a Trainer's `eval_dataset`.
        baseline: a full-rank model of the same size and tokenizer: a Hub repo (`user/name`, `user/name@step-1000`), a
            published folder, a checkpoint, a run's folder (its checkpoint of the same step if there is one, else
            what it published), or a model.
        every: optimizer steps between two measurements; the start and the end of training are measured as well.
        sequences: how many rows of the data set, spread evenly.
        budget: share of the training time for all metric callbacks together; None for no limit.

    Attributes:
        baseline_report: the baseline's report, None if it has none.

    Raises:
        ValueError: there is no such baseline, its report is damaged, or, from `attach`, it is of another size.
    """

    family = Activation

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
        self._folder: Path | None = None
        # fetched now, so that a wrong name is an error before training and not after it
        if not isinstance(baseline, PreTrainedModel):
            self._folder = Path(baseline) if Path(baseline).is_dir() else fetch(str(baseline))
            self.baseline_report = _report(self._folder)
            self.baseline_metrics = (self._folder / "metrics", self._folder / "publish" / "metrics")

    def bind(self, trainer: Trainer) -> None:
        super().bind(trainer)
        if isinstance(trainer.model, PreTrainedModel):
            given = self.baseline
            config = given.config.to_dict() if isinstance(given, PreTrainedModel) else self._config()
            check_same_size(config, trainer.model.config.to_dict(), self.baseline_name)

    def _config(self) -> Path:
        return self._checkpoint(0)[0] / "config.json"

    def _checkpoint(self, step: int) -> tuple[Path, int | None]:
        """Where the baseline's weights for a step lie, and of which step they are if that is known."""
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
        baseline, step = self.baseline, None
        if not isinstance(baseline, PreTrainedModel):
            folder, step = self._checkpoint(state.global_step)
            baseline = raise_together(lambda: load_model(folder), args.world_size > 1)
        home = next(baseline.parameters()).device
        torch.nn.Module.to(baseline, next(model.parameters()).device)
        try:
            peer = Peer(self.baseline_name, step, lambda: baseline)
            return self.measure_at(self.context(model, args, state, baseline=peer))
        finally:
            torch.nn.Module.to(baseline, home)


def sampled_similarity(number: GroupedEstimate) -> Sampled | float:
    """The number with its pseudo-values; alone where groups could not be left out."""
    parts = pseudo_values(number.value, number.left_out)
    if len(parts) < 2 or not np.isfinite(parts).all():
        return number.value
    return Sampled(number.value, Samples.equal("group", range(len(parts)), parts))


def _report(folder: Path) -> Report | None:
    try:
        return read_report(folder)
    except FileNotFoundError:
        return None
