"""Low-rank factors: each target weight is W = (alpha / r) B A, and both factors are trained from random values.

This is the row "Low-Rank" of the tables since GaLore (arXiv 2403.03507). Refactorisation and the reset of moments are
those of arXiv 2505.22922.

Shapes: A: (r, n), B: (m, r), x: (..., n), y: (..., m).
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_lowrank.experts import Stack
from hf_lowrank.methods.base import LowRankConfig, MethodCallback, Paper, ReparameterizedLinear, register
from hf_lowrank.methods.stacks import StackOfLayers
from hf_lowrank.methods.trainer_arguments import ADAMW, plain
from hf_lowrank.sharding import like, local, reshard, whole

__all__ = ["LowRankCallback", "LowRankFactorsConfig", "LowRankLinear", "balanced", "factorized"]

logger = logging.getLogger(__name__)

# what an Adam keeps of a parameter; its step counts anew from a reset
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class LowRankLinear(ReparameterizedLinear):
    """Linear layer with W = (alpha / r) B A.

    Both factors are Kaiming-uniform (a = sqrt 5): A in (-1/sqrt n, 1/sqrt n), B in (-1/sqrt r, 1/sqrt r).

    Args:
        in_features, out_features: n and m.
        r: rank of W.
        alpha: numerator of the scaling.
        bias: whether a bias (m,) is added.
        fan_in_fan_out: see `ReparameterizedLinear`.
        generator: source of the initial values.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        alpha: float,
        bias: bool = False,
        fan_in_fan_out: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.r = in_features, out_features, r
        self.fan_in_fan_out, self.scaling = fan_in_fan_out, alpha / r
        bounds = {(r, in_features): 1 / math.sqrt(in_features), (out_features, r): 1 / math.sqrt(r)}
        factors = [torch.empty(shape).uniform_(-b, b, generator=generator) for shape, b in bounds.items()]
        self.A, self.B = map(nn.Parameter, factors)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """y: (..., m) from x: (..., n)."""
        y = F.linear(F.linear(x, self.A), self.B) * self.scaling
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        return self.compose(*self.weight_parts())

    def weight_parts(self) -> tuple[Tensor, ...]:
        return self.A, self.B

    def compose(self, *parts: Tensor) -> Tensor:
        A, B = parts
        # a parameter in all but name: it is cast as a whole where autocast wants bf16
        with torch.autocast(A.device.type, enabled=False):
            return torch.mm(B, A) * self.scaling

    def unreadable(self) -> str | None:
        return None

    @torch.no_grad()
    def refactorize(self) -> None:
        """Share the singular values of B A evenly between the factors; sharded, every process calls this."""
        A, B = balanced(whole(self.A), whole(self.B))
        for p, factor in ((self.A, A), (self.B, B)):
            local(p).copy_(local(like(factor.to(p.device, p.dtype), p)))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, scaling={self.scaling:g}"
        )


class LowRankExperts(StackOfLayers):
    """Low-rank factors of a stack of experts' matrices: A: (E, r, n), B: (E, m, r)."""

    A: Tensor
    B: Tensor

    def __init__(self, stack: Stack, key: str, layers: Sequence[LowRankLinear]) -> None:
        super().__init__(stack, key, layers)
        self.scaling = layers[0].scaling

    def weight_parts(self) -> tuple[Tensor, ...]:
        return self.A, self.B

    def compose(self, *parts: Tensor) -> Tensor:
        A, B = parts
        with torch.autocast(A.device.type, enabled=False):
            return torch.bmm(B, A) * self.scaling

    @torch.no_grad()
    def refactorize(self) -> None:
        """As `LowRankLinear.refactorize`, for each matrix."""
        pairs = [balanced(A, B) for A, B in zip(whole(self.A), whole(self.B), strict=True)]
        for p, factors in zip((self.A, self.B), zip(*pairs, strict=True), strict=True):
            local(p).copy_(local(like(torch.stack(factors).to(p.device, p.dtype), p)))


