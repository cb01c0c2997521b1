"""The tests of the analyses: differences over seeds, contrasts of numbers that belong to pairs of runs, sentences.

A difference between two groups of runs is taken over seeds (`hf_lowrank.report.significance`): in pairs where both saw
the same data in the same order, else by Welch's t-test. A number of a pair of runs, such as a barrier, shares each of
its runs with other pairs, so pairs are no independent sample: `additive_contrast` and `seed_jackknife` take that into
account. All p-values of one analysis are corrected together (Benjamini and Hochberg 1995).
"""

import math
import statistics
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hf_lowrank.report.significance import Delta, Sample, corrected, difference, format_p

__all__ = [
    "COLUMNS", "LEVEL", "Value", "additive_contrast", "delta_columns", "interval", "interval_text", "mean_and_error",
    "over_seeds", "seed_jackknife", "tested", "values_of", "verdict", "with_q",
]  # fmt: skip

Floats = NDArray[np.float64]

# of q-values, and one minus the coverage of intervals
LEVEL = 0.05
COLUMNS = ("difference", "stderr", "low", "high", "dof", "p", "q", "test", "why")


@dataclass(frozen=True)
class Value:
    """A run's number and what it shares with runs that saw the same data in the same order; None if not known."""

    value: float
    order: str | None = None


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and its standard error over seeds; NaN of one seed."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def over_seeds(ours: Sequence[Value], base: Sequence[Value]) -> Delta:
    """Return `ours - base` over seeds, over those that both have if these are two or more.

    A single seed on one side says nothing of the spread, so nothing is tested.
    """
    shared = {each.order for each in ours} & {each.order for each in base} - {None}
    if len(shared) > 1:
        ours = [each for each in ours if each.order in shared]
        base = [each for each in base if each.order in shared]
    if min(len(ours), len(base)) < 2:
        value = statistics.fmean(each.value for each in ours) - statistics.fmean(each.value for each in base)
        return Delta(value, None, None, None, "one seed")
    return difference(_sample(ours), _sample(base))


def _sample(values: Sequence[Value]) -> Sample:
    mean, error = mean_and_error([each.value for each in values])
    return Sample(mean, error, [each.value for each in values], orders=[each.order for each in values])


def tested(value: float, stderr: float, dof: float, test: str) -> Delta:
    """Return a difference tested by Student's t; without spread or freedom nothing is tested."""
    if not (math.isfinite(stderr) and math.isfinite(value)) or dof < 1:
        return Delta(value, None, None, None, "too few runs to know the spread")
    if stderr <= 1e-12 * abs(value) or stderr == 0:
        return Delta(value, 0.0, None, None, "no spread between runs")
    from scipy.special import stdtr

    return Delta(value, stderr, float(2 * stdtr(dof, -abs(value) / stderr)), test, dof=dof)


def additive_contrast(values: Floats, sets: Sequence[str], ends: Sequence[tuple[int, int]], weights: Any) -> Delta:
    """Return a contrast of the means of sets of pairs, each pair being the mean of its set plus an effect of each end.

    The model is b = mean(set) + u_i + u_j + e, by least squares, where e is independent between pairs. What a run
    brings to all of its pairs cancels in a contrast such as between - (within A + within B) / 2, if the pairs suffice.

    Args:
        values: (n,) the numbers of the pairs.
        sets: (n,) the set of each pair.
        ends: (n,) the two runs of each pair.
        weights: set -> its weight in the contrast, which sum to 0.
    """
    names, runs = sorted(set(sets)), sorted({run for pair in ends for run in pair})
    missing = [name for name in weights if name not in names]
    if missing:
        return Delta(math.nan, None, None, None, _missing(missing[0]))
    design = np.zeros((len(values), len(names) + len(runs)))
    for row, (name, (i, j)) in enumerate(zip(sets, ends, strict=True)):
        design[row, names.index(name)] = 1
        design[row, len(names) + runs.index(i)] += 1
        design[row, len(names) + runs.index(j)] += 1
    contrast = np.zeros(design.shape[1])
    for name, weight in weights.items():
        contrast[names.index(name)] = weight
        # the mean of a set is that over its own runs
        inside = [run for each, pair in zip(sets, ends, strict=True) if each == name for run in pair]
        for run in inside:
            contrast[len(names) + runs.index(run)] += 2 * weight / len(inside)
    inverse = np.linalg.pinv(design, rcond=1e-10)
    solution, dof = inverse @ values, len(values) - int(np.linalg.matrix_rank(design))
    value = float(contrast @ solution)
    if not np.allclose(contrast @ inverse @ design, contrast, atol=1e-8):
        return Delta(value, None, None, None, "the measured pairs do not tell runs and methods apart")
    if dof < 1:
        return Delta(value, None, None, None, "too few pairs to know the spread")
    spread = float(((values - design @ solution) ** 2).sum()) / dof
    error = math.sqrt(spread * float(((contrast @ inverse) ** 2).sum()))
    return tested(value, error, dof, f"additive model over {len(values)} pairs")


