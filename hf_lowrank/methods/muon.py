"""Muon: the momentum of every target is orthogonalised before it becomes the update; AdamW trains the rest.

A full-rank baseline that is stronger than AdamW. Shapes: W, G: (m, n), by rows if they are sharded.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from hf_lowrank.methods.base import LowRankConfig, Paper, register
from hf_lowrank.methods.trainer_arguments import ADAMW, plain
from hf_lowrank.optim.marked import MarkedAdamW
from hf_lowrank.sharding import assembled, like, local

__all__ = ["MuonAdamW", "MuonConfig", "adamw_arguments", "orthogonalized"]

ADJUSTMENTS = ("match_rms_adamw", "original")
# the quintic's coefficients, and what keeps a zero gradient from a division by zero, as in torch.optim.Muon
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-7


def orthogonalized(G: Tensor, steps: int) -> Tensor:
    """A matrix with G's singular vectors and singular values near 1 (0.7 to 1.2 after five steps), in bf16.

    Newton-Schulz iteration with the quintic a X + b X X^T X + c (X X^T)^2 X, as in `torch.optim.Muon`.

    Args:
        G: (m, n) or a stack of such matrices, of any dtype.
        steps: iterations.
    """
    a, b, c = COEFFICIENTS
    tall = G.shape[-2] > G.shape[-1]
    X = G.bfloat16().mT if tall else G.bfloat16()
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(steps):
        gram = X @ X.mT
        if X.ndim == 2:
            X = torch.addmm(X, torch.addmm(gram, gram, gram, beta=b, alpha=c), X, beta=a)
        else:
            X = torch.baddbmm(X, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), X, beta=a)
    return X.mT if tall else X


class MuonAdamW(MarkedAdamW):
    """Muon for the groups that carry `ns_steps`, `torch.optim.AdamW` for the others.

    A Muon group carries `momentum`, `nesterov`, `ns_steps` and `adjust_lr_fn` as `torch.optim.Muon` has them. On whole
    matrices its update is that optimizer's to the bit. A weight that FSDP2 shards is updated as if it were whole: its
    momentum is gathered for the iteration. State of a Muon weight: `step`, one for each matrix, and `momentum_buffer`
    of the weight's shape.

    Args:
        params: parameters or groups, as for any `torch.optim.Optimizer`.
        **kwargs: `torch.optim.AdamW`'s.

    A gradient that is not finite leaves its parameter out of that step.

    Raises:
        ValueError: a Muon parameter is no matrix and no stack of matrices.
    """

    mark = "ns_steps"

    def __init__(self, params: Iterable[Any], **kwargs: Any) -> None:
        super().__init__(params, **kwargs)
        for group in self.param_groups:
            for p in group["params"] if "ns_steps" in group else ():
                if p.ndim < 2:
                    raise ValueError(f"Muon and a parameter of shape {tuple(p.shape)}: it orthogonalises matrices")

    def step_marked(self, group: dict[str, Any]) -> None:
        """See `MarkedAdamW`."""
        for p in group["params"]:
            if p.grad is not None:
                self._step_muon(p, p.grad, group)

    def _step_muon(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["step"], state["momentum_buffer"] = torch.zeros(p.shape[:-2]), torch.zeros_like(p)
        state["step"] += 1
        W, G, M, momentum = local(p), local(grad), local(state["momentum_buffer"]), group["momentum"]
        M.lerp_(G, 1 - momentum)
        direction = G.lerp(M, momentum) if group["nesterov"] else M
        # the iteration needs the whole matrix
        update = orthogonalized(assembled(direction, p), group["ns_steps"])
        W.mul_(1 - group["lr"] * group["weight_decay"])
        W.add_(local(like(update, p)), alpha=-group["lr"] * _adjustment(group["adjust_lr_fn"], p.shape))


def adamw_arguments(label: str, args: TrainingArguments) -> dict[str, Any]:
    """Trainer's arguments for torch's AdamW; `ValueError` if it was to make another optimizer."""
    own = plain(args.optim)
    if own not in ADAMW:
        raise ValueError(f"optim='{own}': {label} trains what is no target by torch's AdamW; use {' or '.join(ADAMW)}")
    kwargs: dict[str, Any] = Trainer.get_optimizer_cls_and_kwargs(args)[1]
    return kwargs


def _adjustment(kind: str, shape: torch.Size) -> float:
    m, n = shape[-2:]
    return 0.2 * math.sqrt(max(m, n)) if kind == "match_rms_adamw" else math.sqrt(max(1.0, m / n))


@register
@dataclass
class MuonConfig(LowRankConfig):
    """Muon with the arithmetic of `torch.optim.Muon` for the targets, Trainer's AdamW for everything else.

    With `adjust_lr_fn="match_rms_adamw"` (arXiv 2502.16982) an update is as long as AdamW's, so that rates and weight
    decay that were tuned for AdamW can be kept; "original" is Keller Jordan's factor sqrt(max(1, m / n)).
    """

    method: ClassVar[str] = "muon"
    label: ClassVar[str] = "Muon"
    paper: ClassVar[Paper | None] = Paper(
        title="Muon is Scalable for LLM Training",
        arxiv="2502.16982",
        authors="Jingyuan Liu, Jianlin Su, Xingcheng Yao, Zhejun Jiang, Guokun Lai, Yulun Du, Yidao Qin, Weixin Xu, "
        "Enzhe Lu, Junjie Yan, Yanru Chen, Huabin Zheng, Yibo Liu, Shaowei Liu, Bohong Yin, Weiran He, Han Zhu, "
        "Yuzhi Wang, Jianzhou Wang, Mengnan Dong, Zheng Zhang, Yongsheng Kang, Hao Zhang, Xinran Xu, Yutao Zhang, "
        "Yuxin Wu, Xinyu Zhou, Zhilin Yang",
    )

    takes_stacks: ClassVar[bool] = True

    momentum: float = field(default=0.95, metadata={"help": "Decay rate of the targets' momentum."})
    nesterov: bool = field(default=True, metadata={"help": "Look ahead by one step of momentum."})
    ns_steps: int = field(default=5, metadata={"help": "Newton-Schulz iterations of an update."})
    adjust_lr_fn: str = field(
        default="match_rms_adamw",
        metadata={"help": "Factor on the rate by a matrix's shape: match_rms_adamw (AdamW's rates fit) or original."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum!r}: a decay rate lies in [0, 1), 0.95 for example")
        if not isinstance(self.ns_steps, int) or isinstance(self.ns_steps, bool) or not 1 <= self.ns_steps < 100:
            raise ValueError(f"ns_steps={self.ns_steps!r}: give a number of iterations from 1 to 99, 5 for example")
        if self.adjust_lr_fn not in ADJUSTMENTS:
            raise ValueError(f"adjust_lr_fn={self.adjust_lr_fn!r}: it is one of {', '.join(ADJUSTMENTS)}")

    def group_options(self, r: int) -> dict[str, Any]:
        names = ("momentum", "nesterov", "ns_steps", "adjust_lr_fn")
        return {name: getattr(self, name) for name in names}

    def optimizer(self, args: TrainingArguments) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        return MuonAdamW, adamw_arguments(self.label, args)

    def state_elements(self, m: int, n: int, r: int) -> int:
        return m * n
