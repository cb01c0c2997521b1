"""The loss along straight lines through the parameters (H1 to H5; Li et al. 2018, arXiv 1712.09913).

theta: all named parameters, tied ones once; d: a direction, one tensor of the same shape a parameter; the curve is
L(theta + x d) in nats over a grid of x.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hf_lowrank.experts import stacks
from hf_lowrank.metrics.perturb import each_point, parameters_of, transposed_weights
from hf_lowrank.metrics.spectra import top_singular_triplets
from hf_lowrank.sharding import like, reshard, whole

__all__ = [
    "NORMALIZATIONS", "LossCurve", "SingularDirections", "expected_sharpness", "loss_curve", "mean_curve",
    "random_direction", "sharpness_weights", "svd_direction", "symmetric_grid", "variance_over_directions",
    "variance_pseudo_values",
]  # fmt: skip

NORMALIZATIONS = ("none", "filter", "layer", "unit")

Direction = dict[str, Tensor]


@dataclass(frozen=True)
class LossCurve:
    """A loss along a line.

    Attributes:
        x: (points,) step lengths along the direction.
        loss: (points,) losses at theta + x d, in the unit of the loss function.
        stderr: (points,) standard errors of the losses; None if unknown.

    Raises:
        ValueError: the numbers of points and losses differ.
    """

    x: NDArray[np.float64]
    loss: NDArray[np.float64]
    stderr: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        if self.x.ndim != 1 or self.x.shape != self.loss.shape:
            raise ValueError(f"a grid of shape {self.x.shape} and losses of {self.loss.shape}: give one loss a point")

    @property
    def center_loss(self) -> float:
        """L(theta), at x = 0; raises `ValueError` if the grid has no 0."""
        return float(self.loss[_center(self.x)])

    @property
    def min_loss(self) -> float:
        """The smallest loss on the grid."""
        return float(self.loss.min())

    @property
    def center_to_min(self) -> float:
        """How far the centre lies above the smallest loss."""
        return self.center_loss - self.min_loss


def _rounding(x: NDArray[np.float64]) -> float:
    """How far a grid's points may lie from where they are meant to be: `linspace` rounds."""
    return 1e-9 * float(np.abs(x).max(initial=0))


def _center(x: NDArray[np.float64]) -> int:
    at = np.flatnonzero(np.abs(x) <= _rounding(x))
    if len(at) != 1:
        raise ValueError(f"the grid has {len(at)} points at 0 and needs one: np.linspace(-a, a, 2 * k + 1)")
    return int(at[0])


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))


@torch.no_grad()
def random_direction(model: nn.Module, seed: int, normalize: str = "none") -> Direction:
    """A Gaussian direction, the same for every model of the same shape, device and number of processes.

    Args:
        model: its parameters give names, shapes and, for `filter` and `layer`, norms.
        seed: of the direction; several directions take `seed + i`.
        normalize: `none` (standard Gaussian entries, the study's), `filter` (the weights of each output as long as the
            parameter's, which are a row, or a column of a `Conv1D`; a vector as a whole; Li et al. 2018, Section 4),
            `layer` (each tensor as long as the parameter) or `unit` (the whole direction of length 1). Every
            matrix of a stack of experts' is taken for itself.

    Returns:
        Parameter name -> tensor on the parameter's device, in float32 or the parameter's higher precision.

    Raises:
        ValueError: unknown `normalize`.
    """
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"normalize={normalize!r}: it is one of {', '.join(NORMALIZATIONS)}")
    reshard(model)
    parameters, experts = parameters_of(model), stacks(model)
    # a generator draws on one thread, and each parameter has its own
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        shapes = [p.shape for p in parameters.values()]
        numbers = pool.map(
            lambda name, shape: torch.randn(shape, generator=_generator(seed, name)), parameters, shapes
        )
    direction, squares, transposed = {}, 0.0, transposed_weights(model)
    for (name, p), drawn in zip(parameters.items(), numbers, strict=True):
        dtype = torch.promote_types(p.dtype, torch.float32)
        drawn = drawn.to(device=p.device, dtype=dtype)
        if normalize in ("filter", "layer"):
            weight = whole(p.detach()).to(dtype)
            along: int | tuple[int, ...] | None
            if name in experts:
                along = (1, 2) if normalize == "layer" else 1 if experts[name].transposed else 2
            else:
                whole_tensor = normalize == "layer" or p.ndim < 2
                along = None if whole_tensor else 0 if name in transposed else tuple(range(1, p.ndim))
            drawn *= _norms(weight, along) / _norms(drawn, along)
        elif normalize == "unit":
            squares += drawn.double().square().sum().item()
        direction[name] = like(drawn, p)
    if normalize == "unit":
        for tensor in direction.values():
            tensor /= math.sqrt(squares)
    return direction


