"""The methods, one module each; importing this package registers them all."""

from hf_lowrank.methods.apollo import ApolloConfig
from hf_lowrank.methods.base import METHODS, LowRankConfig, ReparameterizedLinear, get_method
from hf_lowrank.methods.cola import CoLAConfig, CoLALinear
from hf_lowrank.methods.fira import FiraConfig
from hf_lowrank.methods.fullrank import FullRankConfig
from hf_lowrank.methods.galore import GaLoreConfig
from hf_lowrank.methods.lora import LoRAConfig, LoRALinear
from hf_lowrank.methods.relora import ReLoRAConfig
from hf_lowrank.methods.sltrain import SLTrainConfig, SLTrainLinear

__all__ = [
    "METHODS",
    "ApolloConfig",
    "CoLAConfig",
    "CoLALinear",
    "FiraConfig",
    "FullRankConfig",
    "GaLoreConfig",
    "LoRAConfig",
    "LoRALinear",
    "LowRankConfig",
    "ReLoRAConfig",
    "ReparameterizedLinear",
    "SLTrainConfig",
    "SLTrainLinear",
    "get_method",
]
