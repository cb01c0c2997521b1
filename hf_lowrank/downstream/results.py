"""Results on downstream tasks, in `<run>/publish/metrics/evaluations.json`, and what a report makes of them.

The file is a list of rows. A row is one number of one evaluation: an entry of a report's `evaluations` whose
`settings` name one seed, with the `fingerprint` of the evaluation that found it and the digest of the `weights` it was
found on; both are None where they are not known.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hf_lowrank.families.records import EVALUATIONS, finite
from hf_lowrank.report.files import atomic_path

__all__ = [
    "EVALUATIONS",
    "HARNESS_SEEDS",
    "combine_seeds",
    "evaluation_entries",
    "forget_evaluations",
    "read_evaluations",
    "replace_evaluations",
    "write_evaluations",
]

# what lm-evaluation-harness seeds Python, NumPy, torch and the few-shot sampler with where no seed is asked for
HARNESS_SEEDS = "0,1234,1234,1234"

Row = dict[str, Any]

_FIELDS = ("task", "metric", "value", "stderr", "num_fewshot", "limit", "step", "task_version", "settings")


def read_evaluations(folder: Path) -> list[Row] | None:
    """The rows in a metrics folder, None where there is no file; `ValueError` where it is damaged."""
    path = folder / EVALUATIONS
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it to evaluate anew") from error


def write_evaluations(folder: Path, rows: Iterable[Row]) -> None:
    """Replace the rows in a metrics folder; a reader meets the old ones or the new ones."""
    with atomic_path(folder / EVALUATIONS) as path:
        path.write_text(json.dumps(list(rows), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def forget_evaluations(folder: Path, step: int) -> None:
    """Drop what was found beyond a step; everything where the file cannot be read."""
    try:
        rows = read_evaluations(folder)
    # damaged by a disk, a copy or an editor
    except Exception:
        rows = []
    if rows is not None and not (kept := [row for row in rows if (row["step"] or 0) <= step]):
        (folder / EVALUATIONS).unlink(missing_ok=True)
    elif rows is not None and len(kept) < len(rows):
        write_evaluations(folder, kept)


def replace_evaluations(rows: list[Row], new: list[Row]) -> list[Row]:
    """The rows with new ones in the place of what was found with the same settings before.

    A row whose fingerprint is not known, from a report or from training, gives way whatever its seed is.
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
    for found in groups.values():
        if found[0]["limit"] is not None and _key({**found[0], "limit": None}) in whole:
            continue
        asked = [row for row in found if row["settings"].get("seed") != HARNESS_SEEDS]
        entries.append(combine_seeds(asked or found))
    return sorted(entries, key=lambda entry: -1 if entry["step"] is None else entry["step"])


def combine_seeds(rows: list[Row]) -> dict[str, Any]:
    """One entry for rows that differ in nothing but their seed.

    The value is the mean over the k seeds. All of them answer the same items, so the error that comes from the choice
    of items does not shrink with k, and what the seeds themselves add does: stderr^2 = mean_i(stderr_i^2) + s^2 / k,
    with s^2 the sample variance of the k values. Where a seed changes nothing, as without few-shot examples, this is
    the standard error of one; where it does, it errs on the large side.
    """
    first = {key: rows[-1].get(key) for key in _FIELDS}
    settings = {key: value for key, value in dict(first["settings"] or {}).items() if key != "seed"}
    seeds = [row["settings"]["seed"] for row in rows if "seed" in (row["settings"] or {})]
    if seeds:
        settings["seeds"] = sorted(seeds, key=str)
    values = [row["value"] for row in rows]
    errors = [row["stderr"] for row in rows]
    if any(value is None for value in values):
        return {**first, "value": None, "stderr": None, "settings": settings}
    mean = math.fsum(values) / len(values)
    spread = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) if len(values) > 1 else 0.0
    stderr = None
    if all(error is not None for error in errors):
        stderr = finite(math.sqrt(math.fsum(error**2 for error in errors) / len(errors) + spread / len(values)))
    return {**first, "value": mean, "stderr": stderr, "settings": settings}


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two rows that may only differ in their seed share."""
    settings = row.get("settings") or {}
    return (
        *(row["step"], row["task"], row["metric"], row["num_fewshot"], row["limit"]),
        *(settings.get("form"), settings.get("dtype"), settings.get("context_length")),
    )
