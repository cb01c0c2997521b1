"""Fira (arXiv 2410.01623): GaLore, and the part of the gradient that its projection drops, scaled like the rest."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments

from hf_lowrank.methods.base import LowRankConfig, register
from hf_lowrank.optim import FiraAdamW
from hf_lowrank.optim.projected import check_options
from hf_lowrank.optim.projector import moment_shape, projector_shapes

__all__ = ["FiraConfig"]


@register
@dataclass
class FiraConfig(LowRankConfig):
    """Fira with the arithmetic and the defaults of the official `fira`.

    Differences from the paper, as in that package: `alpha` also scales the back-projection that is subtracted from
    the gradient, eps (1e-6) is added before the bias correction, and weight decay comes after the update. Different
    from that package: the projector is found without a full SVD unless `refresh="svd"`, `proj_type="full"` runs, and a
    step without a gradient does not reset the norm that the limiter goes by.
    """

    method: ClassVar[str] = "fira"
    label: ClassVar[str] = "Fira"
    paper: ClassVar[str | None] = "2410.01623"

    r: int | None = field(default=None, metadata={"help": "Rank of the projection; default hidden_size / 4."})
    update_proj_gap: int = field(default=200, metadata={"help": "Optimizer steps between two projector refreshes."})
    alpha: float = field(default=0.25, metadata={"help": "Factor on whatever is projected back."})
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
        check_options(self.group_options(self.r or 1), "alpha")

    def group_options(self, r: int) -> dict[str, Any]:
        return {
            "r": r,
            "update_proj_gap": self.update_proj_gap,
            "alpha": self.alpha,
            "proj_type": self.proj_type,
            "refresh": self.refresh,
        }

    def optimizer(self, args: TrainingArguments) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        # eps is the method's own: adam_epsilon belongs to an Adam that adds it after the bias correction
        return FiraAdamW, {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2)}

    def state_elements(self, m: int, n: int, r: int) -> int:
        rows, cols = moment_shape((m, n), r, self.proj_type)
        # one more for the norm of the last residual
        return 2 * rows * cols + sum(a * b for a, b in projector_shapes((m, n), r, self.proj_type)) + 1
