"""Families of metrics: each module holds one family's settings, its measurement and its Trainer callback."""

from hf_lowrank.families.activation import ActivationCallback, measure_activations
from hf_lowrank.families.curvature import CurvatureCallback, CurvatureSettings, measure_curvature
from hf_lowrank.families.interpolation import InterpolationCallback, InterpolationSettings, measure_interpolation
from hf_lowrank.families.landscape import (
    LandscapeCallback,
    LandscapeSettings,
    measure_landscape,
    measure_trajectory,
)
from hf_lowrank.families.loss import measure_loss
from hf_lowrank.families.presets import PRESETS, Preset
from hf_lowrank.families.records import FAMILIES, Measurement, Record
from hf_lowrank.families.spectral import SpectralCallback, measure_spectra

__all__ = [
    "FAMILIES",
    "PRESETS",
    "ActivationCallback",
    "CurvatureCallback",
    "CurvatureSettings",
    "InterpolationCallback",
    "InterpolationSettings",
    "LandscapeCallback",
    "LandscapeSettings",
    "Measurement",
    "Preset",
    "Record",
    "SpectralCallback",
    "measure_activations",
    "measure_curvature",
    "measure_interpolation",
    "measure_landscape",
    "measure_loss",
    "measure_spectra",
    "measure_trajectory",
]
