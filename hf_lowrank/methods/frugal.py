"""FRUGAL (arXiv 2411.07837): Adam in a projection of the gradient, signSGD on what the projection drops.

Shapes: G: (m, n), P, R, N as in `optim.projector`; S: (m, n), the residual.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_lowrank.methods.base import Paper, register
from hf_lowrank.methods.projected import SubspaceConfig, proj_type_field, projection_field, refresh_field
from hf_lowrank.optim.adam import adam_direction, adamw, step_size
from hf_lowrank.optim.projected import Matrix, ProjectedAdamW, apply_back_projection
from hf_lowrank.optim.projector import PROJECTIONS
from hf_lowrank.optim.subspace import SUBSPACE_OPTIONS
from hf_lowrank.sharding import local

__all__ = ["FrugalAdamW", "FrugalConfig"]


class FrugalAdamW(ProjectedAdamW):
    """Adam in a subspace and signSGD outside of it (Algorithm 1), for the groups that carry `r`.

    Such a group holds matrices only and may carry `update_proj_gap` (200), `sign_lr_scale` (1.0), `proj_type` ("std"),
    `refresh` ("gram", "subspace" or "svd"), and the options of `optim.subspace`, whose `projection` may also be
    "coordinates" (random rows or columns). A refresh sets the moments to zero and Adam's step count with them, unless
    `rotate_moments` carries the first one over. With S = G - back(R): W <- (1 - lr wd) W - lr (back(N) + s sign(S)),
    where N = M' / (sqrt(V') + eps) has the bias corrections in it and s is `sign_lr_scale`. Where the projection drops
    nothing S is rounding alone and is left out.

    The other groups get AdamW, eps after the bias correction, as in the official code.

    State: as in `ProjectedAdamW`, and `refreshed`, the number of steps before the moments were last set to zero.
    """

    options: ClassVar[dict[str, Any]] = {
        "update_proj_gap": 200,
        "sign_lr_scale": 1.0,
        "proj_type": "std",
        **SUBSPACE_OPTIONS,
    }
    factor: ClassVar[str] = "sign_lr_scale"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"projection": (*PROJECTIONS, "coordinates")}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, **kwargs)

    def add_state(self, state: dict[str, Any], W: Tensor, index: int, place: int) -> None:
        state["refreshed"] = 0

    def refresh_projectors(self, matrices: list[Matrix], group: dict[str, Any]) -> None:
        super().refresh_projectors(matrices, group)
        for x in matrices if not group["rotate_moments"] else ():
            # every process counts for the matrices of all
            x.state["refreshed"] = x.t - 1
            if x.own:
                x.M.zero_()
                x.V.zero_()

    def direction(self, matrices: list[Matrix], group: dict[str, Any]) -> list[Tensor]:
        directions = []
        for x in matrices:
            own = {**group, "eps": _eps(group, x.t - x.state["refreshed"])}
            directions += adam_direction([x.R], [x.M], [x.V], own)
        return directions

    def update(self, matrices: list[Matrix], N: list[Tensor], group: dict[str, Any]) -> None:
        lr, decay = group["lr"], 1 - group["lr"] * group["weight_decay"]
        for x, direction in zip(matrices, N, strict=True):
            S = None
            if not _drops_nothing(x, group["r"]):
                S = x.G.clone()
                apply_back_projection(S, x.R, x.projector, x.where, -1.0, 1.0)
            step = step_size(lr, group["betas"], x.t - x.state["refreshed"])
            apply_back_projection(x.W, direction, x.projector, x.where, -step, decay)
            if S is not None:
                x.W.add_(S.sign_(), alpha=-lr * group["sign_lr_scale"])

    def step_adamw(self, pairs: list[tuple[Tensor, dict[str, Any]]], group: dict[str, Any], t: int) -> None:
        if group["weight_decay"] > 0:
            torch._foreach_mul_([local(p) for p, _ in pairs], 1 - group["lr"] * group["weight_decay"])
        adamw(pairs, {**group, "eps": _eps(group, t), "weight_decay": 0.0}, t)


@register
@dataclass
class FrugalConfig(SubspaceConfig):
    """FRUGAL with the arithmetic and the defaults of the official code (its projected variant, `GaloreAdamW` there).

    Unlike there the rank is the same for all matrices, as in GaLore; r = hidden_size / 4 is its density of 0.25 for
    matrices whose shorter side is the hidden size. The variant that trains whole blocks by turns is not offered. A
    full-rank projection has no sign part.
    """

    method: ClassVar[str] = "frugal"
    label: ClassVar[str] = "FRUGAL"
    paper: ClassVar[Paper | None] = Paper(
        title="FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training",
        arxiv="2411.07837",
        authors="Philip Zmushko, Aleksandr Beznosikov, Martin Takáč, Samuel Horváth",
    )
    optimizer_cls: ClassVar[type[ProjectedAdamW]] = FrugalAdamW

    sign_lr_scale: float = field(
        default=1.0, metadata={"help": "Rate of what the projection drops, which moves by its sign, over the rate."}
    )
    proj_type: str = proj_type_field()
    refresh: str = refresh_field()
    projection: str = projection_field("coordinates (random rows or columns)")


def _eps(group: dict[str, Any], t: int) -> float:
    """What `adam_direction` and `adamw` take for an eps that is added after the bias correction at step t."""
    return float(group["eps"] * math.sqrt(1 - group["betas"][1] ** t))


def _drops_nothing(x: Matrix, r: int) -> bool:
    m, n = x.shape
    return r == {"left": m, "right": n, "full": max(m, n)}[x.where]
