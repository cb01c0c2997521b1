"""Pushing while training goes on: a thread pushes copies of `publish/`, one at a time."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

__all__ = ["PushQueue"]

logger = logging.getLogger(__name__)

COPIES = ".pushing-"
LONGEST = 3
"""Copies that may wait at once, each as large as `publish/`; the oldest is dropped for a new one."""


class PushQueue:
    """The saved states of a run's `publish/` that wait to be pushed, oldest first.

    Each is a copy, so later writes do not mix into it. A training process must not wait for the network, because the
    other processes of a distributed run would time out. A copy whose push failed waits until `add` or `finish` is
    called. A thread that dies with its process leaves nothing half-written: a commit is on the Hub as a whole or not
    at all.

    Args:
        push: Pushes a folder under a commit message and returns whether that worked; it never raises.
    """

    def __init__(self, push: Callable[[Path, str], bool]) -> None:
        self._push = push
        self._waiting: list[tuple[Path, str]] = []
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._added = 0

    def add(self, publish: Path, message: str) -> None:
        """Queue a copy of `publish` and return while it is pushed.

        Raises:
            OSError: There is no room for the copy.
        """
        # beside it, so that relative links still lead to the same place
        copy = publish.parent / f"{COPIES}{self._added}"
        self._added += 1
        try:
            shutil.copytree(publish, copy, symlinks=True)
        except OSError:
            shutil.rmtree(copy, ignore_errors=True)
            raise
        with self._lock:
            self._waiting.append((copy, message))
            if len(self._waiting) > LONGEST:
                # the first may be on its way to the Hub
                dropped, late = self._waiting.pop(0 if self._thread is None else 1)
                shutil.rmtree(dropped, ignore_errors=True)
                logger.warning(
                    "%s gives way to later saves: if its checkpoint is kept it is published at the end, or by "
                    "`hf-lowrank push --checkpoints`",
                    late,
                )
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="hf-lowrank push", daemon=True)
                self._thread.start()

    def wait(self) -> None:
        """Wait until no push is under way."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def finish(self, publish: Path, message: str) -> None:
        """Push the waiting copies and then `publish` itself; return when that is done or has failed."""
        self.wait()
        with self._lock:
            self._waiting.append((publish, message))
        self._work()
        self.clear(publish.parent)

    def clear(self, run: Path) -> None:
        """Drop the queue and remove the copies in a run's folder, also those of a process that was killed."""
        with self._lock:
            self._waiting = []
        for copy in run.glob(f"{COPIES}*"):
            shutil.rmtree(copy, ignore_errors=True)

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._thread = None
                    return
                first = self._waiting[0]
            folder, message = first
            pushed = self._push(folder, message)
            with self._lock:
                if not pushed:
                    self._thread = None
                    return
                # unless `clear` was called meanwhile
                if first in self._waiting:
                    self._waiting.remove(first)
            if folder.name.startswith(COPIES):
                shutil.rmtree(folder, ignore_errors=True)
