"""Adam as the official packages of GaLore, Fira and APOLLO have it: eps is added before the bias correction."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from hf_lowrank.sharding import local

__all__ = ["adam_direction", "adamw", "step_size"]


def step_size(lr: float, betas: tuple[float, float], t: int) -> float:
    """lr * sqrt(1 - b2^t) / (1 - b1^t): the bias correction outside of eps, as in the official packages."""
    return lr * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)


def adam_direction(R: list[Tensor], M: list[Tensor], V: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """Update moments in place and return N = M / (sqrt(V) + eps), for each of several gradients R."""
    b1, b2 = group["betas"]
    if len(R) == 1:
        # fusing over one matrix costs more than it gains
        M[0].lerp_(R[0], 1 - b1)
        V[0].mul_(b2).addcmul_(R[0], R[0], value=1 - b2)
        n = V[0].sqrt().add_(group["eps"])
        return [torch.div(M[0], n, out=n)]
    torch._foreach_lerp_(M, R, 1 - b1)
    torch._foreach_mul_(V, b2)
    torch._foreach_addcmul_(V, R, R, value=1 - b2)
    N = torch._foreach_sqrt(V)
    torch._foreach_add_(N, group["eps"])
    return list(torch._foreach_div(M, N))


def adamw(pairs: list[tuple[Tensor, dict[str, Any]]], group: dict[str, Any], t: int) -> None:
    """One AdamW step of parameters that are at the same step t."""
    W, states = [local(p) for p, _ in pairs], [state for _, state in pairs]
    # the fused kernel walks through memory: a gradient laid out otherwise is copied
    G = [_laid_out_like(w, local(p.grad)) for w, (p, _) in zip(W, pairs, strict=True) if p.grad is not None]
    b1, b2 = group["betas"]
    fused = all(w.is_contiguous() and w.device.type in ("cpu", "cuda") for w in W)
    adam(
        W,
        G,
        [local(state["exp_avg"]) for state in states],
        [local(state["exp_avg_sq"]) for state in states],
        [],
        [torch.full((), t - 1.0, device=w.device if fused else "cpu") for w in W],
        foreach=False,
        fused=fused,
        amsgrad=False,
        maximize=False,
        beta1=b1,
        beta2=b2,
        lr=group["lr"],
        weight_decay=0.0,
        # sqrt(V / (1 - b2^t)) + eps' is sqrt(V) + eps over the same root
        eps=group["eps"] / math.sqrt(1 - b2**t),
    )
    if group["weight_decay"] > 0:
        torch._foreach_mul_(W, 1 - group["lr"] * group["weight_decay"])


def _laid_out_like(w: Tensor, g: Tensor) -> Tensor:
    return g if g.stride() == w.stride() else torch.empty_like(w).copy_(g)
