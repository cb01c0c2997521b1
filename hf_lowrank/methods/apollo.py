"""APOLLO and APOLLO-Mini (arXiv 2412.05270): the gradient itself, scaled by Adam in a random projection.

Shapes: G: (m, n), P: (r, n) or (m, r) random, R and N as in `optim.projector`; phi: (m, 1), (1, n) or a scalar.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import TrainingArguments

from hf_lowrank.methods.base import Paper, register
from hf_lowrank.methods.projected import ProjectedConfig
from hf_lowrank.optim.adam import step_size
from hf_lowrank.optim.projected import Matrix, ProjectedAdamW
from hf_lowrank.optim.scaling import limit_growth, norms, sum_over_rows
from hf_lowrank.optim.subspace import next_seed

__all__ = ["ApolloAdamW", "ApolloConfig"]

SCALE_TYPES = ("channel", "tensor")


class ApolloAdamW(ProjectedAdamW):
    """Gradient descent scaled by Adam in a random projection of rank r, for the groups that carry `r`.

    Such a group holds matrices only and may carry `update_proj_gap` (200), `scale` (1.0) and `scale_type` ("channel"
    or "tensor"). The shorter side is projected by entries of N(0, 1/r), re-drawn every `update_proj_gap` steps. With
    phi = ||N|| / (||R|| + 1e-8) per channel (row where m >= n, column otherwise) or for the tensor, and `limit` the
    factor that lets ||G phi|| grow by 1 % a step: W <- (1 - lr wd) (W - lr_t sqrt(scale) limit G phi).

    State: as in `ProjectedAdamW`, and `scaled_norm`, a scalar, and `seed`, the number that the next projection is
    drawn from (a stack has a list of them). The projection is kept, as in the official package, rather than drawn
    again in every step.

    Args:
        seed: with 0 each parameter's first projection is the official package's; any other gives other draws.
    """

    options: ClassVar[dict[str, Any]] = {"update_proj_gap": 200, "scale": 1.0, "scale_type": "channel"}
    factor: ClassVar[str] = "scale"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"scale_type": SCALE_TYPES}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if "r" in param_group:
            # the shorter side alone, as the paper has it
            param_group = {**param_group, "proj_type": "std"}
        super().add_param_group(param_group)

    def add_state(self, state: dict[str, Any], W: Tensor, index: int, place: int) -> None:
        state["scaled_norm"] = W.new_zeros(())
        state["seed"] = self.first_seed(index, place)

    def refresh_projectors(self, matrices: list[Matrix], group: dict[str, Any]) -> None:
        for x in matrices:
            m, n = x.shape
            shape = (group["r"], n) if x.where == "right" else (m, group["r"])
            # every process counts on for the matrices of all
            if x.own:
                generator = torch.Generator(x.G.device).manual_seed(x.state["seed"])
                fresh = torch.randn(shape, generator=generator, device=x.G.device) / math.sqrt(group["r"])
                x.set_projector([x.shards.local_rows(fresh) if x.where == "left" else fresh])
            x.state["seed"] = next_seed(x.state["seed"])

    def update(self, matrices: list[Matrix], N: list[Tensor], group: dict[str, Any]) -> None:
        decay, root = 1 - group["lr"] * group["weight_decay"], math.sqrt(group["scale"])
        scalings = _scalings(matrices, N, group["scale_type"])
        squares = [
            (phi * norms(x.G, None if phi.ndim == 0 else 1 if x.where == "right" else 0)).square().sum()
            for x, phi in zip(matrices, scalings, strict=True)
        ]
        for x, phi, square in zip(matrices, scalings, sum_over_rows(matrices, squares), strict=True):
            limit = limit_growth(square.sqrt(), x.state["scaled_norm"])
            if decay != 1:
                x.W.mul_(decay)
            step = step_size(group["lr"], group["betas"], x.t) * decay * root
            x.W.addcmul_(x.G, (phi * limit).to(x.G.dtype), value=-step)


@register
@dataclass
class ApolloConfig(ProjectedConfig):
    """APOLLO with the arithmetic and the defaults of the official `apollo-torch`.

    APOLLO-Mini is `ApolloConfig(r=1, scale=128, scale_type="tensor")`. Differences from the paper, as in that
    package: the projection is kept between two re-draws (the paper draws it again from its seed in every step, which
    saves r min(m, n) numbers a matrix), eps (1e-6) is added before the bias correction, weight decay comes after the
    update, and the root of `scale` after the limiter. Different from that package: the projections depend on the
    run's seed, and a step without a gradient does not reset the norm that the limiter goes by.
    """

    method: ClassVar[str] = "apollo"
    label: ClassVar[str] = "APOLLO"
    paper: ClassVar[Paper | None] = Paper(
        title="APOLLO: SGD-like Memory, AdamW-level Performance",
        arxiv="2412.05270",
        authors="Hanqing Zhu, Zhenyu Zhang, Wenyan Cong, Xi Liu, Sem Park, Vikas Chandra, Bo Long, David Z. Pan, "
        "Zhangyang Wang, Jinwon Lee",
    )
    optimizer_cls: ClassVar[type[ProjectedAdamW]] = ApolloAdamW

    scale: float = field(default=1.0, metadata={"help": "The update is scaled by its root; 128 for APOLLO-Mini."})
    scale_type: str = field(
        default="channel", metadata={"help": "What shares a scaling factor: channel, or tensor (APOLLO-Mini)."}
    )

    def optimizer(self, args: TrainingArguments) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        optimizer_cls, kwargs = super().optimizer(args)
        return optimizer_cls, {**kwargs, "seed": args.seed}


def _scalings(matrices: list[Matrix], N: list[Tensor], scale_type: str) -> list[Tensor]:
    if scale_type == "channel":
        axes = [1 if x.where == "right" else 0 for x in matrices]
        return [norms(n, axis) / (norms(x.R, axis) + 1e-8) for x, n, axis in zip(matrices, N, axes, strict=True)]
    squares = [[norms(X, None).square() for X in (n, x.R)] for x, n in zip(matrices, N, strict=True)]
    spread = [i for i, x in enumerate(matrices) if x.by_rows]
    if spread:
        # R has W's rows for some shapes and is whole for others
        chosen = [matrices[i] for i in spread]
        for k in range(2):
            for i, total in zip(spread, sum_over_rows(chosen, [squares[i][k] for i in spread]), strict=True):
                squares[i][k] = total
    return [n.sqrt() / (r.sqrt() + 1e-8) for n, r in squares]
