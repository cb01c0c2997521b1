"""Trace and top eigenvalue of the loss's Hessian."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_lowrank.measurements.base import Measurement, record
from hf_lowrank.metrics.curvature import hessian_trace, top_eigenvalue
from hf_lowrank.metrics.perturb import evaluating
from hf_lowrank.metrics.sequences import EvaluationSet

__all__ = ["CurvatureSettings", "measure_curvature"]


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
