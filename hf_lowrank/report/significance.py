"""Whether two numbers differ by more than their errors.

Single runs are compared by z = (a - b) / sqrt(se_a^2 + se_b^2), two-sided against the normal distribution. The errors
are those of the measurement (sequences, random directions), so this says something about two trained models, not about
their methods. Several seeds are compared by Welch's t-test (Welch 1947) on their values, which does.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hf_lowrank.report.comparability import Number
from hf_lowrank.report.values import format_value

__all__ = ["Delta", "Sample", "difference", "format_p", "stars"]


@dataclass(frozen=True)
class Sample:
    """A number to compare.

    Attributes:
        value: the number, or the mean of several seeds.
        stderr: its standard error; of several seeds, that of the mean over them.
        seeds: the values of the seeds; one value if there is one run.
        sampling: whether `stderr` is that of sampling.
    """

    value: float
    stderr: float | None
    seeds: Sequence[float]
    sampling: bool = True

    @classmethod
    def of(cls, number: Number) -> "Sample":
        """Return the number of a single run."""
        assert number.value is not None
        return cls(number.value, number.stderr, [number.value], number.sampling)

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
        test: `z` or `welch`.
        why: why nothing was tested.
    """

    value: float
    stderr: float | None
    p: float | None
    test: Literal["z", "welch"] | None
    why: str | None = None

    @property
    def size(self) -> str:
        """The difference with its sign and error, `−0.863 ± 0.132`."""
        # a true minus sign, as wide as the plus
        sign = "−" if self.value < 0 else "+" if self.value > 0 else ""
        return f"{sign}{format_value(abs(self.value), self.stderr)}"

    @property
    def text(self) -> str:
        """The difference with its sign, error and p-value, `−0.863 ± 0.132, p < 0.001`."""
        return self.size if self.p is None else f"{self.size}, {format_p(self.p)}"


def difference(ours: Sample, baseline: Sample) -> Delta:
    """Return `ours - baseline` with its significance."""
    value = ours.value - baseline.value
    if len(ours.seeds) > 1 and len(baseline.seeds) > 1:
        error = math.hypot(ours.stderr or 0.0, baseline.stderr or 0.0)
        if error == 0:
            return Delta(value, 0.0, None, None, "no spread between seeds")
        # scipy takes long to import, and only seeds need it
        from scipy.stats import ttest_ind_from_stats

        sides = [part for side in (ours, baseline) for part in (side.value, side.spread, len(side.seeds))]
        p = float(ttest_ind_from_stats(*sides, equal_var=False).pvalue)
        return Delta(value, error, p, "welch")
    if len(ours.seeds) > 1 or len(baseline.seeds) > 1:
        return Delta(value, None, None, None, "one side is a single seed")
    if ours.stderr is None or baseline.stderr is None:
        return Delta(value, None, None, None, "no standard error")
    error = math.hypot(ours.stderr, baseline.stderr)
    if not (ours.sampling and baseline.sampling):
        return Delta(value, None, None, None, "its error is numerical, not statistical")
    if error == 0:
        return Delta(value, 0.0, None, None, "both errors are 0")
    return Delta(value, error, math.erfc(abs(value) / error / math.sqrt(2)), "z")


def format_p(p: float) -> str:
    """Return `p = 0.032`, and `p < 0.001` below that."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}" if p < 0.1 else f"p = {p:.2f}"


def stars(p: float | None) -> str:
    """Return the customary marks: `*` below 0.05, `**` below 0.01, `***` below 0.001."""
    return "" if p is None else "*" * sum(p < level for level in (0.05, 0.01, 0.001))
