"""Trace and largest eigenvalue of the loss's Hessian, from Hessian-vector products.

theta: all parameters that require a gradient, as one vector; H: the Hessian of the loss in them, in nats.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hf_lowrank.metrics.perplexity import Estimate
from hf_lowrank.sharding import all_reduce_sum, raise_together

__all__ = ["Eigenpair", "hessian_trace", "quadratic_forms", "top_eigenpair", "top_eigenvalue"]

# of the model: the loss, a scalar tensor, or its shares, scalars whose sum is the loss
LossFunction = Callable[[nn.Module], Tensor | Sequence[Tensor]]
# most bytes of Lanczos vectors that are kept, on the CPU, for the eigenvector
KEPT_VECTORS = 2**32


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Use eager attention and no recomputation: fused attention has no double backward (pytorch issue 116350)."""
    switch = getattr(model, "set_attn_implementation", None)
    before = getattr(getattr(model, "config", None), "_attn_implementation", None)
    recomputing = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]
    if callable(switch) and before is not None:
        switch("eager")
    for module in recomputing:
        setattr(module, "gradient_checkpointing", False)  # noqa: B010
    try:
        yield
    finally:
        if callable(switch) and before is not None:
            switch(before)
        for module in recomputing:
            setattr(module, "gradient_checkpointing", True)  # noqa: B010


class _Hessian:
    """Products H v, with v^T H_k v of each share k of the loss; the gradients' graphs are built once and kept."""

    def __init__(self, model: nn.Module, loss_fn: LossFunction, shared: bool) -> None:
        self.shared = shared
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("no parameter requires a gradient: there is no curvature to measure")
        with torch.enable_grad():
            losses = loss_fn(model)
            shares = [losses] if isinstance(losses, Tensor) else list(losses)
            # of several shares, a process may have none
            free = shared and not isinstance(losses, Tensor)
            if any(share.ndim for share in shares) or not (free or any(share.requires_grad for share in shares)):
                raise ValueError("loss_fn must return a scalar tensor that depends on the parameters (no no_grad)")
            self.pairs = [self._gradient(share) if share.requires_grad else [] for share in shares]

    def _gradient(self, share: Tensor) -> list[tuple[Tensor, int]]:
        """The gradient's tensors that have a graph, each with its parameter's number."""
        grads = torch.autograd.grad(share, self.parameters, create_graph=True, allow_unused=True)
        # a loss that is linear in a parameter has a gradient without a graph, and no curvature there
        return [(g, i) for i, g in enumerate(grads) if g is not None and g.requires_grad]

    def apply(self, v: list[Tensor]) -> tuple[list[Tensor], NDArray[np.float64]]:
        """H v, and v^T H_k v for every share: (shares,)."""
        product, forms = raise_together(lambda: self._products(v), self.shared)
        if self.shared:
            product, forms = [all_reduce_sum(part) for part in product], all_reduce_sum(forms)
        return product, forms.numpy()

    def _products(self, v: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        product, forms = (
            [torch.zeros_like(p) for p in self.parameters],
            torch.zeros(len(self.pairs), dtype=torch.float64),
        )
        for k, pairs in enumerate(self.pairs):
            if not pairs:
                continue
            (gradients, numbers) = zip(*pairs, strict=True)
            products = torch.autograd.grad(
                gradients, self.parameters, [v[i] for i in numbers], retain_graph=True, allow_unused=True
            )
            for total, part, factor in zip(product, products, v, strict=True):
                if part is not None:
                    total += part
                    forms[k] += torch.sum(part * factor, dtype=torch.float64).item()
        return product, forms


def _dot(u: list[Tensor], v: list[Tensor]) -> float:
    return sum(torch.sum(a.double() * b.double()).item() for a, b in zip(u, v, strict=True))


def hessian_trace(
    model: nn.Module, loss_fn: LossFunction, samples: int = 32, seed: int = 0, shared: bool = False
) -> Estimate:
    """Trace of H by Hutchinson's estimator with signs: E[v^T H v] over random v in {-1, 1}.

    Args:
        model: in eval mode; parameters and their `grad` are not touched.
        loss_fn: scalar tensor from the model, on a fixed batch; or several, whose sum is the loss.
        samples: number of products H v; each costs about as much as two gradients.
        seed: of the signs.
        shared: every process calls this with a loss_fn for its share; the loss is the sum of the shares.

    Returns:
        The mean over samples and its standard error over them (NaN for one sample).

    Raises:
        ValueError: nothing requires a gradient, the loss does not depend on it, or `samples` is below 1.
    """
    values = quadratic_forms(model, loss_fn, samples, seed, shared).sum(1)
    stderr = float(values.std(ddof=1) / math.sqrt(samples)) if samples > 1 else math.nan
    return Estimate(float(values.mean()), stderr)


def quadratic_forms(
    model: nn.Module, loss_fn: LossFunction, samples: int, seed: int = 0, shared: bool = False
) -> NDArray[np.float64]:
    """v^T H_k v of each random v in {-1, 1} and each share k of the loss: (samples, shares).

    Their sum over shares, averaged over samples, estimates the trace. See `hessian_trace`.
    """
    if samples < 1:
        raise ValueError(f"samples={samples!r}: give 1 or more")
    generator, forms = torch.Generator().manual_seed(seed), []
    with twice_differentiable(model):
        hessian = raise_together(lambda: _Hessian(model, loss_fn, shared), shared)
        for _ in range(samples):
            forms.append(hessian.apply([_signs(p, generator) for p in hessian.parameters])[1])
    return np.stack(forms)


def _signs(p: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, p.shape, generator=generator, dtype=torch.int8) * 2 - 1
    return signs.to(device=p.device, dtype=p.dtype)


def top_eigenvalue(
    model: nn.Module, loss_fn: LossFunction, iterations: int = 30, seed: int = 0, shared: bool = False
) -> Estimate:
    """Largest eigenvalue of H by Lanczos iteration from a random start; see `top_eigenpair`.

    Returns:
        The largest Ritz value. `stderr` is its residual norm; an eigenvalue of H lies within that distance.
    """
    pair = top_eigenpair(model, loss_fn, iterations, seed, shared, shares=False)
    return Estimate(pair.value, pair.residual)


@dataclass(frozen=True)
class Eigenpair:
    """The largest Ritz value of H and what it consists of.

    Attributes:
        value: the Ritz value lambda.
        residual: norm of H y - lambda y for its unit vector y: an eigenvalue of H lies within that distance.
        shares: (shares,) of each share k of the loss y^T H_k y, the derivative of lambda by the share's weight; their
            sum is lambda. None where y was not kept.
    """

    value: float
    residual: float
    shares: NDArray[np.float64] | None


def top_eigenpair(
    model: nn.Module,
    loss_fn: LossFunction,
    iterations: int = 30,
    seed: int = 0,
    shared: bool = False,
    shares: bool = True,
) -> Eigenpair:
    """Largest eigenvalue of H by Lanczos iteration from a random start, and how the loss's shares make it up.

    Without reorthogonalisation, only three vectors of theta's size are kept. Rounding then produces copies of
    converged eigenvalues, which do not change the largest. For the eigenvector, copies of all vectors stay on the CPU
    in bfloat16, unless they would take more than 4 GB; that costs one product H v more.

    Args:
        model: in eval mode; parameters and their `grad` are not touched.
        loss_fn: as for `hessian_trace`.
        iterations: largest number of products H v; fewer if the Krylov space is exhausted.
        seed: of the start.
        shared: as for `hessian_trace`.
        shares: whether to measure `Eigenpair.shares`.

    Raises:
        ValueError: as for `hessian_trace`, or the products H v are not finite.
    """
    if iterations < 1:
        raise ValueError(f"iterations={iterations!r}: give 1 or more")
    generator = torch.Generator().manual_seed(seed)
    with twice_differentiable(model):
        hessian = raise_together(lambda: _Hessian(model, loss_fn, shared), shared)
        start = [torch.randn(p.shape, generator=generator).to(p) for p in hessian.parameters]
        fits = 2 * iterations * sum(x.numel() for x in start) <= KEPT_VECTORS
        basis: list[list[Tensor]] | None = [] if shares and fits else None
        diagonal, beside = _lanczos(hessian, start, iterations, basis)
        inner = beside[:-1]
        values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(inner, 1) + np.diag(inner, -1))
        value, residual = float(values[-1]), float(beside[-1] * abs(vectors[-1, -1]))
        return Eigenpair(value, residual, None if basis is None else _shares(hessian, basis, vectors[:, -1], value))


