"""The methods, one module each; importing this package registers all that are in it."""

from hf_lowrank.methods.apollo import ApolloAdamW, ApolloConfig
from hf_lowrank.methods.base import METHODS, LowRankConfig, Paper, ReparameterizedLinear, get_method, register
from hf_lowrank.methods.cola import CoLAConfig, CoLALinear
from hf_lowrank.methods.fira import FiraAdamW, FiraConfig
from hf_lowrank.methods.frugal import FrugalAdamW, FrugalConfig
from hf_lowrank.methods.fullrank import FullRankConfig
from hf_lowrank.methods.galore import GaLoreAdamW, GaLoreConfig
from hf_lowrank.methods.lora import LoRAConfig, LoRALinear
from hf_lowrank.methods.loro import LoroAdamW, LoroConfig
from hf_lowrank.methods.lowrank import LowRankFactorsConfig, LowRankLinear
from hf_lowrank.methods.muon import MuonAdamW, MuonConfig
from hf_lowrank.methods.projected import ProjectedConfig
from hf_lowrank.methods.relora import ReLoRAConfig
from hf_lowrank.methods.sltrain import SLTrainConfig, SLTrainLinear
from hf_lowrank.methods.stable_spam import StableSpamAdamW, StableSpamConfig

__all__ = [
    "METHODS", "ApolloAdamW", "ApolloConfig", "CoLAConfig", "CoLALinear", "FiraAdamW", "FiraConfig", "FrugalAdamW",
    "FrugalConfig", "FullRankConfig", "GaLoreAdamW", "GaLoreConfig", "LoRAConfig", "LoRALinear", "LoroAdamW",
    "LoroConfig", "LowRankConfig", "LowRankFactorsConfig", "LowRankLinear", "MuonAdamW", "MuonConfig", "Paper",
    "ProjectedConfig", "ReLoRAConfig", "ReparameterizedLinear", "SLTrainConfig", "SLTrainLinear", "StableSpamAdamW",
    "StableSpamConfig", "get_method", "register",
]  # fmt: skip
