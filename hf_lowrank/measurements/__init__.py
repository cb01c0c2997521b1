"""Metrics turned into records of a report and rows of a table: one implementation for callbacks and command line.

Each module takes models and an evaluation set, calls the pure functions of `hf_lowrank.metrics`, and names what it
finds as the report does.
"""

from hf_lowrank.measurements.activation import measure_activations
from hf_lowrank.measurements.base import FAMILIES, Measurement, Record
from hf_lowrank.measurements.curvature import CurvatureSettings, measure_curvature
from hf_lowrank.measurements.interpolation import InterpolationSettings, measure_interpolation
from hf_lowrank.measurements.landscape import LandscapeSettings, measure_landscape, measure_trajectory
from hf_lowrank.measurements.loss import measure_loss
from hf_lowrank.measurements.presets import PRESETS, Preset
from hf_lowrank.measurements.spectral import measure_spectra

__all__ = [
    "FAMILIES",
    "PRESETS",
    "CurvatureSettings",
    "InterpolationSettings",
    "LandscapeSettings",
    "Measurement",
    "Preset",
    "Record",
    "measure_activations",
    "measure_curvature",
    "measure_interpolation",
    "measure_landscape",
    "measure_loss",
    "measure_spectra",
    "measure_trajectory",
]
