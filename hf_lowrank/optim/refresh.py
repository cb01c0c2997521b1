"""Who computes new projectors, and how they reach the processes that need them.

Rows that are spread over processes (FSDP2): each matrix is gathered to one owner, decomposed there, and its projector
is broadcast. Replicas (DDP): every process has the whole gradient; the matrices are dealt out by their cost, and each
process broadcasts what it computed. Every process must make the same calls for the same matrices in the same order.
"""

import logging
from collections.abc import Callable, Hashable, Sequence
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from hf_lowrank.optim.matrix import Matrix
from hf_lowrank.sharding import all_gather_object, rank_and_world

__all__ = ["deal", "refresh"]

logger = logging.getLogger(__name__)

# new projector of a matrix from its whole gradient and its whole previous projector, None at the first refresh
Compute = Callable[[Matrix, Tensor, list[Tensor] | None], list[Tensor]]


def refresh(matrices: list[Matrix], compute: Compute, replicas: bool, rotate: bool = False) -> None:
    """Overwrite the projectors of matrices by what `compute` makes of their gradients.

    Args:
        matrices: all whose refresh is due, those that another process holds as well.
        compute: called once for a matrix, on its owner.
        replicas: whether every process of the default group has these matrices and gradients (DDP).
        rotate: as for `Matrix.set_projector`.
    """
    dealt = replicas and _replicated([x for x in matrices if x.shards.mesh is None])
    by_layout: dict[Hashable, list[Matrix]] = {}
    for x in matrices:
        if x.own:
            by_layout.setdefault((x.shards, x.G.device, x.G.dtype), []).append(x)
    for alike in by_layout.values():
        shards = alike[0].shards
        if shards.mesh is None:
            _refresh_dealt(alike, compute, dealt, rotate)
            continue
        # one matrix a process at a time: each is whole on its owner alone
        for start in range(0, len(alike), shards.world):
            _refresh_gathered(alike[start : start + shards.world], compute, rotate)


def deal(costs: Sequence[float], world: int) -> list[int]:
    """Owner of each piece of work: the dearest first, always to the one who has least to do."""
    owners, load = [0] * len(costs), [0.0] * world
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = min(range(world), key=load.__getitem__)
        load[owners[i]] += costs[i]
    return owners


def _cost(x: Matrix) -> float:
    """Operations of a refresh in units of one product's: the Gram matrix, and its eigenvectors."""
    m, n = x.shape
    return min(m, n) ** 2 * (max(m, n) + 10.0 * min(m, n))


def _replicated(matrices: list[Matrix]) -> bool:
    """Whether all processes are about to refresh the same matrices by the same gradients."""
    gradients = [(x.name, x.shape, x.G.sum(dtype=torch.float64).item()) for x in matrices]
    everywhere = all_gather_object(gradients)
    if any(other != gradients for other in everywhere):
        _warn_of_differences()
        return False
    return len(everywhere) > 1


@cache
def _warn_of_differences() -> None:
    logger.warning("the processes' gradients differ: each finds all of its projectors by itself (logged once)")


def _refresh_dealt(matrices: list[Matrix], compute: Compute, dealt: bool, rotate: bool) -> None:
    """Refresh whole matrices: all of them here, or each on the process that it is dealt to."""
    rank, world = rank_and_world() if dealt else (0, 1)
    owners = deal([_cost(x) for x in matrices], world)
    if world == 1:
        for x in matrices:
            x.set_projector(compute(x, x.G, _previous(x)), rotate)
        return
    fresh = {x: compute(x, x.G, _previous(x)) for x, owner in zip(matrices, owners, strict=True) if owner == rank}
    for owner in range(world):
        its = [x for x, other in zip(matrices, owners, strict=True) if other == owner]
        sizes = [P.numel() for x in its for P in x.projector]
        if not its:
            continue
        if owner == rank:
            together = torch.cat([P.reshape(-1) for x in its for P in fresh[x]])
        else:
            together = its[0].G.new_empty(sum(sizes))
        dist.broadcast(together, src=owner)
        parts = iter(together.split(sizes))
        for x in its:
            x.set_projector([next(parts).view(P.shape) for P in x.projector], rotate)


def _previous(x: Matrix) -> list[Tensor] | None:
    return x.projector if x.t > 1 else None


def _refresh_gathered(matrices: list[Matrix], compute: Compute, rotate: bool) -> None:
    """Refresh at most one matrix a process: gather it to its owner, decompose it there, broadcast the projector."""
    gathered: list[tuple[Tensor | None, list[Tensor | None]]] = []
    for owner, x in enumerate(matrices):
        G, m = x.shards.gather(x.G, x.shape[0], owner), x.shape[0]
        previous = [x.shards.gather(P, m, owner) if _by_rows(x, i) else P for i, P in enumerate(x.projector)]
        gathered.append((G, previous if x.t > 1 else []))
    own: list[Tensor] = []
    for x, (G, previous) in zip(matrices, gathered, strict=True):
        if G is not None:
            own = compute(x, G, [P for P in previous if P is not None] or None)
    for owner, x in enumerate(matrices):
        fresh = []
        for i, kept in enumerate(x.projector):
            shape = (x.shape[0], kept.shape[1]) if _by_rows(x, i) else tuple(kept.shape)
            whole = own[i] if x.shards.rank == owner else kept.new_empty(shape)
            x.shards.broadcast(whole, owner)
            fresh.append(x.shards.local_rows(whole) if _by_rows(x, i) else whole)
        x.set_projector(fresh, rotate)


def _by_rows(x: Matrix, i: int) -> bool:
    """Whether the projector's i-th matrix has W's rows."""
    return i == 0 and x.where != "right"
