"""GaLore (arXiv 2403.03507): the optimizer state lives in the gradient's top-r singular subspace."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments

from hf_lowrank.methods.base import LowRankConfig, register
from hf_lowrank.optim import GaLoreAdamW
from hf_lowrank.optim.projected import check_options
from hf_lowrank.optim.projector import moment_shape, projector_shapes

__all__ = ["GaLoreConfig"]


@register
@dataclass
class GaLoreConfig(LowRankConfig):
    """GaLore with the arithmetic and the defaults of the official `galore-torch`.

    Differences from the paper, as in that package: eps (1e-6) is added before the bias correction, and weight decay
    comes after the update. Different from that package: the projector is found without a full SVD unless
    `refresh="svd"`.
    """

    method: ClassVar[str] = "galore"
    label: ClassVar[str] = "GaLore"
    paper: ClassVar[str | None] = "2403.03507"

    r: int | None = field(default=None, metadata={"help": "Rank of the projection; default hidden_size / 4."})
    update_proj_gap: int = field(default=200, metadata={"help": "Optimizer steps between two projector refreshes."})
    scale: float = field(default=0.25, metadata={"help": "Factor on the update that is projected back."})
    proj_type: str = field(
        default="std",
        metadata={
            "help": "Side of the stored weight that is projected: std (the shorter), reverse_std, right, left, full."
        },
    )
    refresh: str = field(
        default="gram",
        metadata={"help": "How the singular subspace is found: gram (eigh of the small Gram matrix), subspace, svd."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self.group_options(self.r or 1), "scale")

    def group_options(self, r: int) -> dict[str, Any]:
        return {
            "r": r,
            "update_proj_gap": self.update_proj_gap,
            "scale": self.scale,
            "proj_type": self.proj_type,
            "refresh": self.refresh,
        }

    def optimizer(self, args: TrainingArguments) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        # eps is the method's own: adam_epsilon belongs to an Adam that adds it after the bias correction
        return GaLoreAdamW, {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2)}

    def state_elements(self, m: int, n: int, r: int) -> int:
        rows, cols = moment_shape((m, n), r, self.proj_type)
        return 2 * rows * cols + sum(a * b for a, b in projector_shapes((m, n), r, self.proj_type))
