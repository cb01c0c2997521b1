"""Norms that scale an update by rows, columns or as a whole (Fira, APOLLO), also over sharded rows."""

import torch
from torch import Tensor

from hf_lowrank.optim.projected import Matrix

__all__ = ["norms", "sum_over_rows"]


def norms(X: Tensor, axis: int | None) -> Tensor:
    """Euclidean norms over an axis, which is kept, or of the whole matrix: in float32 where X has less precision."""
    dtype = torch.promote_types(X.dtype, torch.float32)
    if axis is None:
        return torch.linalg.vector_norm(X, dtype=dtype)
    return torch.linalg.vector_norm(X, dim=axis, keepdim=True, dtype=dtype)


def sum_over_rows(matrices: list[Matrix], values: list[Tensor]) -> list[Tensor]:
    """Sum scalars over the processes that share each matrix's rows; one collective for all of them."""
    shards = matrices[0].shards
    if shards is None:
        return values
    stacked = torch.stack(values)
    shards.all_reduce([stacked])
    return list(stacked.unbind())
