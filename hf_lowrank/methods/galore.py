"""GaLore (arXiv 2403.03507): the optimizer state lives in the gradient's top-r singular subspace."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from hf_lowrank.methods.base import Paper, register
from hf_lowrank.methods.projected import SubspaceConfig, proj_type_field, refresh_field
from hf_lowrank.optim.adam import step_size
from hf_lowrank.optim.projected import Matrix, ProjectedAdamW, apply_back_projection
from hf_lowrank.optim.subspace import SUBSPACE_OPTIONS

__all__ = ["GaLoreAdamW", "GaLoreConfig"]


class GaLoreAdamW(ProjectedAdamW):
    """AdamW in the gradient's top-r singular subspace (Algorithm 2), for the groups that carry `r`.

    Such a group holds matrices only and may carry `update_proj_gap` (200), `scale` (0.25), `proj_type` ("std") and
    `refresh` ("gram", "subspace" or "svd"), and the options of `optim.subspace`. With lr_t, the learning rate with the
    bias correction: W <- (1 - lr wd) (W - lr_t scale back(N)). State, arguments and errors: see `ProjectedAdamW`.
    """

    options: ClassVar[dict[str, Any]] = {
        "update_proj_gap": 200, "scale": 0.25, "proj_type": "std", **SUBSPACE_OPTIONS,
    }  # fmt: skip
    factor: ClassVar[str] = "scale"

    def update(self, matrices: list[Matrix], N: list[Tensor], group: dict[str, Any]) -> None:
        decay = 1 - group["lr"] * group["weight_decay"]
        for x, direction in zip(matrices, N, strict=True):
            alpha = -step_size(group["lr"], group["betas"], x.t) * group["scale"] * decay
            apply_back_projection(x.W, direction, x.projector, x.where, alpha, decay)


@register
@dataclass
class GaLoreConfig(SubspaceConfig):
    """GaLore with the arithmetic and the defaults of the official `galore-torch`.

    Differences from the paper, as in that package: eps (1e-6) is added before the bias correction, and weight decay
    comes after the update. Different from that package: the projector is found without a full SVD unless
    `refresh="svd"`, and the default refresh keeps the signs of the singular vectors that it replaces, since the
    moments stay; an SVD may turn any of them around. The signs make the difference: at r = 8 the weights are 5.5e-2
    from those of `galore-torch` after 60 steps, and 8.3e-7 where its refresh is made to keep the signs too.

    `scale` acts on the projected weights alone, so that at the defaults everything else trains at 4 times their rate;
    `other_lr_scale` comes on top of it.
    """

    method: ClassVar[str] = "galore"
    label: ClassVar[str] = "GaLore"
    paper: ClassVar[Paper | None] = Paper(
        title="GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
        arxiv="2403.03507",
        authors="Jiawei Zhao, Zhenyu Zhang, Beidi Chen, Zhangyang Wang, Anima Anandkumar, Yuandong Tian",
    )
    optimizer_cls: ClassVar[type[ProjectedAdamW]] = GaLoreAdamW

    scale: float = field(default=0.25, metadata={"help": "Factor on the update that is projected back."})
    proj_type: str = proj_type_field()
    refresh: str = refresh_field()
