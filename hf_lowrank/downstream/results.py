"""Results on downstream tasks, in `<run>/publish/metrics`, and what a report makes of them.

`evaluations.json` is a list of rows. A row is one number of one evaluation: an entry of a report's `evaluations` whose
`settings` name one seed, with the `fingerprint` of the evaluation and the digest of the `weights`. Both are None if
they are not known. `items.parquet` has the results item by item (`hf_lowrank.report.items`); a row that was just
evaluated carries its own in `items` until it is written.
"""

import json
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from hf_lowrank.families.records import EVALUATIONS, finite
from hf_lowrank.report.files import atomic_path
from hf_lowrank.report.items import COLUMNS, ITEMS, TEXTS, evaluation_settings, read_items
from hf_lowrank.report.version1 import upgrade_entry

__all__ = [
    "EVALUATIONS", "HARNESS_SEEDS", "combine_seeds", "evaluation_entries", "forget_evaluations", "read_evaluations",
    "replace_evaluations", "with_items", "write_evaluations",
]  # fmt: skip

logger = logging.getLogger(__name__)

# what lm-evaluation-harness seeds Python, NumPy, torch and the few-shot sampler with where no seed is asked for
HARNESS_SEEDS = "0,1234,1234,1234"

Row = dict[str, Any]

_FIELDS = ("task", "metric", "value", "stderr", "num_fewshot", "limit", "step", "task_version", "settings", "about")


