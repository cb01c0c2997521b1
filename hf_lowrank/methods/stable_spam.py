"""Stable-SPAM: AdamW on gradients whose spikes are clipped and whose norm follows its own history, with resets.

A full-rank baseline. Shapes: G: (m, n), by rows if it is sharded.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import TrainingArguments

from hf_lowrank.methods.base import LowRankConfig, Paper, register
from hf_lowrank.methods.muon import adamw_arguments
from hf_lowrank.optim.marked import MarkedAdamW
from hf_lowrank.sharding import like, local, whole

__all__ = ["StableSpamAdamW", "StableSpamConfig"]


class StableSpamAdamW(MarkedAdamW):
    """Stable-SPAM for the groups that carry `gamma3`, `torch.optim.AdamW` for the others.

    Such a group carries `gamma1` and `gamma2` (decay rates of the first and second moment of the gradient's norm),
    `gamma3` (of its largest entry) and `reset_every`. In step t, with bias-corrected averages and in this order:
    entries of G above the average largest entry are scaled by it over the largest entry; G is divided by its norm and
    multiplied with m / (sqrt(v) + eps), m and v the moments of the norm; AdamW's step, eps after the bias correction.

    State: `step` (since the last reset), `total` (all steps), `exp_avg`, `exp_avg_sq`, and as numbers `max_entry`,
    `norm`, `norm_sq`.
    """

    mark = "gamma3"

    def step_marked(self, group: dict[str, Any]) -> None:
        """See `MarkedAdamW`."""
        for p in group["params"]:
            if p.grad is not None:
                self._step_one(p, p.grad, group)

    def _step_one(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, (b1, b2), eps = self.state[p], group["betas"], group["eps"]
        if not state:
            state.update(step=torch.tensor(0.0), total=0, max_entry=0.0, norm=0.0, norm_sq=0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        state["total"] += 1
        # largest entry and norm are those of the whole weight
        G = local(like(_steadied(whole(grad), state, group), p))
        M, V, W = local(state["exp_avg"]), local(state["exp_avg_sq"]), local(p)
        if group["reset_every"] and state["total"] % group["reset_every"] == 0:
            M.zero_()
            V.zero_()
            state["step"].fill_(1.0)
        t = int(state["step"])
        W.mul_(1 - group["lr"] * group["weight_decay"])
        M.lerp_(G, 1 - b1)
        V.mul_(b2).addcmul_(G, G, value=1 - b2)
        W.addcdiv_(M, V.sqrt().div_(math.sqrt(1 - b2**t)).add_(eps), value=-group["lr"] / (1 - b1**t))


def _steadied(G: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """The gradient, clipped and normalised; the averages in `state` are brought up to date."""
    t = int(state["step"])

    def averaged(key: str, value: float, rate: float) -> float:
        state[key] = rate * state[key] + (1 - rate) * value
        return float(state[key] / (1 - rate**t))

    largest = G.abs().max().item()
    bound = averaged("max_entry", largest, group["gamma3"])
    if bound < largest:
        G = torch.where(G.abs() > bound, G * (bound / largest), G)
    norm = torch.linalg.vector_norm(G).item()
    first = averaged("norm", norm, group["gamma1"])
    second = averaged("norm_sq", norm * norm, group["gamma2"])
    return G * (first / (math.sqrt(second) + group["eps"]) / norm) if norm > 0 else G


@register
@dataclass
class StableSpamConfig(LowRankConfig):
    """Stable-SPAM as in TianjinYellow/StableSPAM for the targets, Trainer's AdamW for everything else.

    Different from that code: there embeddings, norms and head are trained by it as well; steps to a reset are counted
    by parameter; the gradient itself is left as it was; and the option that lets the first decay rates fall along a
    cosine (total_T) is left out. As there, a reset's own step is Adam's first, and the averages of a gradient's norm
    and largest entry go on, corrected by the new count. Norms are divided out, so that `max_grad_norm` does little.
    """

    method: ClassVar[str] = "stable_spam"
    label: ClassVar[str] = "Stable-SPAM"
    paper: ClassVar[Paper | None] = Paper(
        title="Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam",
        arxiv="2502.17055",
        authors="Tianjin Huang, Haotian Hu, Zhenyu Zhang, Gaojie Jin, Xiang Li, Li Shen, Tianlong Chen, Lu Liu, "
        "Qingsong Wen, Zhangyang Wang, Shiwei Liu",
    )

    gamma1: float = field(default=0.7, metadata={"help": "Decay rate of the average norm of a gradient."})
    gamma2: float = field(default=0.9, metadata={"help": "Decay rate of the average squared norm of a gradient."})
    gamma3: float = field(default=0.999, metadata={"help": "Decay rate of the average largest entry of a gradient."})
    reset_every: int = field(default=1000, metadata={"help": "Steps between two resets of the moments; 0 for none."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gamma1", "gamma2", "gamma3"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: a decay rate lies in [0, 1), 0.9 for example")
        every = self.reset_every
        if not isinstance(every, int) or isinstance(every, bool) or every < 0:
            raise ValueError(f"reset_every={every!r}: give a whole number of optimizer steps, 0 for never")

    def group_options(self, r: int) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("gamma1", "gamma2", "gamma3", "reset_every")}

    def optimizer(self, args: TrainingArguments) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        return StableSpamAdamW, adamw_arguments(self.label, args)

    def state_elements(self, m: int, n: int, r: int) -> int:
        return 2 * m * n
