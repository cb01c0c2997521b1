"""The loss on the line between two sets of weights, and the barrier on it (H6, H7)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hf_lowrank.metrics.perturb import apart, check_names, kept, parameters_of
from hf_lowrank.sharding import local, reshard

__all__ = ["Barrier", "barrier", "barrier_weights", "chord_weights", "each_between", "loss_path"]

T = TypeVar("T")

# how far a position may lie from the 0 or 1 that it is meant to be
ROUNDING = 1e-9


@dataclass(frozen=True)
class Barrier:
    """How high the loss rises between two ends, in the unit of the loss.

    Attributes:
        value: highest interior loss minus the mean of the two end losses, as in the study.
        chord: highest interior excess over the straight line between the end losses (Frankle et al. 2020).
        alpha: position of the highest interior loss; NaN if the barrier is not finite.
    """

    value: float
    chord: float
    alpha: float


def loss_path(
    model: nn.Module,
    state_a: Mapping[str, Tensor],
    state_b: Mapping[str, Tensor],
    loss_fn: Callable[[nn.Module], float],
    alphas: Sequence[float] | NDArray[np.float64],
) -> NDArray[np.float64]:
    """L((1 - a) theta_A + a theta_B) for every a.

    Sums are in float32 or better and rounded once to the model's dtype; a = 0 and a = 1 are exactly the given weights.
    Afterwards, also after an exception, the model is bit for bit what it was.

    Args:
        model: in eval mode; its own weights do not matter.
        state_a, state_b: state dicts of this model; one may be the model's own.
        loss_fn: the model's loss on a fixed evaluation set.
        alphas: positions; 0 is A, 1 is B, and positions outside extend the line.

    Raises:
        ValueError: a state dict is not this model's, or integers in it (a sparse support) differ.
    """
    return np.asarray(each_between(model, state_a, state_b, alphas, lambda model: float(loss_fn(model))))


@torch.no_grad()
def each_between(
    model: nn.Module,
    state_a: Mapping[str, Tensor],
    state_b: Mapping[str, Tensor],
    alphas: Sequence[float] | NDArray[np.float64],
    measure: Callable[[nn.Module], T],
) -> list[T]:
    """Call `measure` at every point of the line; return its results. See `loss_path`.

    If FSDP2 shards the model, the state dicts hold this process's parts, or DTensors, and every process calls this.
    """
    reshard(model)
    # quantised numbers are refused
    parameters_of(model)
    own = model.state_dict(keep_vars=True)
    mine = {name: local(tensor.detach()) for name, tensor in own.items()}
    for what, state in (("state_a", state_a), ("state_b", state_b)):
        check_names({name: local(tensor) for name, tensor in state.items()}, mine, what)
    for name, a in state_a.items():
        if not a.is_floating_point() and not torch.equal(a.cpu(), state_b[name].cpu()):
            raise ValueError(
                f"{name} differs between the two state dicts and cannot be interpolated: take dense forms "
                "(hf_lowrank.to_dense) of both"
            )
    first, last = (
        apart({name: local(tensor.detach()) for name, tensor in state.items()}, mine) for state in (state_a, state_b)
    )
    results = []
    with kept(mine):
        for alpha in map(float, alphas):
            # an end that `linspace` has rounded is still an end
            place = round(alpha) if abs(alpha - round(alpha)) < ROUNDING else alpha
            for name, tensor in mine.items():
                tensor.copy_(_between(first[name], last[name], place))
            results.append(measure(model))
            reshard(model)
    return results


def _between(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    if alpha == 0 or not a.is_floating_point():
        return a
    if alpha == 1:
        return b
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(dtype) * (1 - alpha) + b.to(device=a.device, dtype=dtype) * alpha


def barrier(alphas: Sequence[float] | NDArray[np.float64], losses: Sequence[float] | NDArray[np.float64]) -> Barrier:
    """The barrier of a path.

    Args:
        alphas: positions that include 0, 1 and at least one between; positions outside do not count.
        losses: one for each position.

    Raises:
        ValueError: lengths differ, or the grid lacks 0, 1 or an interior point.
    """
    x, loss = np.asarray(alphas, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if x.shape != loss.shape or x.ndim != 1:
        raise ValueError(f"{x.shape} positions and {loss.shape} losses: give one loss a position")
    ends = [np.flatnonzero(np.abs(x - end) < ROUNDING) for end in (0.0, 1.0)]
    if any(len(end) != 1 for end in ends) or not _inside(x).any():
        raise ValueError("the grid needs 0 and 1 once and a point between them: np.linspace(0, 1, 21) has that")
    value, chord = (
        # a loss beyond the ends does not count, even if it is infinite
        float((weights[weights != 0] * loss[weights != 0]).sum())
        for weights in (barrier_weights(x, loss), chord_weights(x, loss))
    )
    return Barrier(value, chord, float(x[_highest(x, loss)]) if np.isfinite(value) else float("nan"))


def _inside(x: NDArray[np.float64]) -> NDArray[np.bool_]:
    return (x >= ROUNDING) & (x <= 1 - ROUNDING)


def _highest(x: NDArray[np.float64], height: NDArray[np.float64]) -> int:
    """Index of the highest interior point, or of the first that is NaN."""
    inside = np.flatnonzero(_inside(x))
    return int(inside[np.argmax(height[inside])])


def barrier_weights(alphas: NDArray[np.float64], losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights w: (points,) such that the barrier is the sum of w_i L(a_i), with its maximum at the same place."""
    weights = np.zeros(len(alphas))
    for end in (0.0, 1.0):
        weights[np.argmin(np.abs(alphas - end))] -= 0.5
    weights[_highest(alphas, losses)] += 1.0
    return weights


def chord_weights(alphas: NDArray[np.float64], losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights w: (points,) such that the barrier over the chord is the sum of w_i L(a_i), at the same place."""
    first, last = (int(np.argmin(np.abs(alphas - end))) for end in (0.0, 1.0))
    with np.errstate(invalid="ignore"):
        top = _highest(alphas, losses - (1 - alphas) * losses[first] - alphas * losses[last])
    weights = np.zeros(len(alphas))
    weights[top] += 1.0
    weights[first] -= 1 - alphas[top]
    weights[last] -= alphas[top]
    return weights
