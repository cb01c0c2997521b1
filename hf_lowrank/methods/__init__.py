"""The methods, one module each; importing this package registers them all."""

from hf_lowrank.methods.base import METHODS, LowRankConfig, ReparameterizedLinear, get_method
from hf_lowrank.methods.fullrank import FullRankConfig
from hf_lowrank.methods.galore import GaLoreConfig
from hf_lowrank.methods.sltrain import SLTrainConfig, SLTrainLinear

__all__ = [
    "METHODS",
    "FullRankConfig",
    "GaLoreConfig",
    "LowRankConfig",
    "ReparameterizedLinear",
    "SLTrainConfig",
    "SLTrainLinear",
    "get_method",
]
