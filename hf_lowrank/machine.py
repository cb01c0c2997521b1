"""What makes computing on a CPU faster, for programs that own their process."""

import ctypes
import sys

__all__ = ["keep_freed_memory"]


def keep_freed_memory() -> None:
    """Have glibc keep large blocks for the next step: giving them back costs a page fault for every 4 KiB."""
    trim_threshold, mmap_max = -1, -4
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
