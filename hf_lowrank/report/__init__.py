"""Reports of runs as plain data: schema, tables, figures. Knows nothing of methods, Trainer or Hub."""

from typing import TYPE_CHECKING, Any

from hf_lowrank.report.baseline import baseline_of
from hf_lowrank.report.headline import HEADLINE_METRICS, HeadlineMetric
from hf_lowrank.report.schema import (
    SCHEMA_VERSION,
    ReportError,
    metric_entry,
    read_report,
    validate_report,
    write_report,
)
from hf_lowrank.report.tables import Fact, HeadlineRow, fact_rows, format_value, headline_rows

if TYPE_CHECKING:
    from hf_lowrank.report.figures import draw_figures

__all__ = [
    "HEADLINE_METRICS",
    "SCHEMA_VERSION",
    "Fact",
    "HeadlineMetric",
    "HeadlineRow",
    "ReportError",
    "baseline_of",
    "draw_figures",
    "fact_rows",
    "format_value",
    "headline_rows",
    "metric_entry",
    "read_report",
    "validate_report",
    "write_report",
]


def __getattr__(name: str) -> Any:
    # matplotlib and pandas take a second to import, and most users of a report draw nothing
    if name == "draw_figures":
        from hf_lowrank.report.figures import draw_figures

        return draw_figures
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