def read_evaluations(folder: Path) -> list[Row] | None:
    """The rows in a metrics folder, None if there is no file; `ValueError` if it is damaged."""
    path = folder / EVALUATIONS
    try:
        rows = list(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
        for row in rows or []:
            upgrade_entry(row)
        return rows
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it to evaluate anew") from error


def write_evaluations(folder: Path, rows: Iterable[Row]) -> None:
    """Replace the rows in a metrics folder, and their items; a reader meets the old ones or the new ones."""
    rows = list(rows)
    _write_items(folder, rows)
    written = [{key: value for key, value in row.items() if key != "items"} for row in rows]
    with atomic_path(folder / EVALUATIONS) as path:
        path.write_text(json.dumps(written, indent=1, allow_nan=False) + "\n", encoding="utf-8")


# ---- items ----

# what identifies a row among all rows, in the columns of a table of items
_IDENTITY = ["task", "task_version", "metric", "step", "settings", "form", "dtype"]


def _identity(row: Row) -> tuple[Any, ...]:
    about, version = row.get("about") or {}, row["task_version"]
    words = (evaluation_settings(row), about.get("form"), about.get("dtype"))
    return (row["task"], None if version is None else str(version), row["metric"], row["step"], *words)


def _stored_items(folder: Path) -> pd.DataFrame:
    """The table of a metrics folder; none where it cannot be read."""
    try:
        return read_items(folder / ITEMS, texts=True)
    # damaged by a disk, a copy or an editor: it costs the items, not the results
    except ValueError as error:
        logger.warning("earlier results by item are dropped: %s", error)
        return read_items(folder / "none")


def _identities(table: pd.DataFrame) -> list[tuple[Any, ...]]:
    columns = table[_IDENTITY].astype(object)
    return list(columns.where(columns.notna(), None).itertuples(index=False, name=None))


def with_items(folder: Path, rows: list[Row]) -> list[Row]:
    """The rows with the items that the metrics folder has of them; those that carry their own keep them."""
    if all("items" in row for row in rows):
        return rows
    table = _stored_items(folder)
    identities = pd.Series(_identities(table), index=table.index, dtype=object)
    columns = ["item", "group", "value", "weight"]
    found = {}
    for identity, chosen in table.groupby(identities, sort=False) if len(table) else ():
        plain = chosen[columns].astype(object)
        found[identity] = plain.where(plain.notna(), None).to_dict("records")
    return [{"items": found.get(_identity(row), []), **row} for row in rows]


def _write_items(folder: Path, rows: list[Row]) -> None:
    """Add the items that rows carry, and drop those of which there is no row any more."""
    path = folder / ITEMS
    fresh = {_identity(row): row["items"] for row in rows if "items" in row}
    if not path.is_file() and not any(fresh.values()):
        return
    standing = {_identity(row) for row in rows} - fresh.keys()
    table = _stored_items(folder)
    kept = table[[identity in standing for identity in _identities(table)]]
    added = [dict(zip(_IDENTITY, of, strict=True)) | item for of, items in fresh.items() for item in items]
    whole = pd.concat([kept, pd.DataFrame(added).astype(_types(added))], ignore_index=True) if added else kept
    if whole.empty:
        path.unlink(missing_ok=True)
    elif added or len(kept) < len(table):
        # whatever order the results came in: several processes finish in any
        whole = whole.sort_values(["step", *(name for name in _IDENTITY if name != "step")], kind="stable")
        with atomic_path(path) as temporary:
            whole.to_parquet(temporary, index=False, compression="zstd")


def _types(added: list[Row]) -> dict[str, str]:
    texts = {key: "string" for key in TEXTS if any(key in row for row in added)}
    return {**COLUMNS, **texts}


def forget_evaluations(folder: Path, step: int) -> None:
    """Drop the results of later steps than `step`; all of them where the file cannot be read."""
    try:
        rows = read_evaluations(folder)
    # damaged by a disk, a copy or an editor
    except Exception:
        rows = []
    if rows is not None and not (kept := [row for row in rows if (row["step"] or 0) <= step]):
        for name in (EVALUATIONS, ITEMS):
            (folder / name).unlink(missing_ok=True)
    elif rows is not None and len(kept) < len(rows):
        write_evaluations(folder, kept)


def replace_evaluations(rows: list[Row], new: list[Row]) -> list[Row]:
    """The rows, with new ones in the place of earlier ones with the same settings.

    A row whose fingerprint is not known, from a report or from training, is replaced whatever its seed is.
    """
    keys = {_key(row): row.get("definition") for row in new}
    seeds = {(*_key(row), row["settings"].get("seed")) for row in new}

    def replaced(row: Row) -> bool:
        known = row.get("fingerprint") is not None
        # other weights, another tokenizer or version of the task: not to be averaged with the new ones
        if _key(row) in keys and row.get("definition") != keys[_key(row)]:
            return True
        return (*_key(row), row["settings"].get("seed")) in seeds if known else _key(row) in keys

    return [row for row in rows if not replaced(row)] + new


def evaluation_entries(rows: list[Row]) -> list[dict[str, Any]]:
    """The `evaluations` of a report: by step, one entry for all seeds of a task, metric and setting.

    Rows that a better one supersedes are left out: the harness's own seeds where seeds were asked for, and part of a
    task's items where all of them were evaluated.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(_key(row), []).append(row)
    whole = {_key({**row, "limit": None}) for row in rows if row["limit"] is None}
    entries = []
    for group in groups.values():
        if group[0]["limit"] is not None and _key({**group[0], "limit": None}) in whole:
            continue
        asked = [row for row in group if row["settings"].get("seed") != HARNESS_SEEDS]
        entries.append(combine_seeds(asked or group))
    return sorted(entries, key=lambda entry: -1 if entry["step"] is None else entry["step"])


def combine_seeds(rows: list[Row]) -> dict[str, Any]:
    """One entry for rows that differ in nothing but their seed.

    The value is the mean over the k seeds. All of them answer the same items, so the error that comes from the choice
    of items does not shrink with k, and what the seeds themselves add does: stderr^2 = mean_i(stderr_i^2) + s^2 / k,
    with s^2 the sample variance of the k values. Where a seed changes nothing, as without few-shot examples, this is
    the standard error of one; if it does, it errs on the large side.
    """
    last = {key: rows[-1].get(key) for key in _FIELDS} | {"about": rows[-1].get("about") or {}}
    settings = {key: value for key, value in dict(last["settings"] or {}).items() if key != "seed"}
    seeds = [row["settings"]["seed"] for row in rows if "seed" in (row["settings"] or {})]
    if seeds:
        settings["seeds"] = sorted(seeds, key=str)
    values = [row["value"] for row in rows]
    errors = [row["stderr"] for row in rows]
    if any(value is None for value in values):
        return {**last, "value": None, "stderr": None, "settings": settings}
    mean = math.fsum(values) / len(values)
    spread = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) if len(values) > 1 else 0.0
    stderr = None
    if all(error is not None for error in errors):
        stderr = finite(math.sqrt(math.fsum(error**2 for error in errors) / len(errors) + spread / len(values)))
    return {**last, "value": mean, "stderr": stderr, "settings": settings}


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two rows that may only differ in their seed share."""
    settings, about = row.get("settings") or {}, row.get("about") or {}
    return (
        *(row["step"], row["task"], row["metric"], row["num_fewshot"], row["limit"]),
        *(about.get("form"), about.get("dtype"), settings.get("context_length")),
    )
