"""What a measurement or an evaluation tells of itself while it runs."""

from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

__all__ = ["Failure", "Progress", "ProgressBar"]


@dataclass(frozen=True)
class Failure:
    """A unit of work that could not be done.

    Attributes:
        where: the run, and where it matters its checkpoint; empty if a task failed for all of them.
        name: of the unit or the task.
        reason: why, for people.
    """

    where: str
    name: str
    reason: str


class Progress:
    """Is told how far the work is; this one says nothing."""

    def total(self, units: int) -> None:
        """The work has so many units."""

    def unit(self, where: str, name: str, done: bool) -> None:
        """A unit begins, or is skipped because it is done."""

    def tick(self) -> None:
        """A piece of the unit is done."""

    def failed(self, failure: Failure) -> None:
        """A unit could not be done."""

    def note(self, text: str) -> None:
        """Whoever reads the numbers should know this."""


class ProgressBar(Progress):
    """A bar over the units with the current one's name; failures and notes are printed above it.

    Args:
        console: prints the bar; a log file gets a line a unit instead.
        done: what is done with a unit, `measured` for example.
    """

    def __init__(self, console: Console, done: str) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        # redirected output would take the harness's prints, which are kept from it
        self._bar = RichProgress(*columns, console=console, redirect_stdout=False, redirect_stderr=False)
        self._task = self._bar.add_task("reading", total=None)
        self._done, self._begun, self._ticks, self._label = done, 0, 0, ""

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self._bar.update(self._task, completed=self._bar.tasks[0].total, description=self._done)
        self._bar.stop()

    def total(self, units: int) -> None:
        self._bar.update(self._task, total=units)

    def unit(self, where: str, name: str, done: bool) -> None:
        self._label = f"{where} {name}{' (done before)' if done else ''}".replace("[", r"\[")
        self._bar.update(self._task, completed=self._begun, description=self._label)
        self._begun, self._ticks = self._begun + 1, 0
        if not done and not self._bar.console.is_terminal:
            self._print(f"{self._begun}/{self._bar.tasks[0].total:.0f} {where} {name}", "")

    def tick(self) -> None:
        self._ticks += 1
        self._bar.update(self._task, description=f"{self._label} \\[{self._ticks}]")

    def failed(self, failure: Failure) -> None:
        self._print(f"{failure.where} {failure.name}: not {self._done}: {failure.reason}".lstrip(), "red")

    def note(self, text: str) -> None:
        self._print(text, "yellow")

    def _print(self, text: str, style: str) -> None:
        self._bar.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
