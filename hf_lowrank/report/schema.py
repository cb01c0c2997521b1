"""report.json: its schema, and reading and writing that keep to it.

`schema.json` beside this file is a JSON Schema (draft 2020-12). Beyond what it can say, a report holds no NaN and no
infinity, which JSON does not have: a number that could not be measured is null, with the reason in its settings.
"""

import json
import math
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator, ValidationError
from jsonschema.exceptions import best_match
from jsonschema.validators import extend

from hf_lowrank.report.files import atomic_path
from hf_lowrank.report.secrets import TOKEN

__all__ = ["SCHEMA_VERSION", "ReportError", "metric_entry", "read_report", "validate_report", "write_report"]

SCHEMA_VERSION = 1

_SHOWN = 80  # characters of a value in an error message


class ReportError(ValueError):
    """A report that does not keep to the schema, or a file that is not one."""


def metric_entry(
    name: str,
    value: float | None,
    *,
    step: int | None,
    stderr: float | None = None,
    settings: Mapping[str, Any] | None = None,
    space: str | None = None,
) -> dict[str, Any]:
    """Return one entry of a report's `metrics`; a value that is not finite becomes null with a note in its settings.

    `name` is spelled `dimension/subject/metric`, `space` is "native", "dense", "linearised" or None. Numbers may be
    NumPy's. An existing `settings["note"]` is kept.
    """
    entry_settings = dict(settings or {})
    if value is not None and not math.isfinite(value):
        entry_settings.setdefault("note", f"not finite: {float(value)}")
        value = None
    if stderr is not None and (value is None or not math.isfinite(stderr)):
        stderr = None
    return {
        "name": name,
        "value": None if value is None else float(value),
        "stderr": None if stderr is None else float(stderr),
        "step": None if step is None else int(step),
        "settings": entry_settings,
        "space": space,
    }


def validate_report(report: Any, where: str = "report.json") -> None:
    """Raise `ReportError` where `report` does not keep to the schema; its one line names the field and the value.

    `where` opens the message: the file or repository that the report came from.
    """
    _refuse_newer(report, where)
    try:
        for path, problem in _not_storable(report):
            raise ReportError(f"{where}: {path}: {problem}")
        error = best_match(_validator().iter_errors(report))
    except RecursionError:
        raise ReportError(f"{where}: nested too deeply to be a report") from None
    if error is not None:
        raise ReportError(f"{where}: {_explain(error)}")


def write_report(report: Mapping[str, Any], path: Path | str) -> Path:
    """Check `report` and write it to `path` as indented JSON with sorted keys; return the path.

    The file is replaced in one step. Raises `ReportError`, and leaves the old file, where the report is not valid.
    """
    path = Path(path)
    validate_report(report, where=str(path))
    # whatever was named after a token by mistake: reports are made to be shown
    text = TOKEN.sub("<token>", json.dumps(report, indent=2, sort_keys=True, allow_nan=False))
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return path


def read_report(path_or_folder: Path | str) -> dict[str, Any]:
    """Read and check a report: a file, a `publish` folder or a run's folder (which holds `publish`).

    Raises `FileNotFoundError` where there is none and `ReportError` where it is not JSON, breaks the schema, or has a
    newer `schema_version` than this package knows.
    """
    path = _locate(Path(path_or_folder))
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ReportError(
            f"{path}: not readable as JSON ({error}); write the report again or fetch it anew"
        ) from error
    validate_report(report, where=str(path))
    return report


def _locate(path: Path) -> Path:
    if path.is_file():
        return path
    candidates = [path / "report.json", path / "publish" / "report.json"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if path.is_dir():
        raise FileNotFoundError(f"no report: looked for {candidates[0]} and {candidates[1]}")
    raise FileNotFoundError(f"no report: {path} does not exist")


@cache
def _validator() -> Draft202012Validator:
    schema = json.loads(resources.files("hf_lowrank.report").joinpath("schema.json").read_text(encoding="utf-8"))
    # tuples are written as arrays: betas and the like are tuples in the dataclasses they come from
    types = Draft202012Validator.TYPE_CHECKER.redefine("array", lambda _, value: isinstance(value, (list, tuple)))
    return extend(Draft202012Validator, type_checker=types)(schema)


def _refuse_newer(report: Any, where: str) -> None:
    version = report.get("schema_version") if isinstance(report, Mapping) else None
    if isinstance(version, int) and not isinstance(version, bool) and version > SCHEMA_VERSION:
        raise ReportError(
            f"{where}: schema_version {version} is newer than {SCHEMA_VERSION}, the newest that this hf_lowrank "
            "reads; upgrade it (pip install --upgrade hf_lowrank)"
        )


def _not_storable(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield (field, problem) for what JSON cannot hold and a schema cannot refuse."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(key, str):
                yield from _not_storable(item, f"{path}.{key}" if path else key)
            else:
                yield path or "the report", f"the key {_shown(key)} is not a string"
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _not_storable(item, f"{path}[{index}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            yield path, f"{value} is not a finite number; store null and say why in settings"
    elif isinstance(value, int) and abs(value) >= 2**1023:
        yield path, "the number is larger than any float"
    elif not isinstance(value, (str, int, type(None))):
        yield path, f"{_shown(value)} is a {type(value).__name__}, which JSON does not have"


def _explain(error: ValidationError) -> str:
    """Return one line that names the field, with its place, and what is wrong with it."""
    field = ""
    for part in error.absolute_path:
        field += f"[{part}]" if isinstance(part, int) else f".{part}" if field else str(part)
    instance: Any = error.instance
    expected: Any = error.validator_value
    inside = f"{field}." if field else ""
    if error.validator == "required":
        missing = next(name for name in expected if name not in instance)
        return f"{inside}{missing} is missing"
    if error.validator == "additionalProperties":
        schema: Any = error.schema
        unknown = sorted(set(instance) - set(schema["properties"]))
        return f"{inside}{_cut(unknown[0])} is not a known field; known: {', '.join(schema['properties'])}"
    value = _shown(instance)
    if error.validator == "type":
        kinds = expected if isinstance(expected, list) else [expected]
        return f"{field or 'the report'}: {value} is not of type {' or '.join(kinds)}"
    if error.validator in ("const", "enum"):
        allowed = expected if error.validator == "enum" else [expected]
        return f"{field}: {value} is not {' or '.join(json.dumps(item) for item in allowed)}"
    if error.validator == "minimum":
        return f"{field}: {value} is less than {expected}"
    if error.validator == "pattern":
        return f"{field}: {value} is empty"
    return f"{field or 'the report'}: {_cut(error.message)}"


def _shown(value: Any) -> str:
    return _cut(repr(value))


def _cut(text: str) -> str:
    line = " ".join(text.splitlines())
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 3]}..."
