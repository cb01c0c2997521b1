"""A pool whose workers leave torch's own threads alone: many small problems, one thread each."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

__all__ = ["single_threads"]


def single_threads(threads: int) -> ThreadPoolExecutor:
    """Pool whose workers have one intra-op thread each; the caller's number of them stays as it is.

    Args:
        threads: workers, all started before this returns.
    """
    before = torch.get_num_threads()
    started = threading.Barrier(threads + 1, timeout=60)

    def one_intra_op_thread() -> None:
        # the first question to torch in a thread sets its number to the process's: a later one would undo this
        torch.get_num_threads()
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(threads, "hf_lowrank", one_intra_op_thread)
    for _ in range(threads):
        pool.submit(started.wait)
    started.wait()
    # each thread has its own number, but new ones begin with the last that was set
    torch.set_num_threads(before)
    return pool
