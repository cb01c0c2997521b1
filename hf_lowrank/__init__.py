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
        FullRankConfig,
        GaLoreConfig,
        LoRAConfig,
        LowRankConfig,
        ReLoRAConfig,
        SLTrainConfig,
    )
    from hf_lowrank.methods.prepare import prepare
    from hf_lowrank.run.attach import attach
    from hf_lowrank.run.facts import RunInfo

__version__ = "0.1.0"

__all__ = [
    "ActivationCallback",
    "ApolloConfig",
    "CheckpointError",
    "CoLAConfig",
    "CurvatureCallback",
    "EvaluationCallback",
    "FiraConfig",
    "FullRankConfig",
    "GaLoreConfig",
    "InterpolationCallback",
    "LandscapeCallback",
    "LoRAConfig",
    "LowRankConfig",
    "ReLoRAConfig",
    "RunInfo",
    "SLTrainConfig",
    "SpectralCallback",
    "attach",
    "check_checkpoint",
    "check_resume",
    "from_pretrained",
    "last_checkpoint",
    "load_report",
    "prepare",
    "push",
    "to_dense",
]

# the module of each name: it is imported when the name is first used, so that importing the package costs nothing
_MODULES = {
    "ActivationCallback": "hf_lowrank.families",
    "ApolloConfig": "hf_lowrank.methods",
    "CheckpointError": "hf_lowrank.checkpoints",
    "CoLAConfig": "hf_lowrank.methods",
    "CurvatureCallback": "hf_lowrank.families",
    "EvaluationCallback": "hf_lowrank.downstream.callback",
    "FiraConfig": "hf_lowrank.methods",
    "FullRankConfig": "hf_lowrank.methods",
    "GaLoreConfig": "hf_lowrank.methods",
    "InterpolationCallback": "hf_lowrank.families",
    "LandscapeCallback": "hf_lowrank.families",
    "LoRAConfig": "hf_lowrank.methods",
    "LowRankConfig": "hf_lowrank.methods",
    "ReLoRAConfig": "hf_lowrank.methods",
    "RunInfo": "hf_lowrank.run.facts",
    "SLTrainConfig": "hf_lowrank.methods",
    "SpectralCallback": "hf_lowrank.families",
    "attach": "hf_lowrank.run.attach",
    "check_checkpoint": "hf_lowrank.checkpoints",
    "check_resume": "hf_lowrank.checkpoints",
    "from_pretrained": "hf_lowrank.hub.load",
    "last_checkpoint": "hf_lowrank.checkpoints",
    "load_report": "hf_lowrank.hub.load",
    "prepare": "hf_lowrank.methods.prepare",
    "push": "hf_lowrank.hub.push",
    "to_dense": "hf_lowrank.checkpoints",
}


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
