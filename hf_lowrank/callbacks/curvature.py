"""The loss's Hessian during training."""

from typing import Any, ClassVar

import torch
from transformers import TrainerState, TrainingArguments

from hf_lowrank.callbacks.base import BUDGET, SequenceCallback
from hf_lowrank.measurements.base import Measurement
from hf_lowrank.measurements.curvature import CurvatureSettings, measure_curvature
from hf_lowrank.measurements.spaces import in_space, unsharded

__all__ = ["CurvatureCallback"]


class CurvatureCallback(SequenceCallback):
    """Top eigenvalue and trace of the Hessian over the parameters that are trained.

    A model that FSDP2 shards is gathered to every process for it: its hooks have no double backward.

    Args:
        dataset: tokenized rows, such as a Trainer's `eval_dataset`.
        every: optimizer steps between two measurements; the start and the end of training are measured as well.
        sequences: the Hessian is that of the loss on so many rows; their graph is kept in memory.
        samples, iterations, seed: as in `CurvatureSettings`.
        budget: share of the training time for all metric callbacks together; None for no limit.

    Raises:
        ValueError: a number below 1.
    """

    name: ClassVar[str] = "curvature"

    def __init__(
        self,
        dataset: Any,
        every: int = 1000,
        *,
        sequences: int = 4,
        samples: int = 8,
        iterations: int = 12,
        seed: int = 0,
        budget: float | None = BUDGET,
    ) -> None:
        super().__init__(dataset, every, budget, sequences)
        self.settings = CurvatureSettings(sequences, samples, iterations, seed)

    def measure(self, model: torch.nn.Module, args: TrainingArguments, state: TrainerState) -> Measurement:
        _, space = in_space(model, "native")
        return measure_curvature(unsharded(model), self.evaluation(args), self.settings, state.global_step, space)
