"""Results of downstream tasks item by item, in `publish/metrics/items.parquet`, and which of them make up a number.

A row is one item's result in one metric of one evaluation. With the values v and weights w of an evaluation's items a
metric is sum(w v) / sum(w), or exp of that for a perplexity, whose items hold a loss in nats. Metrics that are no mean
over items, such as an F1 score, have no rows. The results of a group of tasks are those of its tasks, weighted as in
the group's number. Evaluations with several seeds have rows for each seed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

__all__ = ["COLUMNS", "ITEMS", "TEXTS", "evaluation_settings", "items_of", "read_items"]

ITEMS = "items.parquet"
# what an item was asked, and what was answered: only where it was asked for
TEXTS = ("prompt", "target", "answer")
# Column -> its type. `settings` is JSON with sorted keys: two evaluations of a task version whose settings are equal
# asked the same. `item` is the number and a hash of the document, `group` is null if items are independent.
COLUMNS = {
    "task": "string", "task_version": "string", "metric": "string", "step": "Int64", "settings": "string",
    "form": "string", "dtype": "string", "item": "string", "group": "string", "value": "float64", "weight": "float64",
}  # fmt: skip
# counts of what was evaluated, and the seeds of an entry that stands for several evaluations
_NOT_SETTINGS = ("samples", "tasks", "seeds")


def read_items(path: Path, texts: bool = False) -> pd.DataFrame:
    """Return a table of items, an empty one if there is no file; `texts` adds prompt, target and answer where present.

    Raises:
        ValueError: the file is not parquet, a column is missing or holds something else, or a result is there twice.
    """
    if not path.is_file():
        return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in COLUMNS.items()})
    try:
        # also raised by pyarrow for a column that is not there
        table = pd.read_parquet(path, columns=None if texts else list(COLUMNS))
        table = table.astype(COLUMNS)
    # pyarrow's errors, which are ValueErrors and OSErrors, or pandas' of a column that is not there
    except (ValueError, TypeError, OSError, KeyError) as error:
        raise ValueError(f"{path}: not readable as results by item ({' '.join(str(error).split())})") from error
    twice = table.duplicated([name for name in COLUMNS if name not in ("group", "value", "weight")])
    if twice.any():
        first = table[twice].iloc[0]
        raise ValueError(
            f"{path}: item {first['item']} of {first['task']} stands there twice for step {first['step']}"
        )
    return table


def evaluation_settings(entry: Mapping[str, Any], seed: Any = None) -> str:
    """Return the `settings` of the items of a row of evaluations.json, or of a report's entry for one of its seeds."""
    settings = {key: value for key, value in entry["settings"].items() if key not in _NOT_SETTINGS}
    more = {} if seed is None else {"seed": seed}
    fields = {"num_fewshot": entry["num_fewshot"], "limit": entry["limit"]}
    return json.dumps({**fields, **settings, **more}, sort_keys=True)


def items_of(table: pd.DataFrame, entry: Mapping[str, Any]) -> pd.DataFrame | None:
    """Return the items that make up a number of a report, with the columns item, group, value and weight.

    Of several seeds the values are means over them.

    Args:
        table: of the same run, as `read_items` returns it.
        entry: one of the report's `evaluations`.

    Returns:
        None if the items are not there, or not there for every seed.
    """
    about = entry["about"] or {}
    chosen = (table["task"] == entry["task"]) & (table["metric"] == entry["metric"])
    chosen &= table["step"].isna() if entry["step"] is None else table["step"] == entry["step"]
    for key in ("form", "dtype"):
        chosen &= table[key].isna() if about.get(key) is None else table[key] == about[key]
    version = entry["task_version"]
    chosen &= table["task_version"].isna() if version is None else table["task_version"] == str(version)
    seeds = (entry["settings"] or {}).get("seeds") or [None]
    rows = table[chosen.fillna(False).astype(bool)]
    rows = rows[rows["settings"].isin([evaluation_settings(entry, seed) for seed in seeds])]
    if rows.empty or rows["value"].isna().any():
        return None
    items = rows.groupby("item", sort=False).agg(
        group=("group", "first"), value=("value", "mean"), weight=("weight", "first"), seeds=("value", "size")
    )
    if (items["seeds"] != len(seeds)).any():
        return None
    return items.drop(columns="seeds").reset_index()
