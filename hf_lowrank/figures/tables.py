"""Reading and checking what pictures are drawn from: parquet tables of curves and JSON lists of records."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hf_lowrank.report.catalogue import Table
from hf_lowrank.report.values import describe

__all__ = ["lines", "one_space", "read_records", "read_table", "table_up_to"]

_RECORD = ("name", "value", "stderr", "step", "settings", "space")


def read_table(path: Path, form: Table) -> pd.DataFrame:
    """Return a parquet table of the given form, infinities as NaN; an empty one if there is no file.

    Rows without a number in the first column are left out. Raises `ValueError` if the file is not parquet, a column is
    missing, or a column of numbers holds something else.
    """
    if not path.is_file():
        return pd.DataFrame()
    try:
        table = pd.read_parquet(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: not readable as parquet ({error})") from error
    missing = [column for column in (*form.numbers, *form.texts) if column not in table]
    if missing:
        raise ValueError(f"{path}: no column {', '.join(missing)}; there are {', '.join(map(str, table.columns))}")
    for column in (*form.numbers, *(column for column in form.optional if column in table)):
        table[column] = _numeric(table[column], f"{path}: column {column}")
    for column in form.texts:
        table[column] = _texts(table[column])
    return table[table[form.numbers[0]].notna()]


def table_up_to(last_step: int | None, name: str, table: pd.DataFrame) -> pd.DataFrame:
    """Keep the rows of a table of metrics up to a step, all for None; the training curve is the whole run's."""
    if last_step is None or name == "training" or "step" not in table:
        return table
    return table[~(table["step"] > last_step)]


def read_records(path: Path) -> pd.DataFrame:
    """Return the records of a metric that have a value and a step; an empty table if there is no file.

    Raises `ValueError` if the file is not a list of records.
    """
    if not path.is_file():
        return pd.DataFrame(columns=_RECORD)
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path}: not a list of records")
    for index, record in enumerate(records):
        missing = [key for key in _RECORD if key not in record]
        if missing:
            raise ValueError(f"{path}: record {index} has no {', '.join(missing)}; it has {', '.join(record)}")
        if not isinstance(record["settings"], dict):
            raise ValueError(f"{path}: settings of record {index} are {record['settings']!r} and no object")
    table = pd.DataFrame(records, columns=_RECORD)
    for key in ("value", "stderr", "step"):
        table[key] = _numeric(table[key], f"{path}: {key}")
    table["space"] = _texts(table["space"])
    return table.dropna(subset=["value", "step"])


def _numeric(column: "pd.Series[float]", where: str) -> "pd.Series[float]":
    try:
        values = pd.to_numeric(column).astype(float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} holds something that is no number ({error})") from error
    return values.replace([np.inf, -np.inf], np.nan)


def _texts(column: "pd.Series[Any]") -> "pd.Series[Any]":
    return column.map(lambda value: "" if pd.isna(value) else value)


def one_space(table: pd.DataFrame) -> pd.DataFrame:
    """Keep the rows of one space, dense if there are any: factors and their products do not mix."""
    present = set(table["space"]) if "space" in table else set()
    chosen = next((space for space in ("dense", "linearised", "native") if space in present), None)
    return table if chosen is None else table[table["space"] == chosen]


def lines(records: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the label and the records over steps of every line of a metric.

    A line has one space. If records of one space and step differ in a setting, it also has one value of that setting.
    Of two records of one line and step the later counts.
    """
    keys = _differing_settings(records)
    settings = [describe({key: row[key] for key in keys if key in row}) for row in records["settings"]]
    for (space, setting), line in records.assign(setting=settings).groupby(["space", "setting"], sort=False):
        label = ", ".join(part for part in (f"{space} weights" if space else "", setting) if part)
        yield label, line.drop_duplicates("step", keep="last").sort_values("step")


def _differing_settings(records: pd.DataFrame) -> list[str]:
    differing = set()
    for _, together in records.groupby(["space", "step"]):
        for key in {key for settings in together["settings"] for key in settings}:
            if together["settings"].map(lambda settings, key=key: describe({key: settings.get(key)})).nunique() > 1:
                differing.add(key)
    return sorted(differing)
