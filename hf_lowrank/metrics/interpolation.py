"""The loss on the line between two sets of weights, and the barrier on it (H6, H7)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hf_lowrank.metrics.perturb import check_names, kept

__all__ = ["Barrier", "barrier", "loss_path"]


@dataclass(frozen=True)
class Barrier:
    """How high the loss rises between two ends, in the unit of the loss.

    Attributes:
        value: highest interior loss minus the mean of the two end losses (the study's).
        chord: highest interior excess over the straight line between the end losses (Frankle et al. 2020).
        alpha: where the highest interior loss lies.
    """

    value: float
    chord: float
    alpha: float


@torch.no_grad()
def loss_path(
    model: nn.Module,
    state_a: Mapping[str, Tensor],
    state_b: Mapping[str, Tensor],
    loss_fn: Callable[[nn.Module], float],
    alphas: Sequence[float] | NDArray[np.float64],
) -> NDArray[np.float64]:
    """L((1 - a) theta_A + a theta_B) for every a.

    Sums are in float32 or better and rounded once to the model's dtype; a = 0 and a = 1 are the given weights exactly.
    The model ends bit for bit as it was, after an exception as well.

    Args:
        model: put it into eval mode first; its own weights do not matter.
        state_a, state_b: state dicts of this model.
        loss_fn: of the model, on a fixed evaluation set.
        alphas: positions; 0 is A, 1 is B, beyond them the line is extended.

    Raises:
        ValueError: a state dict is not this model's, or what is no number with a fraction (a sparse support) differs.
    """
    own = model.state_dict(keep_vars=True)
    for what, state in (("state_a", state_a), ("state_b", state_b)):
        check_names(state, own, what)
    for name, a in state_a.items():
        if not a.is_floating_point() and not torch.equal(a.cpu(), state_b[name].cpu()):
            raise ValueError(
                f"{name} differs between the two state dicts and cannot be interpolated: take dense forms "
                "(hf_lowrank.to_dense) of both"
            )
    losses = []
    with kept(own):
        for alpha in alphas:
            for name, tensor in own.items():
                tensor.copy_(_between(state_a[name], state_b[name], float(alpha)))
            losses.append(float(loss_fn(model)))
    return np.asarray(losses)


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
        alphas: positions with 0 and 1 among them and at least one between; positions beyond them do not count.
        losses: one a position.

    Raises:
        ValueError: lengths differ, or the grid lacks 0, 1 or an interior point.
    """
    x, loss = np.asarray(alphas, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if x.shape != loss.shape or x.ndim != 1:
        raise ValueError(f"{x.shape} positions and {loss.shape} losses: give one loss a position")
    ends = [np.flatnonzero(np.isclose(x, end, rtol=0, atol=1e-9)) for end in (0.0, 1.0)]
    inside = np.flatnonzero((x > 1e-9) & (x < 1 - 1e-9))
    if any(len(found) != 1 for found in ends) or len(inside) == 0:
        raise ValueError("the grid needs 0 and 1 once and a point between them: np.linspace(0, 1, 21) has that")
    first, last = (float(loss[found[0]]) for found in ends)
    excess = loss[inside] - (1 - x[inside]) * first - x[inside] * last
    top = int(np.argmax(loss[inside]))
    return Barrier(
        value=float(loss[inside][top] - (first + last) / 2),
        chord=float(excess.max()),
        alpha=float(x[inside][top]),
    )
