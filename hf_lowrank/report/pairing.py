"""Paired differences: two numbers that were measured on the same units are compared unit by unit.

What makes a loss large is mostly the text it is measured on, and that is the same for both runs: the difference of two
losses has a far smaller error than either of them. Everything here is plain arithmetic on what two runs keep of their
measurements, sums by unit (`Samples`) and results by item (`Items`). Whether two numbers are of the same quantity is
decided before (`hf_lowrank.report.comparability`); a function returns None if there is nothing to pair.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_lowrank.report.samples import Samples

__all__ = ["Evidence", "Items", "Paired", "blended", "mcnemar", "paired", "paired_seeds", "two_sided"]

Floats = NDArray[np.float64]

# so few items that are answered differently are tested by the binomial distribution itself
_FEW = 25
_UNITS = {"sequence": "sequences", "direction": "directions", "group": "groups", "vector": "vectors"}


@dataclass(frozen=True, eq=False)
class Items:
    """Results of a downstream task by item, n of them.

    Attributes:
        items: (n,) ids.
        values, weights: (n,) results, such as 1 for a right answer and 0 for a wrong one; their weighted mean is the
            number, or the logarithm of the number where it is `exponential`.
        groups: (n,) the group of each item; None if items are independent.
    """

    items: Sequence[str]
    values: Floats
    weights: Floats
    groups: Sequence[Hashable] | None = None
    exponential: bool = False

    @property
    def value(self) -> float:
        """The number that the items make up."""
        mean = float(np.average(self.values, weights=self.weights))
        return math.exp(mean) if self.exponential else mean

    @property
    def right_or_wrong(self) -> bool:
        """Whether items are answers that are right or wrong, and count alike."""
        equal = bool((self.weights == self.weights[0]).all())
        return equal and not self.exponential and bool(np.isin(self.values, (0, 1)).all())

    def shares(self) -> Floats:
        """(n,) what each item contributes to the number; an exponential is linearised at its value."""
        if not self.exponential:
            return self.values * self.weights
        value = self.value
        return value * (1 + self.values - math.log(value)) * self.weights


Evidence = Samples | Items


@dataclass(frozen=True)
class Paired:
    """A difference of two numbers that were measured on the same units.

    Attributes:
        value, stderr: the difference and its standard error.
        dof: degrees of freedom of the error; None for the normal distribution or an exact test.
        p: two-sided p-value, None if every unit gives the same difference.
        test: the test for people, such as `paired over 128 sequences`.
        whole: whether it is over all units of both.
    """

    value: float
    stderr: float
    dof: float | None
    p: float | None
    test: str
    whole: bool = True


def blended(one: Evidence | None, other: Evidence | None, weight: float) -> Evidence | None:
    """Return what makes up (1 - weight) a + weight b, which is exact since both are linear in their units.

    None if the two numbers were not measured on the same units.
    """
    first = 1 - weight
    if isinstance(one, Samples) and isinstance(other, Samples):
        alike = one.kind == other.kind and one.units == other.units and one.sums.shape == other.sums.shape
        if not alike or not np.array_equal(one.weights, other.weights):
            return None
        return Samples(one.kind, one.units, first * one.sums + weight * other.sums, one.weights)
    if isinstance(one, Items) and isinstance(other, Items):
        alike = list(one.items) == list(other.items) and one.groups == other.groups
        if not alike or not np.array_equal(one.weights, other.weights):
            return None
        values = (first * one.shares() + weight * other.shares()) / one.weights
        return Items(one.items, values, one.weights, one.groups)
    return None


def paired(ours: Evidence | None, base: Evidence | None) -> Paired | None:
    """Return `ours - base`, over the units that both have."""
    if isinstance(ours, Samples) and isinstance(base, Samples):
        return _paired_samples(ours, base)
    if isinstance(ours, Items) and isinstance(base, Items):
        return _paired_items(ours, base)
    return None


def paired_seeds(ours: Sequence[float], base: Sequence[float]) -> Paired | None:
    """Return the mean difference over seeds, each of which gave both methods the same data in the same order."""
    difference = np.asarray(ours, dtype=np.float64) - np.asarray(base, dtype=np.float64)
    return _tested(difference, np.ones(len(difference)), f"{len(difference)} seeds")


def two_sided(value: float, stderr: float, dof: float | None) -> float:
    """Return the p-value of `value / stderr`, by Student's t, or by the normal distribution without `dof`."""
    z = abs(value) / stderr
    if dof is None:
        return math.erfc(z / math.sqrt(2))
    # scipy takes long to import, and only tests need it
    from scipy.special import stdtr

    return float(2 * stdtr(dof, -z))


