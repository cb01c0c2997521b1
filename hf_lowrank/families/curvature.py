"""Trace and top eigenvalue of the loss's Hessian."""

from dataclasses import dataclass
from typing import Any

from hf_lowrank.families.callback import BUDGET, SequenceCallback
from hf_lowrank.families.family import Context, Family, family
from hf_lowrank.families.records import Measurement, record
from hf_lowrank.families.spaces import in_space, unsharded
from hf_lowrank.metrics.curvature import quadratic_forms, top_eigenvalue
from hf_lowrank.metrics.perturb import evaluating
from hf_lowrank.report.catalogue import CURVATURE
from hf_lowrank.report.samples import Sampled, Samples

__all__ = ["Curvature", "CurvatureCallback", "CurvatureSettings"]


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


@family
class Curvature(Family):
    """`curvature/trace` and `curvature/top_eigenvalue` over the parameters that require a gradient.

    The trace's standard error is over the random vectors, the eigenvalue's is the Ritz vector's residual norm. A model
    that FSDP2 shards is gathered to every process: its hooks have no double backward.
    """

    entry = CURVATURE
    Settings = CurvatureSettings
    study = CurvatureSettings(sequences=32, samples=32, iterations=30)
    cost = 50

    def measure(self, at: Context) -> Measurement:
        assert at.sequences is not None
        how, few = at.settings, at.sequences.first(at.settings.sequences)
        model, space = in_space(at.model, at.space)
        model = unsharded(model)
        with evaluating(model):
            forms = quadratic_forms(model, few.differentiable, how.samples, how.seed, shared=few.shared)
            at.progress()
            top = top_eigenvalue(model, few.differentiable, how.iterations, how.seed, shared=few.shared)
            at.progress()
        trace = Sampled(float(forms.mean()), Samples.equal("vector", range(how.samples), forms))
        measured = Measurement(rows=[{"step": at.step, "space": space}])
        numbers: tuple[tuple[str, Any, dict[str, int], dict[str, Any]], ...] = (
            ("curvature/top_eigenvalue", top, {"iterations": how.iterations}, {"stderr": "residual norm"}),
            ("curvature/trace", trace, {"samples": how.samples}, {}),
        )
        for name, number, settings, about in numbers:
            settings |= {"seed": how.seed, **few.settings()}
            measured.records.append(record(name, number, at.step, settings, space, **about))
            measured.rows[0] |= {name: number.value, f"{name}_stderr": number.stderr}
        return measured


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

    family = Curvature

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
        settings = CurvatureSettings(sequences, samples, iterations, seed)
        super().__init__(dataset, every, budget, sequences, settings=settings)
