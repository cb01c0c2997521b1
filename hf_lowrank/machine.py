"""What a program that owns its process does with the machine: memory, cores, and its share of a launch."""

import ctypes
import os
import sys

__all__ = ["keep_freed_memory", "launched", "own_device", "use_cores"]


def keep_freed_memory() -> None:
    """Have glibc keep large blocks for the next step: giving them back costs a page fault for every 4 KiB."""
    trim_threshold, mmap_max = -1, -4
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def launched() -> tuple[int, int]:
    """This process's number in the launch by `accelerate` or torchrun, and how many processes that has."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def use_cores(threads: int | None = None) -> None:
    """Compute on this process's share of the cores: a launch leaves each of several processes a single thread.

    Args:
        threads: how many to use instead.
    """
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or launched()[1])
    torch.set_num_threads(threads or max(1, cores // processes))


def own_device(asked: str | None) -> str:
    """The device asked for; by default a GPU if there is one, and in a launch this process's own.

    Also makes the process ready to compute there.
    """
    import torch

    device = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    several = launched()[1] > 1
    if device == "cuda" and several:
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    elif device == "cpu":
        keep_freed_memory()
        if several:
            use_cores()
    return device
