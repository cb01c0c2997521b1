"""The loss landscape of a model (H1 to H5), and along the trajectory of its checkpoints.

Shapes: N directions, p points of a grid, n sequences; losses are (p, n) sums in nats.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hf_lowrank.conversion import own_names, stored_names
from hf_lowrank.families.callback import BUDGET, SequenceCallback
from hf_lowrank.families.family import Context, Family, RunStep, Unit, family
from hf_lowrank.families.records import Measurement, Record, jackknife, record
from hf_lowrank.families.spaces import in_space, no_dense_form
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
    variance_pseudo_values,
)
from hf_lowrank.metrics.perplexity import Estimate, mean_loss
from hf_lowrank.metrics.perturb import each_point, evaluating
from hf_lowrank.metrics.trajectory import TrajectoryPCA, trajectory_pca
from hf_lowrank.report.catalogue import LANDSCAPE
from hf_lowrank.report.samples import Kind, Sampled, Samples, pseudo_values

__all__ = ["Landscape", "LandscapeCallback", "LandscapeSettings", "over_directions"]

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
        svd_single: which singular directions are measured alone as well, in records that say so in `curves`.
        svd_k_radius, svd_k_points: the grid of both; these directions are weighted by their singular values and leave
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
    svd_single: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.directions < 0 or self.trajectory < 0 or any(k < 1 for k in (*self.svd_k, *self.svd_single)):
            raise ValueError(
                f"directions={self.directions}, svd_k={self.svd_k}, svd_single={self.svd_single}, "
                f"trajectory={self.trajectory}: give numbers of directions, 0 (or nothing for svd_k and svd_single) "
                "to leave one out"
            )
        if self.normalize not in NORMALIZATIONS:
            raise ValueError(f"normalize={self.normalize!r}: it is one of {', '.join(NORMALIZATIONS)}")
        for radius, points in (
            (self.radius, self.points),
            (self.svd_1_radius, self.svd_1_points),
            (self.svd_k_radius, self.svd_k_points),
        ):
            symmetric_grid(radius, points)


@family
class Landscape(Family):
    """H1 to H5 with standard errors, and the last checkpoint's landscape along the run's trajectory.

    In the dense space a model without a dense form gets records that say so.
    """

    entry = LANDSCAPE
    Settings = LandscapeSettings
    # K is 5, 10, 20 and 100 in arXiv 2605.13652; of its launchers, those named k5, k10 and k100 evaluate the single
    # direction K, and those named top20 and top100 the mean. The grid is moved so that 0 lies on it
    study = LandscapeSettings(
        directions=100, points=25, svd_1_points=101, svd_k=(5, 10, 20, 100), svd_k_points=27, svd_single=(5, 10, 100)
    )
    subjects = ("trajectory",)
    cost = 200

    def units(self, here: RunStep) -> Iterator[Unit]:
        for space in here.spaces:
            yield Unit(self.entry.name, here.now, space)
        *earlier, last = here.run.checkpoints
        if here.now is last and earlier and here.settings.trajectory:
            yield Unit(self.entry.name, here.now, subject="trajectory", earlier=tuple(earlier))

    def headline(self, subject: str | None) -> tuple[str, ...]:
        return ("landscape/trajectory_1/sharpness",) if subject == "trajectory" else super().headline(subject)

    def measure(self, at: Context) -> Measurement:
        if at.space == "dense" and (why := no_dense_form(at.model)):
            about = {"note": why}
            return Measurement(
                [Record(name, None, None, at.step, space="dense", about=about) for name in self.headline(None)]
            )
        model, space = in_space(at.model, at.space)
        measured = Measurement()
        with evaluating(model):
            lines = _Lines(at, model, space)
            if at.subject == "trajectory":
                return _along_trajectory(lines)
            if at.settings.directions:
                measured += _along_random_directions(lines)
            if several := (*at.settings.svd_k, *at.settings.svd_single):
                singular = SingularDirections(model, max(several))
                measured += _along_the_top_direction(lines, singular) + _along_top_directions(lines, singular)
        return measured


@dataclass
class Sequences:
    """Numbers of predicted tokens (n,) of the sequences that losses are measured on, and an id for each."""

    tokens: Grid
    units: tuple[str, ...]

    def mean(self, losses: Grid) -> Sampled:
        """Mean of (n,) sums over sequences, or of (N, n) over directions as well, in nats a token."""
        kind: Kind = "sequence" if losses.ndim == 1 else "direction x sequence"
        samples = Samples(kind, self.units, losses, self.tokens)
        return Sampled(samples.value, samples)

    def variance(self, losses: Grid) -> Sampled | float:
        """Variance over fixed directions, averaged over the grid, of losses (K, p, n)."""
        return _variance(losses, self.tokens, self.units)


class _Lines(Sequences):
    """Losses of every sequence along lines through one model's parameters, the centre measured once."""

    def __init__(self, at: Context, model: nn.Module, space: str) -> None:
        assert at.sequences is not None
        self.at, self.model, self.space, self.sequences = at, model, space, at.sequences
        center, tokens = at.sequences.losses(model)
        super().__init__(tokens.double().numpy(), at.sequences.units())
        self.center = center.numpy()

    def along(self, direction: Mapping[str, Tensor], grid: Grid) -> Grid:
        """(p, n) losses."""

        def measure(model: nn.Module) -> Grid:
            losses = self.sequences.losses(model)[0].numpy()
            self.at.progress()
            return losses

        around = iter(each_point(self.model, direction, grid[grid != 0], measure))
        return np.stack([self.center if x == 0 else next(around) for x in grid])

    def curve(self, grid: Grid, losses: Grid) -> LossCurve:
        """Losses (p, n) as a curve with standard errors over sequences."""
        means = [mean_loss(torch.from_numpy(point), torch.from_numpy(self.tokens)) for point in losses]
        return LossCurve(grid, np.array([m.value for m in means]), np.array([m.stderr for m in means]))

    def records(
        self,
        subject: str,
        numbers: Mapping[str, Sampled | float],
        curve: LossCurve,
        settings: Mapping[str, Any],
        **about: Any,
    ) -> list[Record]:
        """Records of `numbers` and of the shape of the mean curve."""
        settings = {**settings, **self.sequences.settings()}
        shape: dict[str, Sampled | float] = {"center_loss": self.mean(self.center)}
        shape |= {key: getattr(curve, key) for key in ("min_loss", "center_to_min")}
        return [
            record(f"landscape/{subject}/{key}", number, self.at.step, settings, self.space, **about)
            for key, number in {**numbers, **shape}.items()
        ]

    def rows(self, subject: str, curves: Mapping[int, LossCurve]) -> list[dict[str, Any]]:
        """The points of the curves, by the number of their direction."""
        rows = []
        for number, curve in curves.items():
            errors = [None] * len(curve.x) if curve.stderr is None else curve.stderr.tolist()
            for x, loss, stderr in zip(curve.x.tolist(), curve.loss.tolist(), errors, strict=True):
                row = {"step": self.at.step, "space": self.space, "subject": subject, "direction": number}
                rows.append(row | {"x": x, "loss": loss, "stderr": stderr})
        return rows


