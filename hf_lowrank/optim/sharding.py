"""Matrices whose rows are spread over processes (FSDP2), and what a projected optimizer communicates about them.

Rows are dealt out as `torch.chunk` does it: every process holds ceil(m / world) of them, the last ones fewer or none.
Every process must make the same calls for the same matrices in the same order. A stack (E, m, n) is sharded by the
rows of its matrices or, as `fully_shard` does by default, by whole matrices, about which nothing is communicated.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from hf_lowrank.sharding import local

__all__ = ["RowShards", "all_finite"]


@dataclass(frozen=True)
class RowShards:
    """How the rows of a matrix (m, n) are spread over processes; without a mesh one process holds all of them.

    Attributes:
        mesh, placements: of the parameter's DTensor; one mesh dimension shards rows, the others replicate (HSDP).
        dim: index of the mesh dimension that shards.
        by_matrix: whether that dimension deals out the whole matrices of a stack (E, m, n).
    """

    mesh: Any = None
    placements: tuple[Any, ...] = ()
    dim: int = 0
    by_matrix: bool = False

    @classmethod
    def of(cls, p: Tensor, name: str) -> "RowShards":
        """The layout of a parameter.

        Raises:
            ValueError: it is sharded otherwise than by rows or, a stack, by matrices (tensor parallelism, or a custom
                shard placement).
        """
        if not isinstance(p, DTensor):
            return _WHOLE
        placements: tuple[Any, ...] = tuple(p.placements)
        sharding = [i for i, placement in enumerate(placements) if not isinstance(placement, Replicate)]
        if not sharding:
            sharding = [len(placements) - 1]
        placement = placements[sharding[0]]
        replicated, axes = isinstance(placement, Replicate), range(max(p.ndim - 1, 1))
        if not replicated and (len(sharding) > 1 or type(placement) is not Shard or placement.dim not in axes):
            raise ValueError(
                f"parameter {name} is placed as {placements}: a projected weight may be sharded by rows over one mesh "
                "dimension (fully_shard's default), or a stack of them by its first dimension, not by columns or "
                "tensor parallelism as well; leave it out with target_modules"
            )
        return cls(p.device_mesh, placements, sharding[0], not replicated and placement.dim < p.ndim - 2)

    @property
    def whole(self) -> bool:
        """Whether this process holds all rows of the matrices that it holds."""
        return self.mesh is None or self.by_matrix or isinstance(self.placements[self.dim], Replicate)

    def matrices(self, count: int) -> range:
        """Those of a stack's `count` matrices that this process holds, or has rows of."""
        if not self.by_matrix:
            return range(count)
        chunk, rank = -(-count // self.mesh.size(self.dim)), self.mesh.get_local_rank(self.dim)
        return range(min(rank * chunk, count), min((rank + 1) * chunk, count))

    @property
    def group(self) -> Any:
        """The process group over which the rows are spread."""
        return self.mesh.get_group(self.dim)

    @property
    def world(self) -> int:
        """Number of processes that share the rows."""
        return 1 if self.mesh is None or self.by_matrix else int(self.mesh.size(self.dim))

    @property
    def rank(self) -> int:
        """This process's place among them."""
        return 0 if self.mesh is None or self.by_matrix else int(self.mesh.get_local_rank(self.dim))

    def _chunk(self, rows: int) -> int:
        return -(-rows // self.world)

    def local_rows(self, whole: Tensor) -> Tensor:
        """This process's rows of a whole tensor (m, ...)."""
        if self.whole:
            return whole
        chunk = self._chunk(len(whole))
        return whole[min(self.rank * chunk, len(whole)) : (self.rank + 1) * chunk]

    def zeros(self, like: Tensor, shape: tuple[int, ...], by_rows: bool) -> Tensor:
        """Zeros of the global `shape`: a DTensor where the parameter is one, spread as it is, or whole.

        Args:
            like: the parameter.
            shape: as many dimensions as it has, of which the one that is sharded may have another length.
            by_rows: whether these rows are W's.
        """
        if self.mesh is None:
            return like.new_zeros(shape)
        spread = not isinstance(self.placements[self.dim], Replicate) and (by_rows or self.by_matrix)
        placements, own = self.placements if spread else [Replicate()] * len(self.placements), list(shape)
        if spread:
            axis = self.placements[self.dim].dim
            size, chunk = shape[axis], -(-shape[axis] // self.mesh.size(self.dim))
            own[axis] = min(max(size - self.mesh.get_local_rank(self.dim) * chunk, 0), chunk)
        stride = tuple(torch.empty(shape, device="meta").stride())
        part = local(like).new_zeros(own)
        return DTensor.from_local(part, self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over the processes, in place."""
        if self.whole:
            return
        work = [dist.all_reduce(tensor, group=self.group, async_op=True) for tensor in tensors]
        for handle in work:
            handle.wait()

    def gather(self, part: Tensor, rows: int, owner: int) -> Tensor | None:
        """The whole matrix (rows, ...) on the process with rank `owner`, None on the others."""
        if self.whole:
            return part if self.rank == owner else None
        # gather wants parts of equal sizes
        padded = part.new_zeros(self._chunk(rows), *part.shape[1:])
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in range(self.world)] if self.rank == owner else None
        dist.gather(padded, parts, dst=dist.get_global_rank(self.group, owner), group=self.group)
        return None if parts is None else torch.cat(parts)[:rows]

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Overwrite `tensor` with the one on the process with rank `owner`."""
        if self.mesh is None or self.by_matrix:
            return
        dist.broadcast(tensor, src=dist.get_global_rank(self.group, owner), group=self.group)


_WHOLE = RowShards()


def all_finite(tensors: list[Tensor], meshes: list[Any]) -> list[bool]:
    """Whether each tensor holds finite numbers only: if it is sharded, on every process of its mesh."""
    if not tensors:
        return []
    # NaN and infinity go through a sum, and cannot leave it again; one that is not finite may also have overflowed
    if not tensors[0].is_cuda and all(mesh is None for mesh in meshes):
        return [math.isfinite(x.sum().item()) or bool(_extremes(x).isfinite().all()) for x in tensors]
    finite = torch.stack([x.sum().to(tensors[0].device) for x in tensors]).isfinite()
    if not finite.all():
        finite = torch.stack([_extremes(x).to(tensors[0].device) for x in tensors]).isfinite().all(1)
    flags = finite.to(torch.int32)
    for mesh in dict.fromkeys(mesh for mesh in meshes if mesh is not None):
        index = [i for i, other in enumerate(meshes) if other == mesh]
        part = flags[index]
        for dim in range(mesh.ndim):
            dist.all_reduce(part, op=dist.ReduceOp.MIN, group=mesh.get_group(dim))
        flags[index] = part
    return [bool(flag) for flag in flags.tolist()]


def _extremes(x: Tensor) -> Tensor:
    return torch.stack(torch.aminmax(x)) if x.numel() > 0 else x.new_zeros(2)