def balanced(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Factors with the product of B: (m, r) and A: (r, n), B = U sqrt(S) and A = sqrt(S) V^T of its SVD.

    It costs two QR decompositions and the SVD of an (r, r) matrix, in fp64; B A itself is never made. A vector's sign
    is such that the largest entry of U's is positive, so that all processes and machines agree.
    """
    Q, R = torch.linalg.qr(in_float64(B))
    P, T = torch.linalg.qr(in_float64(A.T))
    return factorized(Q, R @ T.T, P, len(A))


def in_float64(tensor: Tensor) -> Tensor:
    """A tensor in fp64, on the CPU where its device has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def factorized(Q: Tensor, core: Tensor, P: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A: (r, n) and B: (m, r) that share the r largest singular values of Q core P^T, evenly and with fixed signs.

    Args:
        Q, P: (m, k) and (n, k) with orthonormal columns.
        core: (k, k).
        r: number of singular values that are kept.
    """
    U, S, Vh = torch.linalg.svd(core)
    left, right, root = Q @ U[:, :r], Vh[:r] @ P.T, S[:r].sqrt()
    sign = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()
    return (root * sign).T * right, left * sign * root


class LowRankCallback(MethodCallback):
    """Refactorises the layers and resets their moments at the steps that the config names.

    Both happen at the start of step k * every + 1, so that a checkpoint of step k * every holds what was trained. They
    follow from the step alone: a resumed run does what the run that was never stopped would have done.

    Args:
        config: the method's settings.
    """

    def __init__(self, config: "LowRankFactorsConfig") -> None:
        self.config = config
        self.refreshes = bool(config.refactorize_every or config.reset_moments_every)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        def due(every: int) -> bool:
            return every > 0 and state.global_step > 0 and state.global_step % every == 0

        refactorize, reset = due(self.config.refactorize_every), due(self.config.reset_moments_every)
        if not (refactorize or reset):
            return
        reshard(kwargs["model"])
        layers = [module for module in kwargs["model"].modules() if isinstance(module, LowRankLinear | LowRankExperts)]
        with self.refreshing():
            for layer in layers:
                if refactorize:
                    layer.refactorize()
                for p in (layer.A, layer.B) if reset else ():
                    _zero(kwargs["optimizer"].state.get(p, {}))
        if state.is_world_process_zero:
            done = [word for word, is_done in (("refactorised", refactorize), ("moments reset", reset)) if is_done]
            logger.info("%d layers after step %d: %s", len(layers), state.global_step, ", ".join(done))


@torch.no_grad()
def _zero(held: dict[str, Any]) -> None:
    for key in MOMENTS:
        if isinstance(held.get(key), Tensor):
            held[key].zero_()
        elif key in held:
            held[key] = 0


@register
@dataclass
class LowRankFactorsConfig(LowRankConfig):
    """Plain low-rank factors in the place of every target, trained from random values by Trainer's AdamW.

    Layer and initial values are those of OptimAI-Lab/Memory_Efficient_Pretraining (its dropout, 0 there, is left out).
    That code has neither refactorisation nor reset, so they follow the paper's text. A reset zeroes both moments and
    lets the bias correction start anew; with an old step count the first update would be sqrt(10) times too long.
    """

    method: ClassVar[str] = "lowrank"
    label: ClassVar[str] = "Low-rank factors"
    paper: ClassVar[Paper | None] = Paper(
        title="Scalable Parameter and Memory Efficient Pretraining for LLM: Recent Algorithmic Advances and "
        "Benchmarking",
        arxiv="2505.22922",
        authors="Athanasios Glentis, Jiaxiang Li, Qiulin Shang, Andi Han, Ioannis Tsaknakis, Quan Wei, Mingyi Hong",
    )
    replaces_layers: ClassVar[bool] = True
    takes_stacks: ClassVar[bool] = True

    r: int | None = field(default=None, metadata={"help": "Rank of the weights; default hidden_size / 4."})
    alpha: float = field(default=32, metadata={"help": "The factors' product is scaled by alpha / r."})
    refactorize_every: int = field(
        default=0, metadata={"help": "Optimizer steps between two refactorisations by the SVD of B A; 0 for none."}
    )
    reset_moments_every: int = field(
        default=0, metadata={"help": "Optimizer steps between two resets of the factors' Adam moments; 0 for none."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alpha > 0:
            raise ValueError(f"alpha={self.alpha!r}: the scaling's numerator is positive, 32 for example")
        for name in ("refactorize_every", "reset_moments_every"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name}={value!r}: give a whole number of optimizer steps, 0 for never")

    def check_arguments(self, args: TrainingArguments) -> None:
        if self.reset_moments_every and args.optim not in ADAMW:
            raise ValueError(
                f"optim='{plain(args.optim)}' and reset_moments_every={self.reset_moments_every}: the moments that "
                f"are reset are AdamW's; use {' or '.join(ADAMW)}, or reset_moments_every=0"
            )

    def new_layer(self, in_features: int, out_features: int, r: int, **kwargs: Any) -> LowRankLinear:
        return LowRankLinear(in_features, out_features, r, alpha=self.alpha, **kwargs)

    def new_stack(self, stack: Stack, key: str, layers: list[Any]) -> LowRankExperts:
        return LowRankExperts(stack, key, layers)

    def callbacks(self, args: TrainingArguments) -> list[MethodCallback]:
        return [LowRankCallback(self)] if self.refactorize_every or self.reset_moments_every else []

    def state_elements(self, m: int, n: int, r: int) -> int:
        return 2 * r * (m + n)
