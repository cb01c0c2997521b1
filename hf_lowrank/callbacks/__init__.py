"""Callbacks that add metrics to any Trainer run."""

from hf_lowrank.callbacks.activation import ActivationCallback
from hf_lowrank.callbacks.curvature import CurvatureCallback
from hf_lowrank.callbacks.interpolation import InterpolationCallback
from hf_lowrank.callbacks.landscape import LandscapeCallback
from hf_lowrank.callbacks.spectral import SpectralCallback
from hf_lowrank.downstream.callback import EvaluationCallback

__all__ = [
    "ActivationCallback",
    "CurvatureCallback",
    "EvaluationCallback",
    "InterpolationCallback",
    "LandscapeCallback",
    "SpectralCallback",
]
