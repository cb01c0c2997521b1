"""Checking, reading and writing report.json: every report on disk follows the models of `hf_lowrank.report.model`."""

import json
import math
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hf_lowrank.report.files import atomic_path
from hf_lowrank.report.model import SCHEMA_VERSION, Report, json_schema
from hf_lowrank.report.secrets import TOKEN
from hf_lowrank.report.version1 import upgrade

__all__ = [
    "EVALUATIONS", "ReportError", "metric_entry", "read_records", "read_report", "up_to", "validate_report",
    "write_report",
]  # fmt: skip

# results on downstream tasks, in the folder of the metrics
EVALUATIONS = "evaluations.json"

_SHOWN = 80  # characters of a value in an error message


class ReportError(ValueError):
    """A report does not follow the schema, or a file is not a report."""


def metric_entry(
    name: str,
    value: float | None,
    *,
    step: int | None,
    stderr: float | None = None,
    settings: Mapping[str, Any] | None = None,
    space: str | None = None,
    reference: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return one entry of a report's `metrics` as plain data; a value that is not finite becomes null with a note.

    `name` is spelled `dimension/subject/metric`, `space` is "native", "dense", "linearised" or None. Numbers may be
    NumPy's. `settings`, `reference` and `about` are those of `MetricEntry`; an existing note is kept. With neither
    `reference` nor `about`, settings are sorted into the three by the names of version 1 when a report is made.
    """
    entry: dict[str, Any] = {"name": name, "value": value, "stderr": stderr, "space": space}
    entry |= {"step": None if step is None else int(step), "settings": dict(settings or {})}
    if reference is not None or about is not None:
        entry |= {"reference": dict(reference or {}), "about": dict(about or {})}
    if value is not None and not math.isfinite(value):
        entry.get("about", entry["settings"]).setdefault("note", f"not finite: {float(value)}")
        entry["value"] = None
    if entry["value"] is None or stderr is None or not math.isfinite(stderr):
        entry["stderr"] = None
    return entry | {key: float(entry[key]) for key in ("value", "stderr") if entry[key] is not None}


def validate_report(report: Any, where: str = "report.json") -> Report:
    """Return `report`, any mapping, as a `Report` of its own; one of schema version 1 is brought up to date.

    `where` opens the message of an error: the file or repository that the report came from.

    Raises:
        ReportError: it does not follow the schema; the message is one line that names the field and the value.
    """
    version = report.get("schema_version") if isinstance(report, Mapping) else None
    if isinstance(version, int) and not isinstance(version, bool) and version > SCHEMA_VERSION:
        raise ReportError(
            f"{where}: schema_version {version} is newer than {SCHEMA_VERSION}, the newest that this hf_lowrank "
            "reads; upgrade it (pip install --upgrade hf_lowrank)"
        )
    try:
        plain = _plain(report)
        upgrade(plain)
        return Report.model_validate(plain)
    except _NotStorableError as error:
        raise ReportError(f"{where}: {error}") from None
    except RecursionError:
        raise ReportError(f"{where}: nested too deeply to be a report") from None
    except ValidationError as error:
        raise ReportError(f"{where}: {_explain(error)}") from None


def write_report(report: Mapping[str, Any], path: Path | str) -> Path:
    """Check `report` and write it to `path` as indented JSON with sorted keys; return the path.

    The file is replaced in one step. If the report is not valid, `ReportError` is raised and the old file stays.
    """
    path = Path(path)
    plain = _plain(validate_report(report, where=str(path)))
    # reports are made to be shown: a token that someone put into a name by mistake must not be
    text = TOKEN.sub("<token>", json.dumps(plain, indent=2, sort_keys=True, allow_nan=False))
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return path


def read_report(path_or_folder: Path | str) -> Report:
    """Read and check a report: a file, a `publish` folder or a run's folder (which holds `publish`).

    Raises `FileNotFoundError` if there is none, and `ReportError` if it is not JSON, does not follow the schema or has
    a newer `schema_version` than this package reads.
    """
    path = _locate(Path(path_or_folder))
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ReportError(
            f"{path}: not readable as JSON ({error}); write the report again or fetch it anew"
        ) from error
    return validate_report(report, where=str(path))


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All records in a metrics folder as plain data, by file and then in the order in which they were measured."""
    paths = [path for path in sorted(folder.glob("*.json")) if path.name != EVALUATIONS]
    return [record for path in paths for record in json.loads(path.read_text())]


def up_to(last_step: int | None, entries: Iterable[Mapping[str, Any]]) -> list[Any]:
    """Return the entries of a report that were measured at `last_step` or before; all of them for None."""
    return [e for e in entries if last_step is None or e["step"] is None or e["step"] <= last_step]


def _locate(path: Path) -> Path:
    candidates = [path, path / "report.json", path / "publish" / "report.json"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if path.is_dir():
        raise FileNotFoundError(f"no report: looked for {candidates[1]} and {candidates[2]}")
    raise FileNotFoundError(f"no report: {path} does not exist")


class _NotStorableError(ValueError):
    """JSON cannot hold a value; the message names the field."""


def _plain(value: Any, path: str = "") -> Any:
    """Return `value` in JSON's types: models as dictionaries, tuples as lists."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise _NotStorableError(f"{path or 'the report'}: the key {_shown(key)} is not a string")
        return {key: _plain(item, f"{path}.{key}" if path else key) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise _NotStorableError(f"{path}: {value} is not a finite number; store null and say why in about.note")
    if isinstance(value, int) and abs(value) >= 2**1023:
        raise _NotStorableError(f"{path}: the number is larger than any float")
    if not isinstance(value, (str, int, float, type(None))):
        kind = type(value).__name__
        raise _NotStorableError(f"{path}: {_shown(value)} is a {kind}, which JSON does not have")
    return value


_schema = cache(json_schema)


def _explain(problems: ValidationError) -> str:
    """Return one line that names the field and what is wrong with it."""
    # what is wrong at the top explains what is wrong further down
    problem = min(problems.errors(include_url=False), key=lambda error: len(error["loc"]))
    kind, value, limits = problem["type"], _shown(problem["input"]), problem.get("ctx", {})
    field, choices = _field(problem["loc"])
    if kind == "missing":
        return f"{field} is missing"
    if kind == "extra_forbidden":
        known = next(choice["properties"] for choice in choices if "properties" in choice)
        name = _cut(str(problem["loc"][-1]))
        return f"{f'{field}.' if field else ''}{name} is not a known field; known: {', '.join(known)}"
    if kind == "greater_than_equal":
        return f"{field}: {value} is less than {limits['ge']}"
    if kind == "string_pattern_mismatch":
        return f"{field}: {value} is empty"
    types = [choice["type"] for choice in choices if "type" in choice]
    if kind == "literal_error":
        literals = [literal for choice in choices for literal in choice.get("enum", [choice.get("const")])]
        return f"{field}: {value} is not {' or '.join(map(json.dumps, literals))}"
    return f"{field or 'the report'}: {value} is not of type {' or '.join(types)}"


def _field(location: tuple[int | str, ...]) -> tuple[str, list[dict[str, Any]]]:
    """Return a field's place in words, and its alternatives in the JSON Schema.

    The place ends where the schema does not know it, as with an unknown field.
    """
    field, choices = "", _choices(_schema())
    for part in location:
        if isinstance(part, int):
            inside = [choice["items"] for choice in choices if "items" in choice]
        else:
            inside = [choice.get("properties", {}).get(part, choice.get("additionalProperties")) for choice in choices]
        inside = [schema for schema in inside if isinstance(schema, dict)]
        if not inside:
            break
        field += f"[{part}]" if isinstance(part, int) else f".{part}" if field else part
        choices = _choices(inside[0])
    return field, choices


def _choices(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a schema's alternatives with all references resolved."""
    if "anyOf" in schema:
        return [choice for each in schema["anyOf"] for choice in _choices(each)]
    reference = schema.get("$ref")
    return [schema] if reference is None else _choices(_schema()["$defs"][reference.rpartition("/")[2]])


def _shown(value: Any) -> str:
    return _cut(repr(value))


def _cut(text: str) -> str:
    line = " ".join(text.splitlines())
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 3]}..."
