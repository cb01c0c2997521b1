"""The loss landscape during training (the study's H1 to H5)."""

from typing import Any, ClassVar

import torch
from transformers import TrainerState, TrainingArguments

from hf_lowrank.callbacks.base import BUDGET, SequenceCallback
from hf_lowrank.measurements.base import Measurement
from hf_lowrank.measurements.landscape import LandscapeSettings, measure_landscape
from hf_lowrank.measurements.spaces import SPACES, in_space, no_dense_form, spaces_of

__all__ = ["LandscapeCallback"]


class LandscapeCallback(SequenceCallback):
    """Expected sharpness and variance along random and singular directions.

    Args:
        dataset: tokenized rows, such as a Trainer's `eval_dataset`.
        every: optimizer steps between two measurements; the start and the end of training are measured as well.
        directions: number of random directions.
        sequences: how many rows of the data set, spread evenly.
        space: `native`, the parameters as trained, `dense`, the matrices they compute, for comparing methods (this
            needs memory for a dense copy of a reparameterised model), or `both`.
        budget: share of the training time for all metric callbacks together; None for no limit.
        **settings: more fields of `LandscapeSettings`: radius, points, svd_k, normalize, seed, ...

    Raises:
        ValueError: a number or name that makes no sense.
    """

    name: ClassVar[str] = "landscape"
    alternative: ClassVar[str] = "give one with space='both'"

    def __init__(
        self,
        dataset: Any,
        every: int = 1000,
        directions: int = 8,
        *,
        sequences: int = 32,
        space: str = "native",
        budget: float | None = BUDGET,
        **settings: Any,
    ) -> None:
        super().__init__(dataset, every, budget, sequences)
        if space not in SPACES:
            raise ValueError(f"space={space!r}: it is {', '.join(map(repr, SPACES))}")
        self.space = space
        self.settings = LandscapeSettings(directions=directions, **settings)

    def measure(self, model: torch.nn.Module, args: TrainingArguments, state: TrainerState) -> Measurement:
        step, found = state.global_step, Measurement([], [])
        for space in spaces_of(model, self.space):
            if space == "dense" and (why := no_dense_form(model)):
                found += Measurement([why.record("landscape/random/sharpness", step)], [])
                continue
            chosen, named = in_space(model, space)
            found += measure_landscape(chosen, self.evaluation(args), self.settings, step, named)
        return found
