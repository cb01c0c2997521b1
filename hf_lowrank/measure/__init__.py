"""Measuring finished runs: every metric over every checkpoint, into report, tables and figures."""

from hf_lowrank.measure.measure import MeasureOptions, measure
from hf_lowrank.measure.source import Checkpoint, RunSource, open_run

__all__ = ["Checkpoint", "MeasureOptions", "RunSource", "measure", "open_run"]