def _lanczos(
    hessian: _Hessian, v: list[Tensor], iterations: int, basis: list[list[Tensor]] | None
) -> tuple[list[float], list[float]]:
    """The tridiagonal matrix: its k diagonal elements and k beside them, the last one the residual's norm.

    The vectors are appended to `basis` on the CPU in bfloat16.
    """
    length = math.sqrt(_dot(v, v))
    v, earlier = [x / length for x in v], [torch.zeros_like(x) for x in v]
    diagonal, beside = [], [0.0]
    for _ in range(iterations):
        if basis is not None:
            basis.append([x.to("cpu", torch.bfloat16) for x in v])
        w, _ = hessian.apply(v)
        diagonal.append(_dot(w, v))
        if not math.isfinite(diagonal[-1]):
            raise ValueError("the Hessian's products are not finite: look for NaN or infinity in weights and loss")
        w = [x - diagonal[-1] * y - beside[-1] * z for x, y, z in zip(w, v, earlier, strict=True)]
        beside.append(math.sqrt(_dot(w, w)))
        if beside[-1] <= 1e-10 * max(map(abs, [*diagonal, 1e-300])):
            break
        v, earlier = [x / beside[-1] for x in w], v
    return diagonal, beside[1:]


def _shares(
    hessian: _Hessian, basis: list[list[Tensor]], weights: NDArray[np.float64], value: float
) -> NDArray[np.float64]:
    """y^T H_k y of every share, for the unit vector y that is the weighted sum of the basis."""
    y = [torch.zeros_like(p) for p in hessian.parameters]
    for vector, weight in zip(basis, weights, strict=True):
        for total, part in zip(y, vector, strict=True):
            total.add_(part.to(total), alpha=float(weight))
    forms = hessian.apply(y)[1] / _dot(y, y)
    # what the rounding of the basis leaves
    return forms + (value - forms.sum()) / len(forms)
