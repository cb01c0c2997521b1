"""The loss along straight lines through the parameters (H1 to H5; Li et al. 2018, arXiv 1712.09913).

theta: all named parameters, tied ones once; d: a direction, one tensor of the same shape a parameter; the curve is
L(theta + x d) in nats over a grid of x.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hf_lowrank.metrics.perturb import check_names, kept, parameters_of

__all__ = [
    "NORMALIZATIONS", "LossCurve", "expected_sharpness", "loss_curve", "mean_curve", "random_direction",
    "svd_direction", "variance_over_directions",
]  # fmt: skip

NORMALIZATIONS = ("none", "filter", "layer", "unit")

Direction = dict[str, Tensor]


@dataclass(frozen=True)
class LossCurve:
    """A loss along a line.

    Attributes:
        x: (points,) step lengths along the direction.
        loss: (points,) losses at theta + x d, in the unit of the loss function.
    """

    x: NDArray[np.float64]
    loss: NDArray[np.float64]

    @property
    def center_loss(self) -> float:
        """L(theta), at x = 0; `ValueError` where the grid has no 0."""
        return float(self.loss[_center(self.x)])

    @property
    def min_loss(self) -> float:
        """The least loss on the grid."""
        return float(self.loss.min())

    @property
    def center_to_min(self) -> float:
        """How far the centre lies above the least loss."""
        return self.center_loss - self.min_loss


def _center(x: NDArray[np.float64]) -> int:
    at = np.flatnonzero(x == 0)
    if len(at) != 1:
        raise ValueError(f"the grid has {len(at)} points at exactly 0 and needs one: np.linspace(-a, a, 2 * k + 1)")
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
        normalize: `none` (standard Gaussian entries, the study's), `filter` (each row of a tensor as long as the
            parameter's row, a vector as a whole; Li et al. 2018, Section 4), `layer` (each tensor as long as the
            parameter) or `unit` (the whole direction of length 1).

    Returns:
        Parameter name -> tensor on the parameter's device, in float32 or the parameter's higher precision.

    Raises:
        ValueError: unknown `normalize`.
    """
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"normalize={normalize!r}: it is one of {', '.join(NORMALIZATIONS)}")
    direction = {}
    for name, p in parameters_of(model).items():
        dtype = torch.promote_types(p.dtype, torch.float32)
        drawn = torch.randn(p.shape, generator=_generator(seed, name)).to(device=p.device, dtype=dtype)
        if normalize == "filter" and p.ndim > 1:
            drawn *= _row_norms(p.to(dtype)) / _row_norms(drawn)
        elif normalize in ("filter", "layer"):
            drawn *= p.to(dtype).norm() / drawn.norm()
        direction[name] = drawn
    if normalize == "unit":
        length = sum(tensor.double().square().sum().item() for tensor in direction.values()) ** 0.5
        for tensor in direction.values():
            tensor /= length
    return direction


def _row_norms(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor.flatten(1), dim=1).view(-1, *[1] * (tensor.ndim - 1))


@torch.no_grad()
def svd_direction(model: nn.Module, k: int, sigma_weighted: bool = False, vectors: str = "self") -> Direction:
    """The k-th singular direction of every matrix at once: u_k v_k^T, or sigma_k u_k v_k^T.

    Args:
        model: its parameters.
        k: from 1; a matrix with fewer singular values gets zeros.
        sigma_weighted: multiply by the singular value.
        vectors: what a parameter with one dimension gets: `self` (itself, the study's first form) or `zero`.

    Raises:
        ValueError: k below 1 or unknown `vectors`.
    """
    if k < 1 or vectors not in ("self", "zero"):
        raise ValueError(f"k={k!r}, vectors={vectors!r}: k counts from 1, vectors is 'self' or 'zero'")
    direction = {}
    for name, p in parameters_of(model).items():
        value = p.detach().to(torch.promote_types(p.dtype, torch.float32))
        if p.ndim < 2:
            direction[name] = value.clone() if vectors == "self" else torch.zeros_like(value)
            continue
        U, S, Vh = torch.linalg.svd(value.flatten(1), full_matrices=False)
        if k > len(S):
            direction[name] = torch.zeros_like(value)
            continue
        outer = torch.outer(U[:, k - 1], Vh[k - 1]) * (S[k - 1] if sigma_weighted else 1.0)
        direction[name] = outer.view(p.shape)
    return direction


@torch.no_grad()
def loss_curve(
    model: nn.Module,
    loss_fn: Callable[[nn.Module], float],
    direction: Mapping[str, Tensor],
    grid: Sequence[float] | NDArray[np.float64],
) -> LossCurve:
    """L(theta + x d) for every x of the grid.

    Each point is theta plus x d in float32 or better, rounded once to the parameter's dtype: nothing accumulates from
    point to point, and afterwards the parameters are bit for bit what they were, after an exception as well.

    Args:
        model: put it into eval mode first.
        loss_fn: of the model, on a fixed evaluation set.
        direction: parameter name -> tensor, for every parameter.
        grid: step lengths; symmetric with an exact 0 where sharpness is wanted.

    Raises:
        ValueError: the direction is not one of this model's parameters.
    """
    parameters = parameters_of(model)
    check_names(direction, parameters, "the direction")
    losses = []
    with kept(parameters) as original:
        for x in grid:
            for name, p in parameters.items():
                d = direction[name]
                p.copy_(torch.add(original[name].to(d.dtype), d, alpha=float(x)) if x != 0 else original[name])
            losses.append(float(loss_fn(model)))
    return LossCurve(np.asarray(grid, dtype=np.float64), np.asarray(losses))


def expected_sharpness(curve: LossCurve) -> float:
    """Mean over x > 0 of (L(x) + L(-x)) / 2 - L(0), in the unit of the loss (H1, H3, H4).

    Raises:
        ValueError: the grid is not symmetric about an exact 0.
    """
    order = np.argsort(curve.x)
    x, loss = curve.x[order], curve.loss[order]
    center = _center(x)
    left, right = x[:center][::-1], x[center + 1 :]
    if len(left) != len(right) or len(right) == 0 or not np.allclose(left, -right, rtol=1e-9, atol=0):
        raise ValueError("the grid is not symmetric about 0: np.linspace(-a, a, 2 * k + 1) is")
    return float(((loss[:center][::-1] + loss[center + 1 :]) / 2 - loss[center]).mean())


def mean_curve(curves: Sequence[LossCurve]) -> LossCurve:
    """Pointwise mean of curves on one grid; `ValueError` when there is none or the grids differ."""
    return LossCurve(curves[0].x if curves else np.zeros(0), _stacked(curves).mean(0))


def variance_over_directions(curves: Sequence[LossCurve]) -> float:
    """Variance over directions (ddof 0, as in the study), averaged over the grid (H2, H5)."""
    return float(_stacked(curves).var(0).mean())


def _stacked(curves: Sequence[LossCurve]) -> NDArray[np.float64]:
    if not curves or any(not np.array_equal(curve.x, curves[0].x) for curve in curves):
        raise ValueError(f"{len(curves)} curves: give one or more, all on the same grid")
    return np.stack([curve.loss for curve in curves])
