"""Trace and largest eigenvalue of the loss's Hessian, from Hessian-vector products.

theta: all parameters that require a gradient, as one vector; H: the Hessian of the loss in them, in nats.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hf_lowrank.metrics.perplexity import Estimate
from hf_lowrank.sharding import all_reduce_sum, raise_together

__all__ = ["hessian_trace", "quadratic_forms", "top_eigenvalue"]

LossFunction = Callable[[nn.Module], Tensor]


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
    """Products H v; the gradient's graph is built once and kept."""

    def __init__(self, model: nn.Module, loss_fn: LossFunction, shared: bool) -> None:
        self.shared = shared
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("no parameter requires a gradient: there is no curvature to measure")
        with torch.enable_grad():
            loss = loss_fn(model)
            if loss.ndim != 0 or not loss.requires_grad:
                raise ValueError("loss_fn must return a scalar tensor that depends on the parameters (no no_grad)")
            grads = torch.autograd.grad(loss, self.parameters, create_graph=True, allow_unused=True)
        # a loss that is linear in a parameter has a gradient without a graph, and no curvature there
        self.pairs = [(g, i) for i, g in enumerate(grads) if g is not None and g.requires_grad]

    def __matmul__(self, v: list[Tensor]) -> list[Tensor]:
        product = raise_together(lambda: self._product(v), self.shared)
        return [all_reduce_sum(part) for part in product] if self.shared else product

    def _product(self, v: list[Tensor]) -> list[Tensor]:
        product = [torch.zeros_like(p) for p in self.parameters]
        if self.pairs:
            products = torch.autograd.grad(
                [g for g, _ in self.pairs],
                self.parameters,
                [v[i] for _, i in self.pairs],
                retain_graph=True,
                allow_unused=True,
            )
            product = [zero if part is None else part for zero, part in zip(product, products, strict=True)]
        return product


def _dot(u: list[Tensor], v: list[Tensor]) -> float:
    return sum(torch.sum(a.double() * b.double()).item() for a, b in zip(u, v, strict=True))


def hessian_trace(
    model: nn.Module, loss_fn: LossFunction, samples: int = 32, seed: int = 0, shared: bool = False
) -> Estimate:
    """Trace of H by Hutchinson's estimator with signs: E[v^T H v] over random v in {-1, 1}.

    Args:
        model: in eval mode; parameters and their `grad` are not touched.
        loss_fn: scalar tensor from the model, on a fixed batch.
        samples: number of products H v; each costs about as much as two gradients.
        seed: of the signs.
        shared: every process calls this with a loss_fn for its share; the loss is the sum of the shares.

    Returns:
        The mean over samples and its standard error (NaN for one sample).

    Raises:
        ValueError: nothing requires a gradient, the loss does not depend on it, or `samples` is below 1.
    """
    values = quadratic_forms(model, loss_fn, samples, seed, shared)
    stderr = float(values.std(ddof=1) / math.sqrt(samples)) if samples > 1 else math.nan
    return Estimate(float(values.mean()), stderr)


def quadratic_forms(
    model: nn.Module, loss_fn: LossFunction, samples: int, seed: int = 0, shared: bool = False
) -> NDArray[np.float64]:
    """v^T H v of each random v in {-1, 1}, (samples,): their mean estimates the trace. See `hessian_trace`."""
    if samples < 1:
        raise ValueError(f"samples={samples!r}: give 1 or more")
    generator, forms = torch.Generator().manual_seed(seed), []
    with twice_differentiable(model):
        hessian = raise_together(lambda: _Hessian(model, loss_fn, shared), shared)
        for _ in range(samples):
            v = [_signs(p, generator) for p in hessian.parameters]
            forms.append(_dot(v, hessian @ v))
    return np.asarray(forms)


def _signs(p: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, p.shape, generator=generator, dtype=torch.int8) * 2 - 1
    return signs.to(device=p.device, dtype=p.dtype)


def top_eigenvalue(
    model: nn.Module, loss_fn: LossFunction, iterations: int = 30, seed: int = 0, shared: bool = False
) -> Estimate:
    """Largest eigenvalue of H by Lanczos iteration from a random start.

    Without reorthogonalisation, only three vectors of theta's size are kept. Rounding then produces copies of
    converged eigenvalues, which do not change the largest.

    Args:
        model: in eval mode; parameters and their `grad` are not touched.
        loss_fn: scalar tensor from the model, on a fixed batch.
        iterations: largest number of products H v; fewer if the Krylov space is exhausted.
        seed: of the start.
        shared: as for `hessian_trace`.

    Returns:
        The largest Ritz value. `stderr` is its residual norm; an eigenvalue of H lies within that distance.

    Raises:
        ValueError: as for `hessian_trace`, or the products H v are not finite.
    """
    if iterations < 1:
        raise ValueError(f"iterations={iterations!r}: give 1 or more")
    generator = torch.Generator().manual_seed(seed)
    with twice_differentiable(model):
        hessian = raise_together(lambda: _Hessian(model, loss_fn, shared), shared)
        v = [torch.randn(p.shape, generator=generator).to(p) for p in hessian.parameters]
        length = math.sqrt(_dot(v, v))
        v, earlier = [x / length for x in v], [torch.zeros_like(x) for x in v]
        diagonal, beside = [], [0.0]
        for _ in range(iterations):
            w = hessian @ v
            diagonal.append(_dot(w, v))
            if not math.isfinite(diagonal[-1]):
                raise ValueError("the Hessian's products are not finite: look for NaN or infinity in weights and loss")
            w = [x - diagonal[-1] * y - beside[-1] * z for x, y, z in zip(w, v, earlier, strict=True)]
            beside.append(math.sqrt(_dot(w, w)))
            if beside[-1] <= 1e-10 * max(map(abs, [*diagonal, 1e-300])):
                break
            v, earlier = [x / beside[-1] for x in w], v
    inner = beside[1 : len(diagonal)]
    values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(inner, 1) + np.diag(inner, -1))
    return Estimate(float(values[-1]), float(beside[-1] * abs(vectors[-1, -1])))
