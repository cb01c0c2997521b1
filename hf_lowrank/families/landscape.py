"""The loss landscape of a model (H1 to H5), and along the trajectory of its checkpoints.

Shapes: N directions, p points of a grid, n sequences; losses are (p, n) sums in nats.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import TrainerState, TrainingArguments

from hf_lowrank.conversion import own_names
from hf_lowrank.families.callback import BUDGET, SequenceCallback
from hf_lowrank.families.records import Measurement, Record, jackknife, record
from hf_lowrank.families.spaces import SPACES, in_space, no_dense_form, spaces_of
from hf_lowrank.metrics.landscape import (
    NORMALIZATIONS,
    LossCurve,
    SingularDirections,
    expected_sharpness,
    mean_curve,
    random_direction,
    sharpness_weights,
    symmetric_grid,
    variance_over_directions,
)
from hf_lowrank.metrics.perplexity import Estimate, mean_loss
from hf_lowrank.metrics.perturb import each_point, evaluating
from hf_lowrank.metrics.sequences import EvaluationSet
from hf_lowrank.metrics.trajectory import TrajectoryPCA

__all__ = ["LandscapeCallback", "LandscapeSettings", "measure_landscape", "measure_trajectory", "over_directions"]

Grid = NDArray[np.float64]


@dataclass(frozen=True)
class LandscapeSettings:
    """How a landscape is measured; the study's settings are in the preset `study`.

    Attributes:
        directions: number of random directions (H1, H2).
        radius, points: their grid, `points` step lengths from -radius to radius.
        normalize: of the random directions, see `random_direction`.
        seed: of the first; the others take seed + 1 and on.
        svd_1_radius, svd_1_points: the grid along the top singular direction, of unit vectors (H3).
        svd_k: how many singular directions are averaged (H4, H5), one record for each number.
        svd_k_radius, svd_k_points: their grid; these directions are weighted by their singular values and leave
            vectors alone.
        trajectory: number of principal components of the trajectory, where checkpoints are at hand.

    Raises:
        ValueError: a number that makes no sense; the message names it.
    """

    directions: int = 8
    radius: float = 0.003
    points: int = 13
    normalize: str = "none"
    seed: int = 0
    svd_1_radius: float = 0.25
    svd_1_points: int = 13
    svd_k: tuple[int, ...] = (5,)
    svd_k_radius: float = 0.052
    svd_k_points: int = 13
    trajectory: int = 2

    def __post_init__(self) -> None:
        if self.directions < 0 or self.trajectory < 0 or any(k < 1 for k in self.svd_k):
            raise ValueError(
                f"directions={self.directions}, svd_k={self.svd_k}, trajectory={self.trajectory}: give numbers of "
                "directions, 0 (or nothing for svd_k) to leave one out"
            )
        if self.normalize not in NORMALIZATIONS:
            raise ValueError(f"normalize={self.normalize!r}: it is one of {', '.join(NORMALIZATIONS)}")
        for radius, points in (
            (self.radius, self.points),
            (self.svd_1_radius, self.svd_1_points),
            (self.svd_k_radius, self.svd_k_points),
        ):
            symmetric_grid(radius, points)


class _Lines:
    """Losses of every sequence along lines through one model's parameters, the centre measured once."""

    def __init__(self, model: nn.Module, evaluation: EvaluationSet, progress: Callable[[], Any]) -> None:
        self.model, self.evaluation, self.progress = model, evaluation, progress
        center, tokens = evaluation.losses(model)
        self.center, self.tokens = center.numpy(), tokens

    def along(self, direction: Mapping[str, Tensor], grid: Grid) -> Grid:
        """(p, n) losses."""

        def measure(model: nn.Module) -> Grid:
            losses = self.evaluation.losses(model)[0].numpy()
            self.progress()
            return losses

        around = iter(each_point(self.model, direction, grid[grid != 0], measure))
        return np.stack([self.center if x == 0 else next(around) for x in grid])

    def mean(self, losses: Grid) -> Estimate:
        """Mean of (n,) sums over sequences, in nats a token."""
        return mean_loss(torch.from_numpy(losses), self.tokens)

    def curve(self, grid: Grid, losses: Grid) -> LossCurve:
        """Losses (p, n) as a curve with standard errors over sequences."""
        means = [self.mean(at) for at in losses]
        return LossCurve(grid, np.array([m.value for m in means]), np.array([m.stderr for m in means]))


