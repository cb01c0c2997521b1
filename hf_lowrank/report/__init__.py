"""Reports of runs as plain data: schema, tables, figures. Knows nothing of methods, Trainer or Hub."""

from hf_lowrank.report.baseline import baseline_of
from hf_lowrank.report.catalogue import HEADLINE_METRICS, HeadlineMetric
from hf_lowrank.report.io import ReportError, metric_entry, read_report, validate_report, write_report
from hf_lowrank.report.model import SCHEMA_VERSION, Report
from hf_lowrank.report.tables import Fact, HeadlineRow, fact_rows, headline_rows
from hf_lowrank.report.values import format_value

__all__ = [
    "HEADLINE_METRICS", "SCHEMA_VERSION", "Fact", "HeadlineMetric", "HeadlineRow", "Report", "ReportError",
    "baseline_of", "fact_rows", "format_value", "headline_rows", "metric_entry", "read_report", "validate_report",
    "write_report",
]  # fmt: skip
