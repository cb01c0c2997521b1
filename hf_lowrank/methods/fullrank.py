"""Full-rank training, the baseline: the model and the optimizer stay as they are."""

from dataclasses import dataclass
from typing import ClassVar

from hf_lowrank.methods.base import LowRankConfig, register

__all__ = ["FullRankConfig"]


@register
@dataclass
class FullRankConfig(LowRankConfig):
    """The baseline; the optimizer is the one `TrainingArguments.optim` names (`torch.optim.AdamW` by default)."""

    method: ClassVar[str] = "fullrank"
    label: ClassVar[str] = "full-rank training"
    takes_stacks: ClassVar[bool] = True