def _along_random_directions(lines: _Lines) -> Measurement:
    how = lines.at.settings
    grid = symmetric_grid(how.radius, how.points)
    directions = (random_direction(lines.model, how.seed + i, how.normalize) for i in range(how.directions))
    losses = np.stack([lines.along(direction, grid) for direction in directions])
    curves = [lines.curve(grid, along) for along in losses]
    mean = mean_curve(curves)
    settings = {key: getattr(how, key) for key in ("directions", "radius", "points", "normalize", "seed")}
    numbers = random_numbers(lines, grid, losses)
    records = lines.records("random", numbers, mean, settings)
    return Measurement(records, lines.rows("random", dict(enumerate(curves))) + lines.rows("random_mean", {0: mean}))


def random_numbers(sequences: Sequences, grid: Grid, losses: Grid) -> dict[str, Sampled | float]:
    """H1 and H2 with errors over directions and sequences, of losses (N, p, n)."""
    variance = float((losses.sum(-1) / sequences.tokens.sum()).var(0).mean())
    numbers: dict[str, Sampled | float] = {
        "sharpness": sequences.mean(sharpness_weights(grid) @ losses),
        "variance": variance,
    }
    # a variance of fewer than three has no jackknife
    if min(len(losses) - 1, len(sequences.units)) > 1:
        parts = variance_pseudo_values(losses, sequences.tokens)
        numbers["variance"] = Sampled(
            variance, Samples.equal("direction x sequence", sequences.units, parts), of_variance=True
        )
    return numbers


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


