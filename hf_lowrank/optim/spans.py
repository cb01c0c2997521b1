"""Where the time of a training run goes, measured without making the run wait.

On a CUDA device a span lies between two events on the current stream, which are read once the device has passed them;
on others it is read from the host's clock.
"""

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["Spans"]


class Spans:
    """Seconds by name, and how much was done in them.

    Args:
        device: on which the work is done.

    Attributes:
        seconds, amounts: of the spans that are over, by name.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.amounts: defaultdict[str, float] = defaultdict(float)
        self._cuda = device.type == "cuda"
        # (name, start, end, amount) that the device has yet to reach
        self._pending: deque[tuple[str, Any, Any, float]] = deque()

    def now(self) -> Any:
        """Return this moment, an end of a span."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, name: str, start: Any, amount: float = 1) -> None:
        """Add the span from a moment to now, in which `amount` was done."""
        end = self.now()
        if self._cuda:
            self._pending.append((name, start, end, amount))
            self.collect()
        else:
            self._count(name, end - start, amount)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Add what runs inside."""
        start = self.now()
        yield
        self.add(name, start)

    def collect(self) -> None:
        """Count the spans that the device has passed; waits for none."""
        while self._pending and self._pending[0][2].query():
            name, start, end, amount = self._pending.popleft()
            self._count(name, start.elapsed_time(end) / 1000, amount)

    def _count(self, name: str, seconds: float, amount: float) -> None:
        self.seconds[name] += seconds
        self.amounts[name] += amount
