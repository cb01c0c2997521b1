"""The question before somebody else's work is replaced."""

import sys
from typing import Protocol, TypeVar

import typer

from hf_lowrank.hub.ownership import OverwriteError

__all__ = ["ask_first"]

Result = TypeVar("Result", covariant=True)


class Push(Protocol[Result]):
    """A push that can be told to overwrite."""

    def __call__(self, *, overwrite: bool) -> Result: ...


def ask_first(push: Push[Result], yes: bool) -> Result:
    """Push; where that would replace other people's work, ask on a terminal and refuse elsewhere.

    Args:
        yes: the answer was given on the command line.

    Raises:
        OverwriteError: there is nobody to ask.
        typer.Abort: the answer is no.
    """
    try:
        return push(overwrite=yes)
    except OverwriteError as problem:
        if not sys.stdin.isatty():
            raise
        typer.confirm(f"{problem}.\nPush all the same?", abort=True, err=True)
        return push(overwrite=True)
