"""The runner that `measure` and `evaluate` share: units of work, each done once and by one process.

Every process of `accelerate launch` walks over the same units, each from a place of its own, and does those that no
other process has claimed. A claim is a lock on one byte of a file in the run's folder. The operating system takes it
back when the process ends, in whatever way: a killed process loses the unit it was at, and the others or the next
command do it. The processes meet at no collective, so that none can hang.
"""

import hashlib
import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_lowrank.machine import launched
from hf_lowrank.measure.progress import Failure, Progress

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["LOCK", "Job", "Work", "run_jobs"]

# name of the file in a run's folder through which processes share its work
LOCK = ".units.lock"

# bytes of the lock file: held by every living process, held by the one that writes, and the first of the units'
_ALIVE, _WRITING, _UNITS = 0, 1, 2
# seconds between two looks at units that other processes are at
_PAUSE = 0.2


class Work(ABC):
    """A unit of work, which is done or not.

    Attributes:
        key: tells it from all other units, also those of other runs.
        where, name: what `Progress` is told.
    """

    key: str
    where: str
    name: str

    @abstractmethod
    def is_done(self) -> bool:
        """Whether its results are on disk."""

    @abstractmethod
    def do(self, tick: Callable[[], Any]) -> Any:
        """Compute its results; whatever this raises costs this unit alone."""

    @abstractmethod
    def keep(self, result: Any) -> None:
        """Write its results; no other process writes at the same time."""

    @abstractmethod
    def fail(self, error: Exception) -> Failure:
        """Write what is left of it after an error; no other process writes at the same time."""


@dataclass(frozen=True)
class Job:
    """The work on one run.

    Attributes:
        units: in the order in which one process does them.
        report: brings the run's report up to date; the first process calls it when all units are done or have failed,
            and when the work is interrupted.
        release: frees the run's models; called when this process goes on to another run.
    """

    units: Sequence[Work]
    report: Callable[[], Any]
    release: Callable[[], Any] = lambda: None


def run_jobs(jobs: Sequence[Job], lock: Path, progress: Progress) -> list[Failure]:
    """Do the work of all runs that is not done, dealt to the processes of the launch.

    Reports are written in the order of the jobs.

    Args:
        jobs: the same in every process.
        lock: file that holds the claims; removed at the end.
        progress: is told what this process does.

    Returns:
        What failed, in this process or another one.
    """
    rank, world = launched()
    work = [(number, unit) for number, job in enumerate(jobs) for unit in job.units]
    progress.total(len(work))
    # neighbours need the same models: a process stays among them until it meets the work of another
    start = len(work) * rank // world
    waiting = [*work[start:], *work[:start]]
    left = [len(job.units) for job in jobs]
    unreported = list(range(len(jobs))) if rank == 0 else []
    failures: list[Failure] = []
    current: int | None = None
    claims = _Claims(lock if world > 1 else None)
    try:
        while waiting:
            others: list[tuple[int, Work]] = []
            for number, unit in waiting:
                if not claims.take(unit):
                    others.append((number, unit))
                    continue
                if current not in (None, number):
                    jobs[current].release()
                current = number
                failure = claims.failure_of(unit)
                if failure is None:
                    failure = _settle(unit, claims, progress)
                else:
                    progress.unit(unit.where, unit.name, True)
                claims.give_back(unit)
                if failure is not None and failure not in failures:
                    failures.append(failure)
                    progress.failed(failure)
                left[number] -= 1
                while unreported and left[unreported[0]] == 0:
                    jobs[unreported.pop(0)].report()
            if len(others) == len(waiting):
                time.sleep(_PAUSE)
            waiting = others
    finally:
        # an interrupted run's report holds what was measured so far
        for number in unreported:
            if not waiting or left[number] < len(jobs[number].units):
                jobs[number].report()
        claims.close()
    if rank == 0 and world > 1:
        lock.unlink(missing_ok=True)
    return failures


def _settle(unit: Work, claims: "_Claims", progress: Progress) -> Failure | None:
    """Do a unit if it is not done; return why it could not be."""
    try:
        done = unit.is_done()
        progress.unit(unit.where, unit.name, done)
        result = None if done else unit.do(progress.tick)
    # one metric, one task or one checkpoint that is cut short must not cost the others
    except Exception as error:
        with claims.writing():
            failure = unit.fail(error)
            claims.note(unit, failure)
        return failure
    if not done:
        with claims.writing():
            unit.keep(result)
    return None


class _Claims:
    """Which process is at which unit, and which units have failed in this launch.

    Args:
        path: the lock file; None for a process alone, which needs no locks.
    """

    def __init__(self, path: Path | None) -> None:
        self._file: int | None = None
        if path is None:
            return
        if fcntl is None:
            raise ValueError(
                "this system has no file locks by which processes could share the work: start one process"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        # opened once: closing any other descriptor of the file would give up the locks
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        # the first of the living processes forgets what failed in an earlier launch
        if self._lock(_ALIVE, wait=False):
            os.ftruncate(self._file, 0)
        fcntl.lockf(self._file, fcntl.LOCK_SH, 1, _ALIVE)

    def close(self) -> None:
        """Give up all claims."""
        if self._file is not None:
            os.close(self._file)

    def take(self, unit: Work) -> bool:
        """Claim a unit; False if another process is at it."""
        return self._lock(_byte(unit), wait=False)

    def give_back(self, unit: Work) -> None:
        """Let other processes see how the unit ended."""
        self._unlock(_byte(unit))

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep the other processes from writing."""
        self._lock(_WRITING, wait=True)
        try:
            yield
        finally:
            self._unlock(_WRITING)

    def note(self, unit: Work, failure: Failure) -> None:
        """Tell the other processes that a unit has failed, so that none of them tries it again."""
        if self._file is not None:
            os.write(self._file, (json.dumps([unit.key, asdict(failure)]) + "\n").encode())

    def failure_of(self, unit: Work) -> Failure | None:
        """Why a unit failed in another process; None if it did not."""
        if self._file is None:
            return None
        lines = os.pread(self._file, os.fstat(self._file).st_size, 0).decode().splitlines()
        noted = dict(json.loads(line) for line in lines)
        return Failure(**noted[unit.key]) if unit.key in noted else None

    def _lock(self, byte: int, wait: bool) -> bool:
        if self._file is None:
            return True
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, byte)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def _unlock(self, byte: int) -> None:
        if self._file is not None:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, byte)


def _byte(unit: Work) -> int:
    """A unit's place in the lock file, which need not be as long."""
    digest = hashlib.sha256(unit.key.encode()).digest()
    return _UNITS + (int.from_bytes(digest[:8]) >> 2)
