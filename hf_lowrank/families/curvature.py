"""Trace and top eigenvalue of the loss's Hessian."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from hf_lowrank.families.callback import BUDGET, SequenceCallback
from hf_lowrank.families.family import Context, Family, family
from hf_lowrank.families.records import Measurement, record
from hf_lowrank.families.spaces import in_space, unsharded
from hf_lowrank.metrics.curvature import Estimate, quadratic_forms, top_eigenpair
from hf_lowrank.metrics.perturb import evaluating
from hf_lowrank.report.catalogue import CURVATURE
from hf_lowrank.report.samples import Kind, Sampled, Samples

__all__ = ["Curvature", "CurvatureCallback", "CurvatureSettings", "sampled_form"]

# most groups of sequences whose shares are told apart
GROUPS = 8


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

    The trace's standard error is over random vectors and sequences, the eigenvalue's over sequences, to first order;
    how far the eigenvalue may lie from the Ritz value is a numerical matter and stands beside it (`residual_norm`). It
    is the error of a single sequence, or of a model too large for the eigenvector. Of more than 8 sequences, groups of
    neighbours count as one each. A model that FSDP2 shards is gathered to every process: its hooks have no double
    backward.
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
        parts = few.parts(GROUPS)

        def shares(model: nn.Module) -> list[Tensor]:
            return few.differentiable_shares(model, GROUPS)

        with evaluating(model):
            forms = quadratic_forms(model, shares, how.samples, how.seed, shared=few.shared)
            at.progress()
            top = top_eigenpair(model, shares, how.iterations, how.seed, shared=few.shared)
            at.progress()
        trace = sampled_form(forms, parts, "direction x sequence")
        largest: Any = Estimate(top.value, top.residual)
        about: dict[str, Any] = {"stderr": "residual norm"}
        if top.shares is not None and len(parts) > 1:
            largest, about = sampled_form(top.shares, parts, "sequence"), {"residual_norm": top.residual}
        measured = Measurement(rows=[{"step": at.step, "space": space}])
        numbers: tuple[tuple[str, Any, dict[str, int], dict[str, Any]], ...] = (
            ("curvature/top_eigenvalue", largest, {"iterations": how.iterations}, about),
            ("curvature/trace", trace, {"samples": how.samples}, {}),
        )
        for name, number, settings, described in numbers:
            settings |= {"seed": how.seed, **few.settings()}
            measured.records.append(record(name, number, at.step, settings, space, **described))
            measured.rows[0] |= {name: number.value, f"{name}_stderr": number.stderr}
        return measured


def sampled_form(shares: NDArray[np.float64], parts: list[tuple[str, int, Tensor]], kind: Kind) -> Sampled:
    """A quadratic form of the Hessian, of one vector or of several, from the shares of groups of sequences in it."""
    units, weights = tuple(unit for unit, _, _ in parts), np.array([float(tokens) for _, tokens, _ in parts])
    samples = Samples(kind, units, shares * weights.sum(), weights)
    return Sampled(samples.value, samples)


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
