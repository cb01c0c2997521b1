"""What an analysis hands to the report: its answer in words, its tables, its figure, and what it says of a claim."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import pandas as pd
from matplotlib.figure import Figure

from hf_lowrank.report.significance import Delta
from hf_lowrank.study.analysis.statistics import verdict

__all__ = ["Analysis", "Claim", "Holds", "decide", "listed"]

Holds = Literal["holds", "does not hold", "holds in part", "the data do not tell"]


@dataclass(frozen=True)
class Claim:
    """One of the paper's claims.

    Attributes:
        claim: in the paper's sense.
        holds: at this scale.
        text: the numbers, and how sure they are.
    """

    claim: str
    holds: Holds
    text: str


@dataclass(frozen=True)
class Analysis:
    """An analysis.

    Attributes:
        key: stem of its files.
        title, question: for people.
        sentences: its answer; what the intervals do not support is said to be open.
        table: what the page shows.
        more: further tables by the end of their names.
        claim: what it says of a claim of the paper.
        draw: returns its figure, None if there is nothing to draw.
    """

    key: str
    title: str
    question: str
    sentences: Sequence[str]
    table: pd.DataFrame
    more: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    claim: Claim | None = None
    draw: Callable[[], Figure | None] = lambda: None


def decide(expected: Sequence[tuple[Delta, int]]) -> Holds:
    """Whether tests come out as a claim has it.

    Args:
        expected: differences with their q-values, each with the sign that the claim expects.
    """
    signs = [verdict(delta) * sign for delta, sign in expected]
    if not signs or not any(signs):
        return "the data do not tell"
    if all(sign > 0 for sign in signs):
        return "holds"
    if all(sign < 0 for sign in signs):
        return "does not hold"
    return "holds in part" if any(sign > 0 for sign in signs) else "the data do not tell"


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(([", ".join(words[:-1])] if len(words) > 1 else []) + list(words[-1:]))
