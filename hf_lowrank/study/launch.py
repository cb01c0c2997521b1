"""Where the jobs of a stage run: processes on this machine, or an array job of SLURM through submitit."""

import os
import queue
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol

from hf_lowrank.study.jobs import Job, State, run_job, stop_children

__all__ = ["QUIET", "Launcher", "Local", "Submitted", "devices", "slot"]

# variables of every job
QUIET = {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}

Note = Callable[[Job], None]


class Launcher(Protocol):
    """Runs the jobs of a stage, which do not depend on each other."""

    def run(self, stage: str, jobs: Sequence[Job], started: Note, ended: Note) -> Iterator[tuple[Job, State]]:
        """Yield each job when it has ended; `started` and `ended` are called before, from any thread."""
        ...


def devices() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name and name != "-1"]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(number) for number, line in enumerate(listed.splitlines()) if line.startswith("GPU ")]


def slot(jobs: int, device: str) -> dict[str, str]:
    """Variables of one of the jobs that run at a time, with its GPUs, or else its share of the cores."""
    if device:
        return {**QUIET, "CUDA_VISIBLE_DEVICES": device}
    threads = (
        {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    )
    return {**QUIET, **threads}


class Local:
    """Processes on this machine, `jobs` at a time; where there are GPUs each has its own.

    Args:
        folder: of the study.
        jobs: at a time.
        processes: of a job, each with a GPU.
        lock: descriptor of the study's lock, which the processes keep.

    Raises:
        ValueError: there are GPUs, but fewer than the jobs need.
    """

    def __init__(self, folder: Path, jobs: int, processes: int, lock: int | None) -> None:
        self.folder, self.jobs, self.lock = folder, jobs, lock
        found = devices()
        if found and len(found) < jobs * processes:
            raise ValueError(
                f"--jobs {jobs} with {processes} processes each need {jobs * processes} GPUs, {len(found)} are there: "
                f"--jobs {max(1, len(found) // processes)}"
            )
        self._free: queue.Queue[str] = queue.Queue()
        for at in range(jobs):
            self._free.put(",".join(found[at * processes : (at + 1) * processes]))

    def run(self, stage: str, jobs: Sequence[Job], started: Note, ended: Note) -> Iterator[tuple[Job, State]]:
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = {pool.submit(self._one, job, started, ended): job for job in jobs}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                stop_children()
                raise

    def _one(self, job: Job, started: Note, ended: Note) -> State:
        device = self._free.get()
        try:
            started(job)
            return run_job(self.folder, job, slot(self.jobs, device), self.lock)
        finally:
            ended(job)
            self._free.put(device)


class Submitted:
    """One array job a stage, through submitit.

    A job that is cut off, by its time limit or for another's sake, is requeued and goes on from what it has saved.

    Args:
        folder: of the study, on a file system that all nodes share.
        jobs: of the array at a time.
        parameters: of submitit's executor; GPUs are asked for here.
        cluster: `slurm`, or `local` for processes of submitit's own.

    Raises:
        ValueError: submitit is not installed, there is no SLURM, or it refuses a parameter.
    """

    def __init__(self, folder: Path, jobs: int, parameters: dict[str, Any], cluster: str = "slurm") -> None:
        try:
            import submitit
        except ImportError as error:
            raise ValueError("--launcher slurm needs submitit: pip install 'hf_lowrank[cluster]'") from error
        self.folder = folder.resolve()
        known = {"name": "hf-lowrank", **({"slurm_array_parallelism": jobs} if cluster == "slurm" else {})}
        try:
            self.executor = submitit.AutoExecutor(self.folder / "slurm", cluster=cluster)
            self.executor.update_parameters(**{**known, **parameters})
        except (RuntimeError, ValueError, TypeError, NameError, AssertionError) as error:
            raise ValueError(f"--launcher {cluster}: {' '.join(str(error).split())}") from error

    def run(self, stage: str, jobs: Sequence[Job], started: Note, ended: Note) -> Iterator[tuple[Job, State]]:
        from submitit.helpers import as_completed as as_submitted_completed

        from hf_lowrank.study.worker import Worker

        self.executor.update_parameters(name=f"hf-lowrank-{stage}")
        submitted = self.executor.map_array(Worker(), [str(self.folder)] * len(jobs), jobs)
        of = {task.job_id: job for task, job in zip(submitted, jobs, strict=True)}
        for job in jobs:
            started(job)
        try:
            for task in as_submitted_completed(submitted):
                job, error = of[task.job_id], task.exception()
                ended(job)
                if error is None:
                    yield job, task.result()
                else:
                    yield job, State("failed", job.identity, 0.0, f"{' '.join(str(error).split())[-300:]}")
        except BaseException:
            for task in submitted:
                task.cancel()
            raise
