"""Norms that scale an update by rows, columns or as a whole, also over sharded rows, and how fast they may grow."""

import torch
from torch import Tensor

from hf_lowrank.optim.projected import Matrix

__all__ = ["limit_growth", "norms", "sum_over_rows"]

# how much the norm of a residual update may grow in one step (Fira's norm-growth limiter)
GROWTH_LIMIT = 1.01


def norms(X: Tensor, axis: int | None) -> Tensor:
    """Euclidean norms over an axis, which is kept, or of the whole matrix: in float32 where X has less precision."""
    dtype = torch.promote_types(X.dtype, torch.float32)
    if axis is None:
        return torch.linalg.vector_norm(X, dtype=dtype)
    if axis == 0:
        # a reduction of norms along columns takes 7 times as long on a CPU
        return X.to(dtype).square().sum(0, keepdim=True).sqrt()
    return torch.linalg.vector_norm(X, dim=axis, keepdim=True, dtype=dtype)


def sum_over_rows(matrices: list[Matrix], values: list[Tensor]) -> list[Tensor]:
    """Sum scalars over the processes that share each matrix's rows; one collective for all of them."""
    if matrices[0].shards.whole:
        return values
    stacked = torch.stack(values)
    matrices[0].shards.all_reduce([stacked])
    return list(stacked.unbind())


def limit_growth(norm: Tensor, previous: Tensor) -> Tensor:
    """Factor that keeps `norm` within 1.01 x the `previous` limited one, which is overwritten: Fira's limiter.

    As in the official code the first step is not limited and 1e-8 is added to the previous norm. Unlike there, a zero
    norm is no measure for the next one: after a step without a gradient the weight would stand still for the 1850
    steps that 1e-8 takes to grow to 1.
    """
    factor = GROWTH_LIMIT / (norm / (previous.to(norm.dtype) + 1e-8)).clamp_min(GROWTH_LIMIT)
    factor = torch.where(previous > 0, factor, 1.0)
    # a norm that overflows takes its residual out of this step, and leaves the measure for the next one
    finite = norm.isfinite()
    previous.copy_(torch.where(finite & (norm > 0), norm * factor, previous.to(norm.dtype)))
    return torch.where(finite, factor, 0.0)
