"""What the error of a number was made of, so that two numbers can be compared pair by pair.

Beside the other files of a family, `<file>.samples.parquet` holds one row a record:
`name`, `space`, `step`, `settings` and `reference` (JSON with sorted keys) say which record, the other columns are
`Samples`: `kind`, `units`, `rows`, `sums` (rows x units, in C order) and `weights`.

Of a number that is linear in the losses (a loss, a sharpness, a barrier) `sums` are what each sequence contributes, in
nats, and `weights` are tokens: value = sum(sums) / rows / sum(weights). Of any other number (a variance, CKA, the
perplexity) `sums` are jackknife pseudo-values with weights of 1, whose mean is the number without its first-order bias
(of the perplexity, the number itself). Sums of several rows are rounded to float32.

Shapes: R rows (directions), n units (sequences, or whatever else was drawn).
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from hf_lowrank.report.files import atomic_path

__all__ = [
    "Kind",
    "Sampled",
    "Samples",
    "pseudo_values",
    "read_samples",
    "sample_key",
    "samples_path",
    "write_samples",
]

# what was drawn: a row's sequences, random directions, both, groups of sequences, or random vectors
Kind = Literal["sequence", "direction", "direction x sequence", "group", "vector"]
Array = NDArray[np.float64]
# which record: name, space, step, settings and reference
Key = tuple[str, str | None, int | None, str, str]

# numbers in one file: a file of kilobytes can unpack to terabytes
_MOST_NUMBERS = 2**26


@dataclass(frozen=True, eq=False)
class Samples:
    """The parts of a number that were drawn at random, each with its share.

    Attributes:
        kind: what the units are.
        units: (n,) ids. Those of sequences depend on their tokens alone, so that two runs' sequences can be matched.
        sums: (R, n) float64.
        weights: (n,) float64.

    Raises:
        ValueError: the shapes do not fit, there is nothing in it, or the kind is unknown.
    """

    kind: Kind
    units: tuple[str, ...]
    sums: Array
    weights: Array

    def __post_init__(self) -> None:
        sums, n = np.atleast_2d(np.asarray(self.sums, dtype=np.float64)), len(self.units)
        weights = np.asarray(self.weights, dtype=np.float64)
        if (
            self.kind not in get_args(Kind)
            or sums.ndim != 2
            or sums.size == 0
            or {*weights.shape, sums.shape[1]} != {n}
        ):
            raise ValueError(
                f"samples over {self.kind!r}: {n} units, sums of {sums.shape}, weights of {weights.shape}"
            )
        object.__setattr__(self, "sums", sums)
        object.__setattr__(self, "weights", weights)

    @classmethod
    def equal(cls, kind: Kind, units: Iterable[Any], sums: Array) -> "Samples":
        """Samples of equal weight, such as pseudo-values."""
        names = tuple(map(str, units))
        return cls(kind, names, sums, np.ones(len(names)))

    @property
    def value(self) -> float:
        """sum(sums) / R / sum(weights)."""
        return float(self.sums.sum() / len(self.sums) / self.weights.sum())

    @property
    def over(self) -> str:
        """What the error is over, in words."""
        rows, n = self.sums.shape
        if self.kind == "direction x sequence" and 1 in (rows, n):
            return "over directions" if rows > 1 else "over sequences"
        return {
            "sequence": "over sequences",
            "direction": "over directions",
            "direction x sequence": "over directions and sequences",
            "group": "jackknife over groups of sequences",
            "vector": "over random vectors",
        }[self.kind]

    def error(self, variance: float | None = None) -> tuple[float, float]:
        """Standard error of `value`, and the degrees of freedom for its t quantile; NaN of a single unit.

        A `variance` (its value V is given) that comes out small has a small error s, too small an interval then. The
        degrees of freedom f of each mean square become f (f + 2) / (4 (f + 3)), which is 2 / CV^2 of X^2 for X
        chi-squared (CV is the coefficient of variation), as Satterthwaite's rule has it; and there are at most
        V^2 / (2 s^2), which is the same of what is seen, or 4, which simulation shows to do (metrics/README.md).

        Of one row it is that of a ratio of means. Rows and units that are drawn alike independently are two crossed
        factors: the variance of the mean is a sum of three mean squares, without what the interaction adds to the
        first two (Searle, Casella and McCulloch 1992, Section 4.3; a negative component is 0), with Satterthwaite's
        degrees of freedom.
        """
        R, n = self.sums.shape
        # the deviation of `value` is the mean over all of these
        parts = (self.sums - self.value * self.weights) * n / self.weights.sum()
        by_row, by_unit = parts.mean(1), parts.mean(0)
        rest = parts - by_row[:, None] - by_unit + parts.mean()
        sizes = [(by_row, R, R - 1), (by_unit, n, n - 1), (rest, R * n, (R - 1) * (n - 1))]
        variances = [float((part**2).sum()) / (f * count) if f else 0.0 for part, count, f in sizes]
        if R * n == 1:
            return math.nan, math.nan
        both = variances[2]
        total = max(variances[0] - both, 0.0) + max(variances[1] - both, 0.0) + both
        if total == 0:
            return 0.0, float(max(R, n) - 1)
        dofs = [f if variance is None else f * (f + 2) / (4 * (f + 3)) for _, _, f in sizes]
        noise = sum(v**2 / dof for v, dof in zip(variances, dofs, strict=True) if dof)
        if variance is not None:
            return math.sqrt(total), min(total**2 / noise, max(variance**2 / (2 * total), 4.0))
        return math.sqrt(total), total**2 / noise


@dataclass(frozen=True, eq=False)
class Sampled:
    """A number and what its error is made of.

    Attributes:
        value: the number, which may have a bias of first order that `samples.value` has not.
        samples: what was drawn.
        of_variance: whether it is a variance; see `Samples.error`.
    """

    value: float
    samples: Samples
    of_variance: bool = False

    def error(self) -> tuple[float, float]:
        """Standard error and degrees of freedom."""
        return self.samples.error(self.value if self.of_variance else None)

    @property
    def stderr(self) -> float:
        """Its standard error."""
        return self.error()[0]


def pseudo_values(value: float, left_out: Iterable[float] | Array) -> Array:
    """Jackknife pseudo-values of a number, (n,), from what it is without each of n units."""
    others = np.asarray(left_out, dtype=np.float64)
    return len(others) * value - (len(others) - 1) * others


def sample_key(
    name: str, space: str | None, step: int | None, settings: Mapping[str, Any], reference: Mapping[str, Any]
) -> Key:
    """What tells a record from the others, equal for a record in memory and the same one in report.json."""
    texts = (json.dumps(part, sort_keys=True, default=str) for part in (settings, reference))
    return (name, space, step, *texts)  # type: ignore[return-value]


def samples_path(folder: Path, file: str) -> Path:
    """Where the samples of a family are."""
    return folder / f"{file}.samples.parquet"


def write_samples(path: Path, samples: Mapping[Key, Samples]) -> None:
    """Replace a file of samples; there is none for no samples."""
    # both take long to import, and only who writes or reads needs them
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not samples:
        path.unlink(missing_ok=True)
        return
    columns: dict[str, list[Any]] = {}
    for key, each in samples.items():
        sums = each.sums.astype(np.float32) if len(each.sums) > 1 else each.sums
        row: dict[str, Any] = dict(zip(("name", "space", "step", "settings", "reference"), key, strict=True))
        row |= {"kind": each.kind, "units": each.units, "rows": len(sums)}
        row |= {"sums": sums.astype(np.float64).ravel(), "weights": each.weights}
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    numbers, text = pa.list_(pa.float64()), pa.string()
    types = {"name": text, "space": text, "step": pa.int64(), "settings": text, "reference": text, "kind": text}
    types |= {"units": pa.list_(text), "rows": pa.int64(), "sums": numbers, "weights": numbers}
    with atomic_path(path) as temporary:
        pq.write_table(pa.table(columns, schema=pa.schema(types)), temporary, compression="zstd")


def read_samples(path: Path) -> dict[Key, Samples]:
    """The samples of every record in a file, an empty dictionary if there is none.

    Raises:
        ValueError: the file is damaged, larger than any real one, or of another form.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        return {}
    try:
        with pq.ParquetFile(path) as file:
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            count = sum(group.column(i).num_values for group in groups for i in range(group.num_columns))
            size = sum(group.total_byte_size for group in groups)
            if count > _MOST_NUMBERS or size > 8 * _MOST_NUMBERS:
                raise ValueError(f"{count:,} numbers in {size:,} bytes are more than any real file has")
            table = file.read()
        found = {}
        for row in table.to_pylist():
            key: Key = (row["name"], row["space"], row["step"], row["settings"], row["reference"])
            sums = np.array(row["sums"], dtype=np.float64).reshape(row["rows"], -1)
            found[key] = Samples(row["kind"], tuple(row["units"]), sums, np.array(row["weights"], dtype=np.float64))
    except (ValueError, TypeError, KeyError, OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} is no readable file of samples: {error}") from error
    return found
