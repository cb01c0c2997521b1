"""Reading the curves of runs that others made: tables of numbers and names, and nothing else is taken from them."""

from pathlib import Path

import pandas as pd
import pyarrow
import pyarrow.parquet as pq

from hf_lowrank.figures.tables import read_table
from hf_lowrank.report.catalogue import tables as catalogued_tables

__all__ = ["read_curves"]

# a parquet file of kilobytes can unpack to terabytes
_MOST_ROWS = 2_000_000
_MOST_BYTES = 512 * 2**20
_LONGEST_TEXT = 1000  # characters of a name; repeated names are stored once and unpacked in every row


def read_curves(metrics: Path) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Return the tables that a `metrics` folder holds, and what is wrong with those that cannot be used.

    A table that is broken, of another form or unreasonably large is left out: a run is compared without it.
    """
    tables, problems = {}, []
    for name, form in catalogued_tables().items():
        path = metrics / f"{name}.parquet"
        if not path.is_file():
            continue
        try:
            _check_size(path)
            tables[name] = read_table(path, form)
        # pyarrow raises its own kinds beside ValueError and OSError for files that were damaged or made up
        except (ValueError, OSError, pyarrow.ArrowException, OverflowError, MemoryError) as error:
            reason = " ".join(str(error).replace(str(path), path.name).split())
            problems.append(f"its curves in {path.name} are left out: {reason[:200]}")
    return tables, problems


def _check_size(path: Path) -> None:
    """Raise `ValueError` for a file that would not fit into memory or holds what no table of metrics does."""
    with pq.ParquetFile(path) as file:
        if file.metadata.num_rows > _MOST_ROWS:
            raise ValueError(f"{file.metadata.num_rows:,} rows, more than {_MOST_ROWS:,}")
        groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
        size = sum(group.total_byte_size for group in groups)
        if size > _MOST_BYTES:
            raise ValueError(f"{size:,} bytes unpacked, more than {_MOST_BYTES:,}")
        schema = file.schema_arrow
    texts = [field.name for field in schema if _is_text(field.type)]
    for field in schema:
        if pyarrow.types.is_nested(field.type) or pyarrow.types.is_binary(field.type):
            raise ValueError(f"column {field.name[:80]} holds {str(field.type)[:80]} and neither numbers nor names")
    with pq.ParquetFile(path, read_dictionary=texts) as file:
        for chunk in (chunk for name in texts for chunk in file.read(columns=[name]).column(0).chunks):
            if any(len(str(value)) > _LONGEST_TEXT for value in chunk.dictionary.to_pylist()):
                raise ValueError(f"a name is longer than {_LONGEST_TEXT:,} characters")


def _is_text(kind: pyarrow.DataType) -> bool:
    plain = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    return bool(pyarrow.types.is_string(plain) or pyarrow.types.is_large_string(plain))
