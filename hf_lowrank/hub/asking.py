"""The question before somebody else's work is replaced."""

import sys
from typing import Protocol, TypeVar

import typer

from hf_lowrank.hub.ownership import OverwriteError

__all__ = ["ask_first"]

Result = TypeVar("Result", covariant=True)


class Replacing(Protocol[Result]):
    """What replaces something and can be told to overwrite it."""

    def __call__(self, *, overwrite: bool) -> Result: ...


def ask_first(replace: Replacing[Result], yes: bool) -> Result:
    """Push or write; where that would replace other people's work, ask on a terminal and refuse elsewhere.

    Args:
        yes: the answer was given on the command line.

    Raises:
        OverwriteError: there is nobody to ask.
        typer.Abort: the answer is no.
    """
    try:
        return replace(overwrite=yes)
    except OverwriteError as problem:
        if not sys.stdin.isatty():
            raise
        typer.confirm(f"{problem}.\nGo on all the same?", abort=True, err=True)
        return replace(overwrite=True)