def _norms(tensor: Tensor, along: int | tuple[int, ...] | None) -> Tensor:
    return torch.linalg.vector_norm(tensor, dim=along, keepdim=True)


class SingularDirections:
    """The first singular directions of every matrix of a model at once; each matrix is decomposed a single time.

    Args:
        model: its parameters as they are now; a tensor of more dimensions is taken as rows by everything else, but a
            stack of experts' matrices as each of them.
        k: how many directions; kept are k singular triplets a matrix.

    Raises:
        ValueError: k below 1, or NaN in a parameter, which is named.
    """

    def __init__(self, model: nn.Module, k: int) -> None:
        if k < 1:
            raise ValueError(f"k={k!r}: k counts from 1")
        reshard(model)
        self._model, self._k = model, k
        # a triplet for each matrix of a parameter
        self._triplets: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
        experts = stacks(model)
        for name, p in parameters_of(model).items():
            if p.ndim > 1:
                weight = whole(p.detach())
                try:
                    matrices = weight if name in experts else [weight.flatten(1)]
                    self._triplets[name] = [top_singular_triplets(matrix, k) for matrix in matrices]
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error

    @torch.no_grad()
    def direction(self, k: int, sigma_weighted: bool = False, vectors: str = "self") -> Direction:
        """u_k v_k^T of every matrix, or sigma_k u_k v_k^T; see `svd_direction`."""
        if not 1 <= k <= self._k or vectors not in ("self", "zero"):
            raise ValueError(f"k={k!r}, vectors={vectors!r}: k is 1 to {self._k}, vectors is 'self' or 'zero'")
        direction = {}
        for name, p in parameters_of(self._model).items():
            dtype = torch.promote_types(p.dtype, torch.float32)
            if name not in self._triplets:
                value = p.detach().to(dtype)
                direction[name] = value.clone() if vectors == "self" else torch.zeros_like(value)
                continue
            outers = []
            for triplets in self._triplets[name]:
                U, S, V = (part.to(device=p.device, dtype=dtype) for part in triplets)
                outers.append(torch.zeros(len(U), len(V), device=p.device, dtype=dtype))
                if k <= len(S):
                    torch.outer(U[:, k - 1] * (S[k - 1] if sigma_weighted else 1.0), V[:, k - 1], out=outers[-1])
            direction[name] = like(torch.stack(outers).view(p.shape), p)
        return direction


def svd_direction(model: nn.Module, k: int, sigma_weighted: bool = False, vectors: str = "self") -> Direction:
    """The k-th singular direction of every matrix at once: u_k v_k^T, or sigma_k u_k v_k^T.

    Several of them are cheaper through `SingularDirections`.

    Args:
        model: its parameters.
        k: from 1; a matrix with fewer singular values gets zeros.
        sigma_weighted: multiply by the singular value.
        vectors: what a parameter with one dimension gets: `self` (itself, the study's first form) or `zero`.

    Raises:
        ValueError: k below 1, unknown `vectors`, or NaN in a parameter.
    """
    return SingularDirections(model, k).direction(k, sigma_weighted, vectors)


def loss_curve(
    model: nn.Module,
    loss_fn: Callable[[nn.Module], float],
    direction: Mapping[str, Tensor],
    grid: Sequence[float] | NDArray[np.float64],
) -> LossCurve:
    """L(theta + x d) for every x of the grid.

    Each point is theta plus x d in float32 or better, rounded once to the parameter's dtype, so that no error
    accumulates. Afterwards, also after an exception, the parameters are bit for bit what they were.

    Args:
        model: put it into eval mode first.
        loss_fn: of the model, on a fixed evaluation set.
        direction: parameter name -> tensor, for every parameter.
        grid: step lengths; symmetric with a 0 where sharpness is wanted (what `linspace` rounds to 1e-17 is one).

    Raises:
        ValueError: the direction is not one of this model's parameters.
    """
    x = np.array(grid, dtype=np.float64)
    x[np.abs(x) <= _rounding(x)] = 0.0
    losses = each_point(model, direction, x, lambda model: float(loss_fn(model)))
    return LossCurve(x, np.asarray(losses))


