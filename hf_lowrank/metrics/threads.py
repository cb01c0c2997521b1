"""A thread pool for many small problems: each worker computes with a single thread of torch's."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

__all__ = ["single_threads"]


def single_threads(threads: int) -> ThreadPoolExecutor:
    """Pool whose workers have one intra-op thread each; the caller's number of intra-op threads does not change.

    Args:
        threads: number of workers; all have started when this returns.
    """
    before = torch.get_num_threads()
    started = threading.Barrier(threads + 1, timeout=60)

    def one_intra_op_thread() -> None:
        # a thread's first call into torch sets its number of threads to the process's, and must not come after this
        torch.get_num_threads()
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(threads, "hf_lowrank", one_intra_op_thread)
    for _ in range(threads):
        pool.submit(started.wait)
    started.wait()
    # each thread has its own number, but a new thread takes over the number set last
    torch.set_num_threads(before)
    return pool