def _rows(step: int, space: str, subject: str, curves: Mapping[int, LossCurve]) -> list[dict[str, Any]]:
    return [
        {"step": step, "space": space, "subject": subject, "direction": at, "x": x, "loss": loss, "stderr": stderr}
        for at, curve in curves.items()
        for x, loss, stderr in zip(
            curve.x.tolist(),
            curve.loss.tolist(),
            [None] * len(curve.x) if curve.stderr is None else curve.stderr.tolist(),
            strict=True,
        )
    ]


def _shape(curve: LossCurve, center: Estimate) -> dict[str, Estimate | float]:
    """What is reported of a curve beside its sharpness."""
    return {"center_loss": center, "min_loss": curve.min_loss, "center_to_min": curve.center_to_min}


def measure_landscape(
    model: nn.Module,
    evaluation: EvaluationSet,
    settings: LandscapeSettings,
    step: int,
    space: str = "native",
    progress: Callable[[], Any] = lambda: None,
) -> Measurement:
    """H1 to H5 of a model, with standard errors.

    Args:
        model: any causal language model; its parameters end bit for bit as they were.
        evaluation: the sequences; where it is shared, every process calls this.
        step: the optimizer step of the model.
        space: what the parameters are, for the report.
        progress: called after every point of a grid.
    """
    with evaluating(model):
        lines = _Lines(model, evaluation, progress)
        common = evaluation.settings()
        found = Measurement([], [])
        if settings.directions:
            found += _random(lines, settings, step, space, common)
        if settings.svd_k:
            singular = SingularDirections(model, max(settings.svd_k))
            found += _top_direction(lines, singular, settings, step, space, common)
            found += _top_directions(lines, singular, settings, step, space, common)
    return found


def _random(lines: _Lines, settings: LandscapeSettings, step: int, space: str, common: dict[str, Any]) -> Measurement:
    grid, curves = symmetric_grid(settings.radius, settings.points), []
    for i in range(settings.directions):
        direction = random_direction(lines.model, settings.seed + i, settings.normalize)
        curves.append(lines.curve(grid, lines.along(direction, grid)))
    mean = mean_curve(curves)
    noted = {
        "directions": settings.directions,
        "radius": settings.radius,
        "points": settings.points,
        "normalize": settings.normalize,
        "seed": settings.seed,
        **common,
    }
    values: dict[str, Estimate | float] = {
        **over_directions(curves),
        **_shape(mean, lines.mean(lines.center)),
    }
    records = [record(f"landscape/random/{k}", v, step, _over(noted, k), space) for k, v in values.items()]
    rows = _rows(step, space, "random", dict(enumerate(curves))) + _rows(step, space, "random_mean", {0: mean})
    return Measurement(records, rows)


def over_directions(curves: Sequence[LossCurve]) -> dict[str, Estimate]:
    """`sharpness` of the mean curve and `variance` (H1, H2), with standard errors over random directions.

    Raises:
        ValueError: there is no curve, the grids differ, or the grid is not symmetric about an exact 0.
    """
    variance = variance_over_directions(curves)
    sharpness = np.array([expected_sharpness(curve) for curve in curves])
    # of a single curve that is left there is no variance
    others = [[c for j, c in enumerate(curves) if j != i] for i in range(len(curves))] if len(curves) > 2 else []
    stderr = sharpness.std(ddof=1) / len(curves) ** 0.5 if len(curves) > 1 else float("nan")
    return {
        "sharpness": Estimate(float(sharpness.mean()), float(stderr)),
        "variance": jackknife(variance, [variance_over_directions(o) for o in others]),
    }


def _over(noted: dict[str, Any], metric: str) -> dict[str, Any]:
    over = {"sharpness": "over directions", "variance": "over directions", "center_loss": "over sequences"}
    return {**noted, "stderr": over[metric]} if metric in over else noted


