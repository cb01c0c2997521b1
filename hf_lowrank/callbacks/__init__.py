"""Callbacks that add metrics to any Trainer run."""

from hf_lowrank.callbacks.spectral import SpectralCallback

__all__ = ["SpectralCallback"]
