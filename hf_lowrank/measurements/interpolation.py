"""Barriers on the line between two models (H6, H7, and the seed-to-seed null beside them)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_lowrank.measurements.base import Measurement, record
from hf_lowrank.metrics.interpolation import barrier, barrier_weights, chord_weights, each_between
from hf_lowrank.metrics.perplexity import Estimate, mean_loss
from hf_lowrank.metrics.perturb import evaluating
from hf_lowrank.metrics.sequences import EvaluationSet

__all__ = ["InterpolationSettings", "measure_interpolation"]


@dataclass(frozen=True)
class InterpolationSettings:
    """The grids of positions.

    Attributes:
        points: positions from 0 to 1 between neighbouring checkpoints.
        cross_points: positions between two runs.
        beyond: how far the line between two runs is extended at both ends.

    Raises:
        ValueError: fewer than 3 points, or an extension that is negative or leaves 0 and 1 off the grid.
    """

    points: int = 13
    cross_points: int = 13
    beyond: float = 0.0

    def __post_init__(self) -> None:
        if self.points < 3 or self.cross_points < 3:
            raise ValueError(f"points={self.points}, cross_points={self.cross_points}: give 3 or more")
        self.cross_grid()

    def grid(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Positions between neighbouring checkpoints."""
        return np.linspace(0, 1, self.points)

    def cross_grid(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Positions between two runs; 0 and 1 are among them exactly."""
        alphas = np.linspace(-self.beyond, 1 + self.beyond, self.cross_points)
        for end in (0.0, 1.0):
            nearest = int(np.abs(alphas - end).argmin())
            if self.beyond < 0 or abs(alphas[nearest] - end) > 1e-9:
                raise ValueError(
                    f"cross_points={self.cross_points}, beyond={self.beyond}: 0 and 1 must fall on the grid; "
                    "21 points and 0.0 do that, and 31 points and 0.25"
                )
            alphas[nearest] = end
        return alphas


def measure_interpolation(
    model: nn.Module,
    states: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    evaluation: EvaluationSet,
    alphas: np.ndarray[Any, np.dtype[np.float64]],
    subject: str,
    step: int,
    other: tuple[str, int],
    space: str | None,
    progress: Callable[[], Any] = lambda: None,
    settings: Mapping[str, Any] | None = None,
) -> Measurement:
    """The barrier between two state dicts of one architecture.

    Args:
        model: gives the architecture; its own weights end as they were.
        states: the ends at 0 and 1.
        evaluation: the sequences; where it is shared, every process calls this.
        alphas: positions with 0 and 1 among them.
        subject: `consecutive`, `cross_method`, `cross_seed`, or the latter two with `_aligned`.
        step: of the run that the record belongs to.
        other: name and step of the other end.
        space: what the parameters are.
        progress: called after every position.
        settings: what else is to be noted.

    Raises:
        ValueError: the state dicts are of different architectures.
    """

    def losses(model: nn.Module) -> tuple[Tensor, Tensor]:
        found = evaluation.losses(model)
        progress()
        return found

    with evaluating(model):
        found = each_between(model, states[0], states[1], alphas, losses)
    noted = {
        "other": other[0],
        "other_step": other[1],
        "points": len(alphas),
        "from": float(alphas[0]),
        "to": float(alphas[-1]),
        **evaluation.settings(),
        **(settings or {}),
    }
    means = [mean_loss(*at) for at in found]
    values = np.array([mean.value for mean in means])
    sums, tokens = np.stack([at[0].numpy() for at in found]), found[0][1]

    def weighted(weights: Any) -> Any:
        return mean_loss(torch.from_numpy(weights @ sums), tokens)

    prefix, over = f"interpolation/{subject}", {**noted, "stderr": "over sequences"}
    records = [
        record(f"{prefix}/barrier", weighted(barrier_weights(alphas, values)), step, over, space),
        record(f"{prefix}/barrier_chord", weighted(chord_weights(alphas, values)), step, over, space),
        record(f"{prefix}/barrier_alpha", barrier(alphas, values).alpha, step, noted, space),
    ]
    return Measurement(records, _curve(alphas, means, {"step": step, "space": space, "subject": subject}, other))


def _curve(alphas: Any, means: list[Estimate], at: Mapping[str, Any], other: tuple[str, int]) -> list[dict[str, Any]]:
    """The losses as rows, position by position."""
    return [
        {
            **at,
            "other": other[0],
            "other_step": other[1],
            "alpha": float(alpha),
            "loss": mean.value,
            "stderr": mean.stderr,
        }
        for alpha, mean in zip(alphas, means, strict=True)
    ]
