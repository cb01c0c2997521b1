"""GaLore's AdamW (arXiv 2403.03507, Algorithm 2) with the arithmetic of the official `galore-torch`."""

from typing import Any, ClassVar

from torch import Tensor

from hf_lowrank.optim.adam import step_size
from hf_lowrank.optim.projected import Matrix, ProjectedAdamW, apply_back_projection

__all__ = ["GaLoreAdamW"]


class GaLoreAdamW(ProjectedAdamW):
    """AdamW in the gradient's top-r singular subspace, for the groups that carry `r`.

    Such a group holds matrices only and may carry `update_proj_gap` (200), `scale` (0.25), `proj_type` ("std") and
    `refresh` ("gram", "subspace" or "svd"). W <- (1 - lr wd) (W - lr_t scale back(N)), where lr_t is the learning
    rate with the bias correction. State, arguments and errors: see `ProjectedAdamW`.
    """

    options: ClassVar[dict[str, Any]] = {"update_proj_gap": 200, "scale": 0.25, "proj_type": "std", "refresh": "gram"}
    factor: ClassVar[str] = "scale"

    def update(self, matrices: list[Matrix], N: list[Tensor], group: dict[str, Any]) -> None:
        decay = 1 - group["lr"] * group["weight_decay"]
        for x, direction in zip(matrices, N, strict=True):
            alpha = -step_size(group["lr"], group["betas"], x.t) * group["scale"] * decay
            apply_back_projection(x.W, direction, x.projector, x.where, alpha, decay)
