"""Whether two numbers differ by more than their errors: one function for card, table, page and study alike.

Two runs that were measured on the same sequences, items or directions are compared unit by unit
(`hf_lowrank.report.pairing`). Where nothing pairs them they are compared as if they were independent, by
t = (a - b) / sqrt(se_a^2 + se_b^2), which is too careful if they were measured on the same text, and is said to be
unpaired. Both say something about two trained models, not about their methods. Several seeds do: by the paired t-test
over seeds if both methods saw the same data in the same order with each seed, else by Welch's (1947).

Many differences are tested at once. `corrected` gives each test its q-value, the share of false findings among all
that are as significant (Benjamini and Hochberg 1995); a number that is there in several forms is tested once.
"""

import math
import statistics
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from hf_lowrank.report.comparability import Number
from hf_lowrank.report.pairing import Evidence, Paired, paired, paired_seeds, two_sided
from hf_lowrank.report.values import format_value

__all__ = ["UNPAIRED", "Delta", "Sample", "corrected", "difference", "format_p", "stars", "tested_number"]

# the mark of a difference whose error is as if the two numbers were independent
UNPAIRED = "†"
# numbers that are functions of one another: exponentials of a loss, in one unit or another
_FORMS = {
    "perplexity": "validation_loss",
    "word_perplexity": "bits_per_byte",
    "byte_perplexity": "bits_per_byte",
}


@dataclass(frozen=True)
class Sample:
    """A number to compare.

    Attributes:
        value: the number, or the mean of several seeds.
        stderr: its standard error; of several seeds, that of the mean over them.
        seeds: the values of the seeds; one value if there is one run.
        sampling: whether `stderr` is that of sampling.
        dof: degrees of freedom of `stderr`, None for those of the normal distribution.
        evidence: what one run keeps of the measurement, None if it keeps nothing.
        orders: of each seed, what it shares with a run that saw the same data in the same order.
    """

    value: float
    stderr: float | None
    seeds: Sequence[float]
    sampling: bool = True
    dof: float | None = None
    evidence: Evidence | None = None
    orders: Sequence[str | None] = ()

    @classmethod
    def of(cls, number: Number, evidence: Evidence | None = None) -> "Sample":
        """Return the number of a single run."""
        assert number.value is not None
        return cls(number.value, number.stderr, [number.value], number.sampling, number.dof, evidence)

    @property
    def spread(self) -> float:
        """Standard deviation over seeds (ddof 1)."""
        return statistics.stdev(self.seeds)


@dataclass(frozen=True)
class Delta:
    """A difference to the baseline.

    Attributes:
        value, stderr: the difference and its standard error, None if one of the two has none.
        p: two-sided p-value, None if nothing was tested.
        test: for people, such as `paired over 128 sequences`; None if nothing was tested.
        why: why nothing was tested.
        dof: degrees of freedom of the test, None for the normal distribution or an exact test.
        paired: whether the error is that of differences unit by unit.
        q: p corrected for all tests of a comparison.
        counts: whether it is one of these tests; not if its number was tested in another form.
    """

    value: float
    stderr: float | None
    p: float | None
    test: str | None
    why: str | None = None
    dof: float | None = None
    paired: bool = False
    q: float | None = None
    counts: bool = False

    @property
    def size(self) -> str:
        """The difference with its sign and error, `−0.863 ± 0.132`."""
        # a true minus sign, as wide as the plus
        sign = "−" if self.value < 0 else "+" if self.value > 0 else ""
        return f"{sign}{format_value(abs(self.value), self.stderr)}"

    @property
    def text(self) -> str:
        """The difference with its sign, error, p- and q-value, `−0.863 ± 0.132, p < 0.001, q < 0.001`."""
        tested = [format_p(self.p)] if self.p is not None else []
        tested += [format_p(self.q, "q")] if self.q is not None else []
        return ", ".join([self.size, *tested])

    @property
    def marks(self) -> str:
        """Stars by q, and the mark of an error that is as if the two numbers were independent."""
        unpaired = UNPAIRED if self.test == "unpaired" else ""
        return " ".join(mark for mark in (stars(self.q), unpaired) if mark)

    @property
    def marked(self) -> str:
        """The text with its marks."""
        return f"{self.text} {self.marks}".rstrip()


