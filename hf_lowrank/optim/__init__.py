"""Projected optimizers; each works on its own, without `hf_lowrank.prepare`."""

from hf_lowrank.optim.apollo import ApolloAdamW
from hf_lowrank.optim.fira import FiraAdamW
from hf_lowrank.optim.galore import GaLoreAdamW

__all__ = ["ApolloAdamW", "FiraAdamW", "GaLoreAdamW"]
