"""Measuring finished runs: every metric over every checkpoint, into report, tables and figures."""

from hf_lowrank.measure.measure import measure
from hf_lowrank.measure.source import Checkpoint, RunSource, open_run
from hf_lowrank.options import MeasureOptions

__all__ = ["Checkpoint", "MeasureOptions", "RunSource", "measure", "open_run"]