def difference(ours: Sample, baseline: Sample) -> Delta:
    """Return `ours - baseline` with its significance."""
    value = ours.value - baseline.value
    if len(ours.seeds) > 1 and len(baseline.seeds) > 1:
        return _over_seeds(value, ours, baseline)
    if len(ours.seeds) > 1 or len(baseline.seeds) > 1:
        return Delta(value, None, None, None, "one side is a single seed")
    units = paired(ours.evidence, baseline.evidence)
    if units is not None:
        return _of_pairs(value, units)
    if ours.stderr is None or baseline.stderr is None:
        return Delta(value, None, None, None, "no standard error")
    error = math.hypot(ours.stderr, baseline.stderr)
    if not (ours.sampling and baseline.sampling):
        return Delta(value, None, None, None, "its error is numerical, not statistical")
    if error == 0:
        return Delta(value, 0.0, None, None, "both errors are 0")
    dof = _satterthwaite((ours.stderr, ours.dof), (baseline.stderr, baseline.dof))
    return Delta(value, error, two_sided(value, error, dof), "unpaired", dof=dof)


def _of_pairs(value: float, units: Paired) -> Delta:
    if units.p is None:
        return Delta(units.value, units.stderr, None, None, "no spread between its units", paired=True)
    # over some of the units the difference is another one
    return Delta(value if units.whole else units.value, units.stderr, units.p, units.test, dof=units.dof, paired=True)


def _over_seeds(value: float, ours: Sample, baseline: Sample) -> Delta:
    at_base = {order: seed for order, seed in zip(baseline.orders, baseline.seeds, strict=False) if order is not None}
    if len(at_base) == len(baseline.seeds) and sorted(at_base) == sorted(map(str, ours.orders)):
        pairs = paired_seeds(ours.seeds, [at_base[str(order)] for order in ours.orders])
        if pairs is not None and pairs.p is not None:
            return Delta(value, pairs.stderr, pairs.p, pairs.test, dof=pairs.dof, paired=True)
        return Delta(value, 0.0, None, None, "no spread between seeds", paired=True)
    error = math.hypot(ours.stderr or 0.0, baseline.stderr or 0.0)
    if error == 0:
        return Delta(value, 0.0, None, None, "no spread between seeds")
    dof = _satterthwaite(*((side.stderr or 0.0, len(side.seeds) - 1) for side in (ours, baseline)))
    return Delta(value, error, two_sided(value, error, dof), "Welch over seeds", dof=dof)


def _satterthwaite(*errors: tuple[float, float | None]) -> float | None:
    """Return the degrees of freedom of errors' root sum of squares (Satterthwaite 1946), None for the normal."""
    spread = sum(error**4 / dof for error, dof in errors if dof is not None)
    return sum(error**2 for error, _ in errors) ** 2 / spread if spread else None


# ---- many tests ----


def tested_number(number: Number, ours: Sample, baseline: Sample) -> Hashable:
    """Return what two differences share if they are of one number, such as a loss and its exponential.

    Metrics of which both runs have the same value with the same error, to six digits, are one number as well: native
    and dense weights of a full-rank model, or the loss at the centre of two landscapes.
    """
    scope, _, metric = number.name.rpartition("/")
    # the harness names a filter after the comma
    metric, _, chosen = metric.partition(",")
    if number.kind == "evaluation" or number.name in _FORMS or number.name in _FORMS.values():
        return (number.kind, scope, _FORMS.get(metric, metric), chosen, number.column[3:])
    # equal but for rounding
    return tuple(f"{part or 0:.6g}" for side in (ours, baseline) for part in (side.value, side.stderr))


def corrected(deltas: Sequence[Delta], numbers: Sequence[Hashable]) -> list[Delta]:
    """Return the differences of a comparison with their q-values.

    Args:
        deltas: all of them.
        numbers: of each, what it shares with others that are of the same number. Of those the first one that is
            tested counts, and the others get its test.
    """
    first: dict[Hashable, Delta] = {}
    for delta, number in zip(deltas, numbers, strict=True):
        if delta.p is not None:
            first.setdefault(number, delta)
    if not first:
        return list(deltas)
    # scipy takes long to import, and only tests need it
    from scipy.stats import false_discovery_control

    q = dict(zip(first, false_discovery_control([delta.p for delta in first.values()]).tolist(), strict=True))

    def with_test(delta: Delta, number: Hashable) -> Delta:
        if delta.p is None:
            return delta
        own = first[number]
        test = {key: getattr(own, key) for key in ("p", "test", "dof", "paired")}
        return replace(delta, **test, q=q[number], counts=delta is own)

    return [with_test(*pair) for pair in zip(deltas, numbers, strict=True)]


def format_p(p: float, name: str = "p") -> str:
    """Return `p = 0.032`, and `p < 0.001` below that."""
    return f"{name} < 0.001" if p < 0.001 else f"{name} = {p:.2g}" if p < 0.1 else f"{name} = {p:.2f}"


def stars(q: float | None) -> str:
    """Return the customary marks: `*` below 0.05, `**` below 0.01, `***` below 0.001."""
    return "" if q is None else "*" * sum(q < level for level in (0.05, 0.01, 0.001))
