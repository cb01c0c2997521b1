"""Optimizers that keep their state in a projection of the gradient, and what they share."""

from hf_lowrank.optim.galore import GaLoreAdamW

__all__ = ["GaLoreAdamW"]
