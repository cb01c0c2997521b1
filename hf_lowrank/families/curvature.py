"""Trace and top eigenvalue of the loss's Hessian."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import TrainerState, TrainingArguments

from hf_lowrank.families.callback import BUDGET, SequenceCallback
from hf_lowrank.families.records import Measurement, record
from hf_lowrank.families.spaces import in_space, unsharded
from hf_lowrank.metrics.curvature import hessian_trace, top_eigenvalue
from hf_lowrank.metrics.perturb import evaluating
from hf_lowrank.metrics.sequences import EvaluationSet

__all__ = ["CurvatureCallback", "CurvatureSettings", "measure_curvature"]


@dataclass(frozen=True)
class CurvatureSettings:
    """How curvature is measured.

    Attributes:
        sequences: the Hessian is that of the loss on so many of the evaluation's sequences.
        samples: random vectors for the trace.
        iterations: Lanczos iterations for the top eigenvalue.
        seed: of the vectors.

    Raises:
        ValueError: a number below 1.
    """

    sequences: int = 4
    samples: int = 8
    iterations: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("sequences", "samples", "iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give 1 or more")


def measure_curvature(
    model: nn.Module,
    evaluation: EvaluationSet,
    settings: CurvatureSettings,
    step: int,
    space: str = "native",
    progress: Callable[[], Any] = lambda: None,
) -> Measurement:
    """`curvature/trace` and `curvature/top_eigenvalue` over the parameters that require a gradient.

    The trace's standard error is over the random vectors, the eigenvalue's is the Ritz vector's residual norm.

    Raises:
        ValueError: nothing requires a gradient.
    """
    few = evaluation.first(settings.sequences)
    with evaluating(model):
        trace = hessian_trace(model, few.differentiable, settings.samples, settings.seed, shared=few.shared)
        progress()
        top = top_eigenvalue(model, few.differentiable, settings.iterations, settings.seed, shared=few.shared)
        progress()
    noted = {"seed": settings.seed, **few.settings()}
    row: dict[str, Any] = {"step": step, "space": space}
    records = []
    for name, estimate, how in (
        ("top_eigenvalue", top, {"iterations": settings.iterations, "stderr": "residual norm"}),
        ("trace", trace, {"samples": settings.samples, "stderr": "over random vectors"}),
    ):
        records.append(record(f"curvature/{name}", estimate, step, {**how, **noted}, space))
        row |= {f"curvature/{name}": estimate.value, f"curvature/{name}_stderr": estimate.stderr}
    return Measurement(records, [row])


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
