"""Low-rank pre-training, the metrics that perplexity hides, and Hub publishing for any Hugging Face Trainer."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_lowrank.checkpoints import CheckpointError, check_checkpoint, check_resume, last_checkpoint, to_dense
    from hf_lowrank.downstream.callback import EvaluationCallback
    from hf_lowrank.families import (
        ActivationCallback,
        CurvatureCallback,
        InterpolationCallback,
        LandscapeCallback,
        SpectralCallback,
    )
    from hf_lowrank.hub.load import from_pretrained, load_report
    from hf_lowrank.hub.push import push
    from hf_lowrank.methods import (
        ApolloConfig,
        CoLAConfig,
        FiraConfig,
        FrugalConfig,
        FullRankConfig,
        GaLoreConfig,
        LoRAConfig,
        LoroConfig,
        LowRankConfig,
        LowRankFactorsConfig,
        MuonConfig,
        ReLoRAConfig,
        SLTrainConfig,
        StableSpamConfig,
    )
    from hf_lowrank.methods.prepare import prepare
    from hf_lowrank.run.attach import attach
    from hf_lowrank.run.facts import RunInfo

__version__ = "0.1.0"

__all__ = [
    "ActivationCallback", "ApolloConfig", "CheckpointError", "CoLAConfig", "CurvatureCallback", "EvaluationCallback",
    "FiraConfig", "FrugalConfig", "FullRankConfig", "GaLoreConfig", "InterpolationCallback", "LandscapeCallback",
    "LoRAConfig", "LoroConfig", "LowRankConfig", "LowRankFactorsConfig", "MuonConfig", "ReLoRAConfig", "RunInfo",
    "SLTrainConfig", "SpectralCallback", "StableSpamConfig", "attach", "check_checkpoint", "check_resume",
    "from_pretrained", "last_checkpoint", "load_report", "prepare", "push", "to_dense",
]  # fmt: skip

# a module is imported when one of its names is first used, so that importing the package costs nothing
_NAMES = {
    "checkpoints": "CheckpointError check_checkpoint check_resume last_checkpoint to_dense",
    "downstream.callback": "EvaluationCallback",
    "families": "ActivationCallback CurvatureCallback InterpolationCallback LandscapeCallback SpectralCallback",
    "hub.load": "from_pretrained load_report",
    "hub.push": "push",
    "methods": "ApolloConfig CoLAConfig FiraConfig FrugalConfig FullRankConfig GaLoreConfig LoRAConfig "
    "LoroConfig LowRankConfig LowRankFactorsConfig MuonConfig ReLoRAConfig SLTrainConfig "
    "StableSpamConfig",
    "methods.prepare": "prepare",
    "run.attach": "attach",
    "run.facts": "RunInfo",
}
_MODULES = {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Import a public name, or a module of the package, when it is first used (PEP 562)."""
    if name in _MODULES:
        value = globals()[name] = getattr(import_module(_MODULES[name]), name)
        return value
    if not name.startswith("_") and find_spec(f"{__name__}.{name}"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
