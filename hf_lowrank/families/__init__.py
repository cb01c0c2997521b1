"""Families of metrics: each module holds one family's settings, its measurement and its Trainer callback.

Importing this package registers all of them; `families()` adds those of other packages.
"""

from hf_lowrank.families.activation import Activation, ActivationCallback
from hf_lowrank.families.callback import MetricCallback, SequenceCallback
from hf_lowrank.families.curvature import Curvature, CurvatureCallback, CurvatureSettings
from hf_lowrank.families.family import PRESETS, Context, Family, Peer, Preset, RunStep, Unit, families, family
from hf_lowrank.families.interpolation import Interpolation, InterpolationCallback, InterpolationSettings
from hf_lowrank.families.landscape import Landscape, LandscapeCallback, LandscapeSettings
from hf_lowrank.families.loss import Loss
from hf_lowrank.families.records import Measurement, PartialError, Record, record
from hf_lowrank.families.spectral import Spectral, SpectralCallback, SpectralSettings

__all__ = [
    "PRESETS", "Activation", "ActivationCallback", "Context", "Curvature", "CurvatureCallback", "CurvatureSettings",
    "Family", "Interpolation", "InterpolationCallback", "InterpolationSettings", "Landscape", "LandscapeCallback",
    "LandscapeSettings", "Loss", "Measurement", "MetricCallback", "PartialError", "Peer", "Preset", "Record",
    "RunStep", "SequenceCallback", "Spectral", "SpectralCallback", "SpectralSettings", "Unit", "families", "family",
    "record",
]  # fmt: skip
