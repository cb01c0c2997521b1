"""Tensors and work spread over processes: what everything that may meet FSDP2 or DDP shares.

Without a process group there is one process, and nothing is communicated.

torch's modules for sharding cost as much as half of `import torch`. Whoever has made a sharded tensor or model has
imported them, so that they are looked up here and not imported.
"""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

__all__ = [
    "OtherProcessError", "all_gather_object", "all_reduce_sum", "is_dtensor", "is_fsdp", "is_sharded", "like", "local",
    "raise_together", "rank_and_world", "reshard", "whole",
]  # fmt: skip

T = TypeVar("T")


class OtherProcessError(RuntimeError):
    """Another process failed where this one did not."""


def is_dtensor(value: object) -> TypeGuard["DTensor"]:
    """Whether a value is a tensor that is spread over processes."""
    return isinstance(value, getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ()))


def is_fsdp(value: object) -> TypeGuard["FSDPModule"]:
    """Whether a value is a module that FSDP2 shards."""
    return isinstance(value, getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ()))


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, sharing its memory; the tensor itself if it is not sharded."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, for which every process must call this; the tensor itself if it is not sharded."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def assembled(rows: Tensor, model: Tensor) -> Tensor:
    """The whole of a tensor of which each process has its part, as of `model`; every process must call this."""
    if not is_dtensor(model):
        return rows
    sharded = torch.empty_like(model)
    local(sharded).copy_(rows)
    return whole(sharded)


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """A tensor that every process holds whole, sharded as `model` is; nothing is communicated."""
    if not is_dtensor(model):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, model.device_mesh, model.placements, src_data_rank=None)


def reshard(model: nn.Module) -> None:
    """Have FSDP2 put the sharded parameters back, which an evaluation may have left gathered."""
    for module in model.modules():
        if is_fsdp(module):
            module.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards the model."""
    return any(is_fsdp(module) for module in model.modules())


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, the same on each; on the device it came from."""
    if rank_and_world()[1] == 1:
        return tensor
    # NCCL reduces on the GPU alone, gloo on the CPU
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    total = tensor.detach().to(device, copy=True)
    dist.all_reduce(total)
    return total.to(tensor.device)


def raise_together(action: Callable[[], T], shared: bool = True) -> T:
    """What an action gives, unless it fails on any process: it is then an error on all, and none is waited for.

    Args:
        action: without communication in it, or one that fails alike everywhere.
        shared: whether the other processes do the same.
    """
    if not shared:
        return action()
    error, result = None, []
    try:
        result.append(action())
    # whatever it is, the others are told before it goes on
    except Exception as raised:
        error = raised
    messages = all_gather_object(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, message in enumerate(messages):
        if message is not None:
            raise OtherProcessError(f"process {rank}: {message}")
    return result[0]


def all_gather_object(value: T) -> list[T]:
    """What every process gives, in the order of their numbers, on each."""
    world = rank_and_world()[1]
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    dist.all_gather_object(values, value)
    return values
