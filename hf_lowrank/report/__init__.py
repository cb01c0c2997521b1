"""Reports of runs as plain data: types, tables and comparisons. Knows nothing of methods, Trainer or Hub."""

from importlib import import_module
from typing import Any

# imported when they are first used, so that who needs the catalogue alone does not wait for pydantic
_NAMES = {
    "baseline": "baseline_of",
    "catalogue": "HEADLINE_METRICS HeadlineMetric",
    "io": "ReportError metric_entry read_report validate_report write_report",
    "model": "Report SCHEMA_VERSION",
    "tables": "Fact HeadlineRow fact_rows headline_rows",
    "values": "format_value",
}
_MODULES = {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
