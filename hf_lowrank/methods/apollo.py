"""APOLLO and APOLLO-Mini (arXiv 2412.05270): the gradient itself, scaled by Adam in a random projection."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments

from hf_lowrank.methods.base import LowRankConfig, register
from hf_lowrank.optim import ApolloAdamW
from hf_lowrank.optim.apollo import check_scale_type
from hf_lowrank.optim.projected import check_options
from hf_lowrank.optim.projector import moment_shape, projector_shapes

__all__ = ["ApolloConfig"]


@register
@dataclass
class ApolloConfig(LowRankConfig):
    """APOLLO with the arithmetic and the defaults of the official `apollo-torch`.

    APOLLO-Mini is `ApolloConfig(r=1, scale=128, scale_type="tensor")`. Differences from the paper, as in that
    package: the projection is kept between two re-draws (the paper draws it again from its seed in every step, which
    saves r min(m, n) numbers a matrix), eps (1e-6) is added before the bias correction, weight decay comes after the
    update, and the root of `scale` after the limiter. Different from that package: the projections depend on the
    run's seed, and a step without a gradient does not reset the norm that the limiter goes by.
    """

    method: ClassVar[str] = "apollo"
    label: ClassVar[str] = "APOLLO"
    paper: ClassVar[str | None] = "2412.05270"

    r: int | None = field(default=None, metadata={"help": "Rank of the projection; default hidden_size / 4."})
    update_proj_gap: int = field(default=200, metadata={"help": "Optimizer steps between two random projections."})
    scale: float = field(default=1.0, metadata={"help": "The update is scaled by its root; 128 for APOLLO-Mini."})
    scale_type: str = field(
        default="channel", metadata={"help": "What shares a scaling factor: channel, or tensor (APOLLO-Mini)."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self.group_options(self.r or 1), "scale")
        check_scale_type(self.scale_type)

    def group_options(self, r: int) -> dict[str, Any]:
        return {
            "r": r,
            "update_proj_gap": self.update_proj_gap,
            "scale": self.scale,
            "scale_type": self.scale_type,
        }

    def optimizer(self, args: TrainingArguments) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        # eps is the method's own: adam_epsilon belongs to an Adam that adds it after the bias correction
        betas = (args.adam_beta1, args.adam_beta2)
        return ApolloAdamW, {"lr": args.learning_rate, "betas": betas, "seed": args.seed}

    def state_elements(self, m: int, n: int, r: int) -> int:
        rows, cols = moment_shape((m, n), r, "std")
        # one more for the norm of the last update
        return 2 * rows * cols + sum(a * b for a, b in projector_shapes((m, n), r, "std")) + 1
