"""SLTrain (arXiv 2406.02214): each target weight is low-rank plus sparse, W = (alpha / r) B A + S.

Shapes: A: (r, n), B: (m, r), S: (m, n) with int(sparsity * m * n) non-zeros, x: (..., n), y: (..., m).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from hf_lowrank.experts import Stack
from hf_lowrank.methods.base import LowRankConfig, Paper, ReparameterizedLinear, register
from hf_lowrank.methods.stacks import StackOfLayers

__all__ = ["SLTrainConfig", "SLTrainLinear"]


def compose(A: Tensor, B: Tensor, values: Tensor, support: Tensor, scaling: float) -> Tensor:
    """W = scaling * B A + S: (m, n), differentiable; `support` holds the flat positions of S's `values`."""
    # W is a parameter in all but name: like one it is cast once, as a whole, where autocast wants bf16
    with torch.autocast(A.device.type, enabled=False):
        low_rank = torch.mm(B, A) * scaling
        return low_rank.flatten().index_add(0, support, values).view_as(low_rank)


class _SparseLowRankLinear(torch.autograd.Function):
    """y = x Wᵀ that keeps A, B and S for the backward pass and rebuilds W there, so no dense W outlives the call.

    The backward pass is made of differentiable operations: autograd derives the double backward from it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, values: Tensor, support: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(x, A, B, values, support)
        ctx.scaling = scaling
        return F.linear(x, compose(A, B, values, support, scaling).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, values, support = ctx.saved_tensors
        (dy,) = grad_outputs
        dx = dA = dB = dvalues = None
        if ctx.needs_input_grad[0]:
            dx = dy @ compose(A, B, values, support, ctx.scaling).to(dy.dtype)
        if any(ctx.needs_input_grad[1:4]):
            dW = (dy.flatten(0, -2).T @ x.flatten(0, -2)).to(A.dtype)
            dA = torch.mm(B.T, dW) * ctx.scaling
            dB = torch.mm(dW, A.T) * ctx.scaling
            dvalues = dW.flatten().index_select(0, support)
        return dx, dA, dB, dvalues, None, None


class SLTrainLinear(ReparameterizedLinear):
    """Linear layer with W = (alpha / r) B A + S (Section 3 of the paper).

    A is Kaiming-uniform (a = sqrt 5), B zero; S has `int(sparsity * m * n)` positions drawn uniformly without
    replacement, kept sorted as a buffer, and values uniform in (-1/sqrt n, 1/sqrt n).

    Args:
        in_features, out_features: n and m.
        r: rank of B A.
        alpha: numerator of the low-rank part's scaling.
        sparsity: share of W's entries that S holds.
        bias: whether a bias (m,) is added.
        fan_in_fan_out: see `ReparameterizedLinear`.
        generator: source of the initial values and of the positions.
    """

    sparse_support: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        alpha: float,
        sparsity: float,
        bias: bool = False,
        fan_in_fan_out: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.r = in_features, out_features, r
        self.fan_in_fan_out = fan_in_fan_out
        self.scaling = alpha / r
        entries = in_features * out_features
        count = int(sparsity * entries)
        support = torch.randperm(entries, generator=generator)[:count].sort().values
        self.register_buffer("sparse_support", support.to(torch.int32 if entries < 2**31 else torch.int64))
        bound = 1 / math.sqrt(in_features)
        # Kaiming-uniform with a = sqrt 5 and fan-in n is uniform in the same bounds as the sparse values
        self.A = nn.Parameter(torch.empty(r, in_features).uniform_(-bound, bound, generator=generator))
        self.B = nn.Parameter(torch.zeros(out_features, r))
        self.sparse_values = nn.Parameter(torch.empty(count).uniform_(-bound, bound, generator=generator))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """y: (..., m) from x: (..., n)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y: Tensor = _SparseLowRankLinear.apply(
            x, self.A, self.B, self.sparse_values, self.sparse_support, self.scaling
        )
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        return self.compose(*self.weight_parts())

    def weight_parts(self) -> tuple[Tensor, ...]:
        return self.A, self.B, self.sparse_values

    def compose(self, *parts: Tensor) -> Tensor:
        A, B, values = parts
        return compose(A, B, values, self.sparse_support, self.scaling)

    def unreadable(self) -> str | None:
        return None

    def fixed_structure(self) -> dict[str, Tensor]:
        return {"sparse_support": self.sparse_support}

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"nonzeros={self.sparse_values.numel()}, scaling={self.scaling:g}"
        )


class SLTrainExperts(StackOfLayers):
    """SLTrain on a stack of experts' matrices: A: (E, r, n), B: (E, m, r), and as many values of S for each."""

    A: Tensor
    B: Tensor
    sparse_values: Tensor
    sparse_support: Tensor

    def __init__(self, stack: Stack, key: str, layers: Sequence[SLTrainLinear]) -> None:
        super().__init__(stack, key, layers)
        self.scaling = layers[0].scaling

    def weight_parts(self) -> tuple[Tensor, ...]:
        return self.A, self.B, self.sparse_values, self.sparse_support

    def compose(self, *parts: Tensor) -> Tensor:
        A, B, values, support = parts
        with torch.autocast(A.device.type, enabled=False):
            low_rank = torch.bmm(B, A) * self.scaling
            return low_rank.flatten(1).scatter_add(1, support.long(), values).view_as(low_rank)

    def fixed_structure(self) -> dict[str, Tensor]:
        return {"sparse_support": self.sparse_support}


@register
@dataclass
class SLTrainConfig(LowRankConfig):
    """SLTrain with the settings of the official code; dropout, which that code never applies, is left out."""

    method: ClassVar[str] = "sltrain"
    label: ClassVar[str] = "SLTrain"
    paper: ClassVar[Paper | None] = Paper(
        title="SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining",
        arxiv="2406.02214",
        authors="Andi Han, Jiaxiang Li, Wei Huang, Mingyi Hong, Akiko Takeda, Pratik Jawanpuria, Bamdev Mishra",
    )
    replaces_layers: ClassVar[bool] = True
    takes_stacks: ClassVar[bool] = True

    r: int | None = field(default=None, metadata={"help": "Rank of the low-rank part; default hidden_size / 4."})
    alpha: float = field(default=32, metadata={"help": "The low-rank part is scaled by alpha / r."})
    sparsity: float = field(default=0.03, metadata={"help": "Share of the weight's entries in the sparse part."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity!r}: the sparse part's share lies in [0, 1), the paper has 0.03")
        if not self.alpha > 0:
            raise ValueError(f"alpha={self.alpha!r}: the scaling's numerator is positive, the paper has 8 to 32")

    def new_layer(self, in_features: int, out_features: int, r: int, **kwargs: Any) -> SLTrainLinear:
        return SLTrainLinear(in_features, out_features, r, alpha=self.alpha, sparsity=self.sparsity, **kwargs)

    def new_stack(self, stack: Stack, key: str, layers: list[Any]) -> SLTrainExperts:
        return SLTrainExperts(stack, key, layers)

    def state_elements(self, m: int, n: int, r: int) -> int:
        return 2 * (r * (m + n) + int(self.sparsity * m * n))