def symmetric_grid(radius: float, points: int) -> NDArray[np.float64]:
    """`points` step lengths from -radius to radius, evenly spaced, with an exact 0 in the middle.

    Raises:
        ValueError: an even number of points, fewer than 3, or a radius that is not positive.
    """
    if points < 3 or points % 2 == 0 or not radius > 0:
        raise ValueError(f"{points} points within {radius}: give an odd number of 3 or more and a radius above 0")
    right = np.linspace(0, radius, points // 2 + 1)
    return np.concatenate([-right[:0:-1], right])


def sharpness_weights(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights w: (points,) such that expected sharpness is the sum of w_i L(x_i); see `expected_sharpness`."""
    center, half = _center(x), len(x) // 2
    ordered = np.sort(x)
    if len(x) < 3 or not np.allclose(ordered, -ordered[::-1], rtol=1e-9, atol=_rounding(x)):
        raise ValueError("the grid is not symmetric about 0: np.linspace(-a, a, 2 * k + 1) is")
    weights = np.full(len(x), 0.5 / half)
    weights[center] = -1.0
    return weights


def expected_sharpness(curve: LossCurve) -> float:
    """Mean over x > 0 of (L(x) + L(-x)) / 2 - L(0), in the unit of the loss (H1, H3, H4).

    Raises:
        ValueError: the grid is not symmetric about a 0.
    """
    return float(sharpness_weights(curve.x) @ curve.loss)


def mean_curve(curves: Sequence[LossCurve]) -> LossCurve:
    """Pointwise mean of curves on one grid, with its standard error over the curves (None for a single one).

    Raises:
        ValueError: there is none, or the grids differ.
    """
    losses, count = _stacked(curves), len(curves)
    stderr = losses.std(0, ddof=1) / math.sqrt(count) if count > 1 else None
    return LossCurve(curves[0].x, losses.mean(0), stderr)


def variance_over_directions(curves: Sequence[LossCurve]) -> float:
    """Variance over directions (ddof 0, as in the study), averaged over the grid (H2, H5)."""
    return float(_stacked(curves).var(0).mean())


def variance_pseudo_values(losses: NDArray[np.float64], tokens: NDArray[np.float64]) -> NDArray[np.float64]:
    """Two-way jackknife pseudo-values of `variance_over_directions`: (N, n), one for each direction and sequence.

    With theta the variance, and theta without direction i, sequence j, or both: N n theta - (N - 1) n theta_i
    - N (n - 1) theta_j + (N - 1) (n - 1) theta_ij. Their mean has no first-order bias in either number.

    Args:
        losses: (N, points, n) summed losses, 3 directions or more and 2 sequences or more.
        tokens: (n,) predicted tokens.
    """
    (N, _, n), total = losses.shape, tokens.sum()
    sums = losses.sum(-1, keepdims=True)
    every, without_one = sums / total, (sums - losses) / (total - tokens)

    def without_each(means: NDArray[np.float64]) -> NDArray[np.float64]:
        """(N, k) variances without one direction each, of means (N, points, k)."""
        apart = means - means.mean(0)
        squares = (apart**2).sum(0) - apart**2
        return (squares / (N - 1) - (apart / (N - 1)) ** 2).mean(1)

    one_way = N * n * every.var(0).mean(0) - N * (n - 1) * without_one.var(0).mean(0)
    return one_way + (N - 1) * ((n - 1) * without_each(without_one) - n * without_each(every))


def _stacked(curves: Sequence[LossCurve]) -> NDArray[np.float64]:
    if not curves or any(not np.array_equal(curve.x, curves[0].x) for curve in curves):
        raise ValueError(f"{len(curves)} curves: give one or more, all on the same grid")
    return np.stack([curve.loss for curve in curves])