def _along_one(
    lines: _Lines, direction: Mapping[str, Tensor], grid: Grid
) -> tuple[LossCurve, dict[str, Sampled | float]]:
    """The curve along one direction, and its sharpness with the standard error over sequences."""
    losses = lines.along(direction, grid)
    return lines.curve(grid, losses), {"sharpness": lines.mean(sharpness_weights(grid) @ losses)}


def _along_the_top_direction(lines: _Lines, singular: SingularDirections) -> Measurement:
    how = lines.at.settings
    grid = symmetric_grid(how.svd_1_radius, how.svd_1_points)
    curve, sharpness = _along_one(lines, singular.direction(1), grid)
    settings = {"radius": how.svd_1_radius, "points": how.svd_1_points, "sigma_weighted": False}
    return Measurement(lines.records("svd_1", sharpness, curve, settings), lines.rows("svd_1", {1: curve}))


def _along_top_directions(lines: _Lines, singular: SingularDirections) -> Measurement:
    how = lines.at.settings
    grid = symmetric_grid(how.svd_k_radius, how.svd_k_points)
    losses = np.stack(
        [
            lines.along(singular.direction(k, sigma_weighted=True, vectors="zero"), grid)
            for k in range(1, max(*how.svd_k, *how.svd_single, 1) + 1)
        ]
    )
    records: list[Record] = []
    settings = {"radius": how.svd_k_radius, "points": how.svd_k_points, "sigma_weighted": True, "vectors": "zero"}
    for k in sorted(set(how.svd_k)):
        mean = losses[:k].mean(0)
        numbers: dict[str, Sampled | float] = {
            "sharpness": lines.mean(sharpness_weights(grid) @ mean),
            "variance": lines.variance(losses[:k]),
        }
        records += lines.records("svd_k", numbers, lines.curve(grid, mean), {"K": k, **settings})
    for k in sorted(set(how.svd_single)):
        alone = lines.mean(sharpness_weights(grid) @ losses[k - 1])
        of = {"K": k, "curves": "of direction K alone", **settings}
        records += lines.records("svd_k", {"sharpness": alone}, lines.curve(grid, losses[k - 1]), of)
    curves = {k + 1: lines.curve(grid, along) for k, along in enumerate(losses)}
    return Measurement(records, lines.rows("svd_k", curves))


def _variance(losses: Grid, tokens: Grid, units: Sequence[str] | None = None) -> Sampled | float:
    """Variance over directions (ddof 0), averaged over the grid, of losses (K, p, n); jackknife over sequences."""
    sums, total = losses.sum(-1), tokens.sum()
    value = float((sums / total).var(0).mean())
    if losses.shape[-1] < 2:
        return value
    others = (sums[..., None] - losses) / (total - tokens)
    parts = pseudo_values(value, others.var(0).mean(0))
    samples = Samples.equal("sequence", range(len(parts)) if units is None else units, parts)
    return Sampled(value, samples, of_variance=True)


def _along_trajectory(lines: _Lines) -> Measurement:
    """Along the principal components of the checkpoints, unit vectors; a grid reaches as far as the trajectory."""
    at, measured = lines.at, Measurement()
    names = stored_names(lines.model, at.earlier[-1])
    pca = _components(at.earlier, min(at.settings.trajectory, len(at.earlier) - 1), names)
    device = next(lines.model.parameters()).device
    for k in range(pca.coordinates.shape[1]):
        radius = float(abs(pca.coordinates[:, k]).max())
        grid = symmetric_grid(radius, at.settings.points)
        # the components have the names that the weights have on disk
        direction = {name: tensor.to(device) for name, tensor in own_names(lines.model, pca.direction(k)).items()}
        curve, sharpness = _along_one(lines, direction, grid)
        settings = {"radius": radius, "points": at.settings.points}
        about: dict[str, Any] = {"checkpoints": len(pca.coordinates), "explained": float(pca.explained[k])}
        records = lines.records(f"trajectory_{k + 1}", sharpness, curve, settings, **about)
        measured += Measurement(records, lines.rows("trajectory", {k + 1: curve}))
    return measured


def _components(checkpoints: Sequence[list[Path]], k: int, names: list[str]) -> TrajectoryPCA:
    """The first k components, or one where the checkpoints lie on a line."""
    try:
        return trajectory_pca(checkpoints, k, names)
    except ValueError:
        if k == 1:
            raise
        return trajectory_pca(checkpoints, 1, names)


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

    family = Landscape
    alternative = "give one with space='both'"

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
        chosen = LandscapeSettings(directions=directions, **settings)
        super().__init__(dataset, every, budget, sequences, settings=chosen, space=space)