def mcnemar(wins: int, losses: int) -> float | None:
    """Return the two-sided p-value of McNemar's test (1947), None if no item is answered differently.

    With fewer than 25 such items it is that of the binomial distribution, else that of the normal one.

    Args:
        wins, losses: items that only the one model answers correctly, and only the other.
    """
    differing = wins + losses
    if differing == 0:
        return None
    if differing >= _FEW:
        return two_sided(wins - losses, math.sqrt(differing), None)
    from scipy.stats import binomtest

    return float(binomtest(wins, differing).pvalue)


def _paired_samples(ours: Samples, base: Samples) -> Paired | None:
    at = _common(ours.units, base.units)
    if at is None or ours.kind != base.kind or len(ours.sums) != len(base.sums):
        return None
    here, there = at
    weights = ours.weights[here]
    # the same rows predict the same tokens
    if not np.array_equal(weights, base.weights[there]):
        return None
    count, whole = _counted(len(here), len(ours.units), len(base.units))
    rows, _, columns = ours.kind.rpartition(" x ")
    words = f"{count} {_UNITS[columns]}"
    if len(ours.sums) > 1:
        words = f"{len(ours.sums)} {_UNITS.get(rows, 'rows')} × {words}"
    return _tested(ours.sums[:, here] - base.sums[:, there], weights, words, whole)


def _paired_items(ours: Items, base: Items) -> Paired | None:
    at = _common(ours.items, base.items)
    if at is None or (ours.groups is None) != (base.groups is None) or ours.exponential != base.exponential:
        return None
    here, there = at
    weights = ours.weights[here]
    if not np.array_equal(weights, base.weights[there]):
        return None
    count, whole = _counted(len(here), len(ours.items), len(base.items))
    words, difference = f"{count} items", ours.shares()[here] - base.shares()[there]
    if ours.groups is not None and base.groups is not None:
        groups = [ours.groups[place] for place in here]
        if groups != [base.groups[place] for place in there]:
            return None
        names = {name: place for place, name in enumerate(dict.fromkeys(groups))}
        of_group = [names[name] for name in groups]
        words = f"{len(names)} groups of {words}"
        sums, sizes = (np.bincount(of_group, part).astype(np.float64) for part in (difference, weights))
        return _tested(sums, sizes, words, whole)
    found = _tested(difference, weights, words, whole)
    if found is None or not (ours.right_or_wrong and base.right_or_wrong):
        return found
    p = mcnemar(int((difference > 0).sum()), int((difference < 0).sum()))
    return Paired(found.value, found.stderr, None, p, f"McNemar over {words}", whole)


def _common(ours: Sequence[Any], base: Sequence[Any]) -> tuple[list[int], list[int]] | None:
    """Return where the units that both have stand in each; None if there is none."""
    if list(ours) == list(base):
        return list(range(len(ours))), list(range(len(base)))
    place = {unit: index for index, unit in enumerate(base)}
    # of a unit that is there twice it is not known which is which
    if len(place) < len(base) or len(set(ours)) < len(ours):
        return None
    pairs = [(index, place[unit]) for index, unit in enumerate(ours) if unit in place]
    return ([here for here, _ in pairs], [there for _, there in pairs]) if pairs else None


def _counted(common: int, ours: int, base: int) -> tuple[str, bool]:
    """Return the number of common units for people, and whether they are all."""
    most = max(ours, base)
    return (f"{common}", True) if common == most else (f"{common} of {most}", False)


def _tested(sums: Floats, weights: Floats, words: str, whole: bool = True) -> Paired | None:
    """Return the number that differences (rows, n) or (n,) of weighted units make up, tested by Student's t."""
    if not np.isfinite(sums).all() or not weights.sum() > 0:
        return None
    # the ids and what the units are do not matter here: the error is that of any samples
    difference = Samples("sequence", tuple(map(str, range(len(weights)))), sums, weights)
    stderr, dof = difference.error()
    # of a single unit there is no error; that of numbers near the largest floats overflows
    if not math.isfinite(stderr):
        return None
    value = difference.value
    # seeds whose differences are equal but for rounding have no spread
    if stderr <= 1e-12 * abs(value):
        return Paired(value, 0.0, dof, None, f"paired over {words}", whole)
    return Paired(value, stderr, dof, two_sided(value, stderr, dof), f"paired over {words}", whole)