def _top_direction(
    lines: _Lines, singular: SingularDirections, settings: LandscapeSettings, step: int, space: str,
    common: dict[str, Any],
) -> Measurement:  # fmt: skip
    grid = symmetric_grid(settings.svd_1_radius, settings.svd_1_points)
    losses = lines.along(singular.direction(1), grid)
    noted = {"radius": settings.svd_1_radius, "points": settings.svd_1_points, "sigma_weighted": False, **common}
    return _along_one(lines, losses, grid, ("svd_1", 1), step, space, noted)


def _along_one(
    lines: _Lines, losses: Grid, grid: Grid, what: tuple[str, int], step: int, space: str, noted: dict[str, Any]
) -> Measurement:
    """Sharpness and shape along one given direction, with standard errors over sequences."""
    subject, at = what
    curve = lines.curve(grid, losses)
    values: dict[str, Estimate | float] = {
        "sharpness": lines.mean(sharpness_weights(grid) @ losses),
        **_shape(curve, lines.mean(lines.center)),
    }
    noted = {**noted, "stderr": "over sequences"}
    name = f"trajectory_{at}" if subject == "trajectory" else subject
    records = [record(f"landscape/{name}/{key}", value, step, noted, space) for key, value in values.items()]
    return Measurement(records, _rows(step, space, subject, {at: curve}))


def _top_directions(
    lines: _Lines, singular: SingularDirections, settings: LandscapeSettings, step: int, space: str,
    common: dict[str, Any],
) -> Measurement:  # fmt: skip
    grid = symmetric_grid(settings.svd_k_radius, settings.svd_k_points)
    weights, most = sharpness_weights(grid), max(settings.svd_k)
    losses = np.stack(
        [lines.along(singular.direction(k, sigma_weighted=True, vectors="zero"), grid) for k in range(1, most + 1)]
    )
    tokens = lines.tokens.numpy()
    records: list[Record] = []
    for k in sorted(set(settings.svd_k)):
        first = losses[:k]
        mean = first.mean(0)
        values: dict[str, Estimate | float] = {
            "sharpness": lines.mean(weights @ mean),
            "variance": _variance(first, tokens),
            **_shape(lines.curve(grid, mean), lines.mean(lines.center)),
        }
        noted = {
            "K": k,
            "radius": settings.svd_k_radius,
            "points": settings.svd_k_points,
            "sigma_weighted": True,
            "vectors": "zero",
            **common,
            "stderr": "over sequences",
        }
        records += [record(f"landscape/svd_k/{key}", value, step, noted, space) for key, value in values.items()]
    curves = {k + 1: lines.curve(grid, along) for k, along in enumerate(losses)}
    return Measurement(records, _rows(step, space, "svd_k", curves))


def _variance(losses: Grid, tokens: Grid) -> Estimate:
    """Variance over directions (ddof 0), averaged over the grid, of losses (K, p, n); jackknife over sequences."""
    sums, total = losses.sum(-1), tokens.sum()
    value = float((sums / total).var(0).mean())
    if losses.shape[-1] < 2:
        return Estimate(value, float("nan"))
    others = (sums[..., None] - losses) / (total - tokens)
    return jackknife(value, others.var(0).mean(0))


def measure_trajectory(
    model: nn.Module,
    evaluation: EvaluationSet,
    pca: TrajectoryPCA,
    settings: LandscapeSettings,
    step: int,
    space: str = "native",
    progress: Callable[[], Any] = lambda: None,
) -> Measurement:
    """The landscape of the last checkpoint along the principal components of the run's trajectory.

    Each component is a unit vector; its grid reaches as far as the trajectory does.
    """
    found = Measurement([], [])
    with evaluating(model):
        lines = _Lines(model, evaluation, progress)
        device = next(model.parameters()).device
        for k in range(pca.coordinates.shape[1]):
            radius = float(abs(pca.coordinates[:, k]).max())
            grid = symmetric_grid(radius, settings.points)
            # the components have the names that the weights have on disk
            direction = {name: tensor.to(device) for name, tensor in own_names(model, pca.direction(k)).items()}
            noted = {
                "radius": radius,
                "points": settings.points,
                "checkpoints": len(pca.coordinates),
                "explained": float(pca.explained[k]),
                **evaluation.settings(),
            }
            losses = lines.along(direction, grid)
            found += _along_one(lines, losses, grid, ("trajectory", k + 1), step, space, noted)
    return found


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
