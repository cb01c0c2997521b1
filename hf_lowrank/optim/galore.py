"""GaLore's AdamW (arXiv 2403.03507, Algorithm 2) with the arithmetic of the official `galore-torch`.

Shapes: W, G: (m, n); R, M, V: the projected gradient and its moments (see `projector`); r rank, t step from 1.
"""

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_lowrank.optim.projector import (
    PROJ_TYPES,
    REFRESHES,
    moment_shape,
    project,
    projector_shapes,
    refresh_projector,
    side,
)

__all__ = ["GaLoreAdamW", "check_options"]

logger = logging.getLogger(__name__)

DEFAULTS = {"update_proj_gap": 200, "scale": 0.25, "proj_type": "std", "refresh": "gram"}
PROJECTORS = ("projector", "projector_right")


def check_options(group: dict[str, Any]) -> None:
    """`ValueError` that names the option where a projected group's options make no sense."""
    if not isinstance(group["r"], int) or group["r"] < 1:
        raise ValueError(f"r={group['r']!r}: the rank is a whole number of 1 or more")
    if not isinstance(group["update_proj_gap"], int) or group["update_proj_gap"] < 1:
        raise ValueError(f"update_proj_gap={group['update_proj_gap']!r}: give a whole number of steps, 1 or more")
    if not group["scale"] > 0:
        raise ValueError(f"scale={group['scale']!r}: the factor on the update is positive (official: 0.25)")
    for key, known in (("proj_type", PROJ_TYPES), ("refresh", REFRESHES)):
        if group[key] not in known:
            raise ValueError(f"{key}={group[key]!r}: it is one of {', '.join(known)}")


def adam_moments(grad: Tensor, M: Tensor, V: Tensor, betas: tuple[float, float]) -> None:
    """Decay and update both moments in place."""
    M.lerp_(grad, 1 - betas[0])
    V.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])


def step_size(lr: float, betas: tuple[float, float], t: int) -> float:
    """lr * sqrt(1 - b2^t) / (1 - b1^t): the bias correction outside of eps, as in the official code."""
    return lr * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)


def apply_back_projection(
    W: Tensor, N: Tensor, projector: list[Tensor], where: str, alpha: float, beta: float
) -> None:
    """W <- beta W + alpha back(N) in one fused product."""
    if where == "right":
        W.addmm_(N, projector[0], beta=beta, alpha=alpha)
    elif where == "left":
        W.addmm_(projector[0], N, beta=beta, alpha=alpha)
    else:
        W.addmm_(torch.mm(projector[0], N), projector[1], beta=beta, alpha=alpha)


class GaLoreAdamW(torch.optim.Optimizer):
    """AdamW whose moments live in a low-rank projection of the gradient, for the groups that carry `r`.

    A group with `r` holds matrices only and may carry `update_proj_gap` (200), `scale` (0.25), `proj_type` ("std")
    and `refresh` ("gram", "subspace" or "svd"). The other groups get the same arithmetic without a projection:
    unlike in `torch.optim.AdamW`, eps is added before the bias correction and weight decay follows the update.

    State of a projected weight: `step`, `exp_avg`, `exp_avg_sq` (the shape of R), `projector` and, for "full",
    `projector_right`; tensors only, made at the first step or by `init_state`.

    A gradient that is not finite changes nothing: its parameter is left out of that step, and this is logged.

    Args:
        params: parameters or groups, as for any `torch.optim.Optimizer`.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay, of projected weights as well.

    Raises:
        ValueError: an option out of range; a projected parameter that is no matrix, or whose min(m, n) is below r.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay}: none is negative, betas are below 1"
            )
        self._warned = False
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in `torch.optim.Optimizer`; a group with `r` is checked and gets the options it lacks."""
        if "r" in param_group:
            param_group = {**DEFAULTS, **param_group}
            check_options(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for p in group["params"] if "r" in group else ():
            if p.ndim != 2 or min(p.shape) < group["r"]:
                shape = tuple(p.shape)
                raise ValueError(
                    f"r={group['r']} and a parameter of shape {shape}: r is at most the shorter side of a matrix"
                )

    @torch.no_grad()
    def init_state(self) -> None:
        """Make the state of every parameter that has none, without a step."""
        for group in self.param_groups:
            for p in group["params"]:
                self._state_of(p, group)

    def _state_of(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            if "r" in group and isinstance(p, DTensor):
                raise ValueError(
                    f"a projected parameter of shape {tuple(p.shape)} is sharded, and a shard's gradient has other "
                    "singular vectors than the whole: train with DDP (recipes/accelerate/ddp.yaml) instead of FSDP"
                )
            state["step"] = torch.tensor(0.0)
            shape = tuple(p.shape)
            if "r" in group:
                for key, kept in zip(
                    PROJECTORS, projector_shapes(p.shape, group["r"], group["proj_type"]), strict=False
                ):
                    state[key] = p.new_zeros(kept)
                shape = moment_shape(p.shape, group["r"], group["proj_type"])
            state["exp_avg"] = p.new_zeros(shape)
            state["exp_avg_sq"] = p.new_zeros(shape)
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            update = self._step_projected if "r" in group else self._step_plain
            for p in group["params"]:
                if p.grad is not None:
                    update(p, p.grad, self._state_of(p, group), group)
        return loss

    def _step_projected(self, p: Tensor, G: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        where = side(p.shape, group["proj_type"])
        t = int(state["step"]) + 1
        projector = [state[key] for key in PROJECTORS if key in state]
        if (t - 1) % group["update_proj_gap"] == 0:
            if not torch.isfinite(G).all():
                return self._skip(p)
            fresh = refresh_projector(G, group["r"], where, group["refresh"], projector if t > 1 else None)
            for kept, new in zip(projector, fresh, strict=True):
                kept.copy_(new)
        R = project(G, projector, where)
        # any entry of G that is not finite spreads into R, which is smaller to look through
        if not torch.isfinite(R).all():
            return self._skip(p)
        state["step"] += 1
        adam_moments(R, state["exp_avg"], state["exp_avg_sq"], group["betas"])
        N = state["exp_avg"] / state["exp_avg_sq"].sqrt().add_(group["eps"])
        decay = 1 - group["lr"] * group["weight_decay"]
        alpha = -step_size(group["lr"], group["betas"], t) * group["scale"] * decay
        apply_back_projection(p, N, projector, where, alpha, decay)

    def _step_plain(self, p: Tensor, G: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        if not torch.isfinite(G).all():
            return self._skip(p)
        state["step"] += 1
        adam_moments(G, state["exp_avg"], state["exp_avg_sq"], group["betas"])
        denominator = state["exp_avg_sq"].sqrt().add_(group["eps"])
        p.addcdiv_(state["exp_avg"], denominator, value=-step_size(group["lr"], group["betas"], int(state["step"])))
        if group["weight_decay"] > 0:
            p.mul_(1 - group["lr"] * group["weight_decay"])

    def _skip(self, p: Tensor) -> None:
        if not self._warned:
            logger.warning(
                "the gradient of a parameter of shape %s is not finite: such parameters are left out of their step "
                "(said once)",
                tuple(p.shape),
            )
            self._warned = True
