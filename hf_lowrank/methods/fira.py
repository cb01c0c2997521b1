"""Fira (arXiv 2410.01623): GaLore, and the part of the gradient that its projection drops, scaled like the rest.

Shapes: G: (m, n), P, R, N as in `optim.projector`; phi: (m, 1), (1, n) or a scalar, the scaling of the residual
S: (m, n).
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_lowrank.methods.base import Paper, register
from hf_lowrank.methods.projected import SubspaceConfig, proj_type_field, refresh_field
from hf_lowrank.optim.adam import step_size
from hf_lowrank.optim.projected import Matrix, ProjectedAdamW, apply_back_projection
from hf_lowrank.optim.scaling import limit_growth, norms, sum_over_rows
from hf_lowrank.optim.subspace import SUBSPACE_OPTIONS

__all__ = ["FiraAdamW", "FiraConfig"]


class FiraAdamW(ProjectedAdamW):
    """GaLore's projected Adam plus the residual that the projection drops (Algorithm 1), for the groups that
    carry `r`.

    Such a group holds matrices only and may carry `update_proj_gap` (200), `alpha` (0.25), `proj_type` ("std") and
    `refresh` ("gram", "subspace" or "svd"), and the options of `optim.subspace`. With phi = ||N|| / (||R|| + 1e-8) per
    row of R (per column where R has fewer rows than columns), the residual S = (G - alpha back(R)) phi, whose norm may
    grow by 1 % a step, joins the update: W <- (1 - lr wd) (W - lr_t (alpha back(N) + S)). For `full`, which the
    official package cannot run, phi is one number for the matrix (the paper's matrix-level scaling).

    State: as in `ProjectedAdamW`, and `residual_norm`, a scalar.
    """

    options: ClassVar[dict[str, Any]] = {
        "update_proj_gap": 200, "alpha": 0.25, "proj_type": "std", **SUBSPACE_OPTIONS,
    }  # fmt: skip
    factor: ClassVar[str] = "alpha"

    def add_state(self, state: dict[str, Any], W: Tensor, index: int, place: int) -> None:
        state["residual_norm"] = W.new_zeros(())

    def update(self, matrices: list[Matrix], N: list[Tensor], group: dict[str, Any]) -> None:
        alpha, decay = group["alpha"], 1 - group["lr"] * group["weight_decay"]
        scalings = [_scaling(x, n) for x, n in zip(matrices, N, strict=True)]
        residuals = [
            None if _without_residual(x, alpha) else (x.G - alpha * _back(x)) * phi.to(x.G.dtype)
            for x, phi in zip(matrices, scalings, strict=True)
        ]
        squares = _squares(matrices, scalings, residuals, alpha)
        for x, n, phi, S, square in zip(matrices, N, scalings, residuals, squares, strict=True):
            limit = limit_growth(square.clamp_min(0).sqrt(), x.state["residual_norm"])
            step = step_size(group["lr"], group["betas"], x.t) * decay
            if S is not None:
                apply_back_projection(x.W, n, x.projector, x.where, -step * alpha, decay)
                x.W.addcmul_(S, limit.to(S.dtype), value=-step)
                continue
            # alpha back(N) + phi (G - alpha back(R)) = alpha back(N - phi R) + phi G: one product for both
            limited = (phi * limit).to(n.dtype)
            apply_back_projection(x.W, n.addcmul_(limited, x.R, value=-1), x.projector, x.where, -step * alpha, decay)
            x.W.addcmul_(x.G, limited, value=-step)


@register
@dataclass
class FiraConfig(SubspaceConfig):
    """Fira with the arithmetic and the defaults of the official `fira`.

    Differences from the paper, as in that package: `alpha` also scales the back-projection that is subtracted from
    the gradient, eps (1e-6) is added before the bias correction, and weight decay comes after the update. Different
    from that package: the projector is found without a full SVD unless `refresh="svd"`, and the default refresh keeps
    the signs of the singular vectors that it replaces (see `GaLoreConfig`); `proj_type="full"` runs, and a step
    without a gradient does not reset the norm that the limiter goes by.
    """

    method: ClassVar[str] = "fira"
    label: ClassVar[str] = "Fira"
    paper: ClassVar[Paper | None] = Paper(
        title="Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?",
        arxiv="2410.01623",
        authors="Xi Chen, Kaituo Feng, Changsheng Li, Xunhao Lai, Xiangyu Yue, Ye Yuan, Guoren Wang",
    )
    optimizer_cls: ClassVar[type[ProjectedAdamW]] = FiraAdamW

    alpha: float = field(default=0.25, metadata={"help": "Factor on whatever is projected back."})
    proj_type: str = proj_type_field()
    refresh: str = refresh_field()


def _back(x: Matrix) -> Tensor:
    zeros = torch.zeros_like(x.G)
    apply_back_projection(zeros, x.R, x.projector, x.where, 1.0, 0.0)
    return zeros


def _axis(x: Matrix) -> int | None:
    """Axis over which norms are taken: 1 for one phi a row, 0 a column, None for one number."""
    if x.where == "full":
        return None
    if x.where == "right":
        return 1
    # the official code goes by R's shape (r, n) alone, which for r = n fits W only where m = n as well
    return 1 if x.R.shape[0] == x.R.shape[1] == x.shape[0] else 0


def _scaling(x: Matrix, N: Tensor) -> Tensor:
    axis = _axis(x)
    phi = norms(N, axis) / (norms(x.R, axis) + 1e-8)
    if axis == 1 and x.where == "left":
        return x.shards.local_rows(phi)
    return phi


def _without_residual(x: Matrix, alpha: float) -> bool:
    """Whether ||S|| can be had from norms of G and R alone.

    It can where phi scales what the projection leaves apart, since then ||G_i - alpha R_i P||^2 is
    ||G_i||^2 - (2 alpha - alpha^2) ||R_i||^2; near alpha = 1 the difference would be rounding.
    """
    return _axis(x) == {"right": 1, "left": 0}.get(x.where, -1) and abs(1 - alpha) > 0.1


def _squares(
    matrices: list[Matrix], scalings: list[Tensor], residuals: list[Tensor | None], alpha: float
) -> list[Tensor]:
    """||S||^2 of every matrix, over all of its rows."""
    partial, once = [], []
    for x, phi, S in zip(matrices, scalings, residuals, strict=True):
        if S is not None:
            partial.append(norms(S, None).square())
            once.append(torch.zeros_like(partial[-1]))
            continue
        axis = _axis(x)
        outside = (phi * norms(x.G, axis)).square().sum()
        inside = (2 * alpha - alpha**2) * (phi * norms(x.R, axis)).square().sum()
        # R is whole on every process unless it has W's rows
        partial.append(outside - inside if x.by_rows else outside)
        once.append(torch.zeros_like(outside) if x.by_rows else inside)
    return [total - part for total, part in zip(sum_over_rows(matrices, partial), once, strict=True)]
