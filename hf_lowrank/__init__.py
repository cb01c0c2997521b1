"""Low-rank pre-training, the metrics that perplexity hides, and Hub publishing for any Hugging Face Trainer."""

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
from hf_lowrank.prepare import prepare
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