def _missing(name: str) -> str:
    start, _, group = name.partition(" ")
    return f"no two seeds of {group} were joined" if start == "within" else f"no pair {name}"


def seed_jackknife(
    ours: Sequence[tuple[float, Hashable, Hashable]], null: Sequence[tuple[float, Hashable, Hashable]]
) -> Delta:
    """Return mean(ours) - mean(null) of numbers of pairs, its error by leaving out one seed after the other.

    Args:
        ours, null: (number, seed, the other end's seed). A seed without which one of the two is empty, such as that of
            a common baseline, is given and not drawn.
    """

    def contrast(without: Hashable = None) -> float:
        means = []
        for pairs in (ours, null):
            kept = [value for value, *seeds in pairs if without is None or without not in seeds]
            means.append(statistics.fmean(kept) if kept else math.nan)
        return means[0] - means[1]

    if not ours or not null:
        return Delta(math.nan, None, None, None, "no other seed of full-rank to compare with" if ours else "no pair")
    seeds = list(dict.fromkeys(seed for pairs in (ours, null) for _, *both in pairs for seed in both))
    left_out = [each for seed in seeds if math.isfinite(each := contrast(seed))]
    n, value = len(left_out), contrast()
    # two values have one degree of freedom
    if n < 3 or len({seed for _, seed, _ in ours}) < 2 or len(null) < 2:
        return Delta(value, None, None, None, "too few seeds to know the spread")
    mean = statistics.fmean(left_out)
    error = math.sqrt((n - 1) / n * sum((each - mean) ** 2 for each in left_out))
    return tested(value, error, n - 1, f"jackknife over {n} seeds")


# ---- many tests, tables and words ----


def with_q(deltas: Sequence[Delta], keys: Sequence[Hashable] | None = None) -> list[Delta]:
    """Return the differences with their q-values; those with equal keys are of one number and tested once."""
    return corrected(deltas, list(range(len(deltas))) if keys is None else keys)


def interval(delta: Delta) -> tuple[float, float]:
    """The 95 % interval of a difference, NaN where there is no error."""
    if delta.stderr is None or delta.p is None:
        return math.nan, math.nan
    from scipy.special import stdtrit

    half = float(stdtrit(delta.dof or 1e9, 1 - LEVEL / 2)) * delta.stderr
    return delta.value - half, delta.value + half


def delta_columns(delta: Delta) -> dict[str, Any]:
    """The columns of a table that a difference fills (`COLUMNS`)."""
    low, high = interval(delta)
    given = (delta.value, delta.stderr, low, high, delta.dof, delta.p, delta.q)
    numbers = [math.nan if number is None else float(number) for number in given]
    return dict(zip(COLUMNS, (*numbers, delta.test or "", delta.why or ""), strict=True))


def verdict(delta: Delta) -> int:
    """1 if a number is larger, -1 if it is smaller, 0 if the data do not tell."""
    if delta.q is None or delta.q >= LEVEL or not math.isfinite(delta.value):
        return 0
    return 1 if delta.value > 0 else -1


def interval_text(delta: Delta) -> str:
    """`+0.21 ± 0.03, 95 % interval 0.14 to 0.28, q = 0.002`; without a test the difference and why."""
    if not math.isfinite(delta.value):
        return delta.why or "not measured"
    low, high = interval(delta)
    if not math.isfinite(low):
        return f"{delta.size}, {delta.why}"
    words = f"{delta.size}, 95 % interval {_signed(low)} to {_signed(high)}"
    return f"{words}, {format_p(delta.q, 'q')}" if delta.q is not None else words


def _signed(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def values_of(rows: pd.DataFrame) -> list[Value]:
    """The values of a group's runs, one a run."""
    orders = [None if pd.isna(order) else str(order) for order in rows["order"]]
    return [Value(float(value), order) for value, order in zip(rows["value"], orders, strict=True)]
