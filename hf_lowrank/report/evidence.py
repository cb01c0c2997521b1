"""What a run keeps of its measurements beside the numbers: sums by sequence or direction, results by item."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from hf_lowrank.report.comparability import Number
from hf_lowrank.report.model import EvaluationEntry
from hf_lowrank.report.pairing import Evidence, Items, blended
from hf_lowrank.report.samples import Key, Samples, read_samples, sample_key

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Kept"]


@dataclass(frozen=True, eq=False)
class Kept:
    """What a run keeps, by the number that it belongs to.

    Attributes:
        samples: of metrics.
        items: a table of results by item, None if there is none.
        problems: why a file cannot be used, a sentence each.
    """

    samples: dict[Key, Samples] = field(default_factory=dict)
    items: "pd.DataFrame | None" = None
    problems: tuple[str, ...] = ()

    @classmethod
    def read(cls, *folders: Path, check: Callable[[Path], object] = lambda path: None) -> Self:
        """Read what is in a run's folders of metrics, of which the later ones count more.

        A file that cannot be used is left out with its reason.

        Args:
            folders: that need not exist.
            check: raises `ValueError` for a table of items that is not to be opened.
        """
        samples: dict[Key, Samples] = {}
        items, problems = None, []
        for path in (path for folder in folders for path in sorted(folder.glob("*.parquet"))):
            try:
                if path.name.endswith(".samples.parquet"):
                    samples |= read_samples(path)
                elif path.name == "items.parquet":
                    # pandas takes long to import, and only results by item need it
                    from hf_lowrank.report.items import read_items

                    check(path)
                    items = read_items(path)
            # a damaged or made-up file can raise anything, and costs what it holds alone
            except Exception as error:
                reason = " ".join(str(error).replace(str(path), path.name).split())
                problems.append(f"differences that need {path.name} are unpaired: {reason[:200]}")
        return cls(samples, items, tuple(problems))

    def of(self, number: Number) -> Evidence | None:
        """Return what is kept of a number, None if that is nothing or belongs to another number."""
        if number.value is None or not number.comparable:
            return None
        if number.parts:
            (one, weight), (other, _) = number.parts
            return blended(self.of(one), self.of(other), 1 - weight)
        if isinstance(number.entry, EvaluationEntry):
            return None if self.items is None else self._items(number.entry)
        key = sample_key(number.name, number.space, number.step, number.settings, number.reference)
        samples = self.samples.get(key)
        if samples is None:
            return None
        # pseudo-values give the number without its bias; sums of several rows are rounded
        given = number.about.get("corrected", number.value)
        rounding = max(0.01 * (number.stderr or 0.0), 1e-6 * abs(number.value))
        close = isinstance(given, int | float) and abs(samples.value - given) <= rounding
        return samples if close else None

    def error_of(self, number: Number) -> tuple[float, float] | None:
        """Return standard error and degrees of freedom of a number by its samples, None if it has none."""
        samples = self.of(number)
        return samples.error() if isinstance(samples, Samples) else None

    def _items(self, entry: EvaluationEntry) -> Items | None:
        from hf_lowrank.report.items import items_of

        assert self.items is not None
        table = items_of(self.items, entry)
        if table is None or table.empty:
            return None
        groups = None if table["group"].isna().any() else table["group"].tolist()
        columns: dict[str, Any] = {name: table[name].to_numpy(dtype=float) for name in ("value", "weight")}
        for exponential in (False, True):
            items = Items(table["item"].tolist(), columns["value"], columns["weight"], groups, exponential)
            # a perplexity beyond all floats is no number of a report
            if exponential and columns["value"].max() > 700:
                return None
            if math.isclose(items.value, entry.value or 0.0, rel_tol=1e-6, abs_tol=1e-9):
                return items
        return None
