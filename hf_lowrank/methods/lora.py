"""LoRA (arXiv 2106.09685) through PEFT's layers: W stays as it was, (alpha / r) B A beside it is trained.

Shapes: W: (m, n), A: (r, n), B: (m, r), x: (..., n), y: (..., m).
"""

import math
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, ClassVar

import peft
import torch
import torch.nn.functional as F  # noqa: N812
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.pytorch_utils import Conv1D

from hf_lowrank.experts import Stack
from hf_lowrank.methods.base import LowRankConfig, Paper, ReparameterizedLinear, register, seeded_generator
from hf_lowrank.methods.stacks import ReparameterizedStack
from hf_lowrank.optim.sharding import RowShards
from hf_lowrank.sharding import like as sharded_like
from hf_lowrank.sharding import local

__all__ = ["LoRAConfig", "LoRAExperts", "LoRALinear", "add_product", "own_rows"]

ADAPTER = "default"


def add_product(base: Tensor, left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """base + scaling * left right, summed in fp32 or better and rounded once to the dtype of `base`.

    All three are matrices, or stacks of them.
    """
    dtype = torch.promote_types(base.dtype, torch.float32)
    add = torch.addmm if base.ndim == 2 else torch.baddbmm
    with torch.autocast(base.device.type, enabled=False):
        return add(base.to(dtype), left.to(dtype), right.to(dtype), alpha=scaling).to(base.dtype)


def own_rows(whole: Tensor, like: Tensor, name: str) -> Tensor:
    """The rows of `whole`, or its matrices, that this process holds of `like`: the parameter `name` or its state."""
    return RowShards.of(like, name).local_rows(whole) if like.ndim == 2 else local(sharded_like(whole, like))


class _DroppedProduct(torch.autograd.Function):
    """(x kept / (1 - p)) weight^T, which keeps x and a byte an entry of `kept`, and not the product of the two.

    x is kept by the layers around anyway: without this, adapters with dropout take twice the memory of x each.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kept: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, weight, kept)
        ctx.scale = scale
        return F.linear((x * kept).mul_(scale), weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, kept = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight.to(grad.dtype)).to(x.dtype) * kept * ctx.scale
        if ctx.needs_input_grad[1]:
            dropped = (x * kept * ctx.scale).to(grad.dtype)
            grad_weight = (grad.flatten(0, -2).T @ dropped.flatten(0, -2)).to(weight.dtype)
        return grad_x, grad_weight, None, None


class LoRALinear(PeftLinear, ReparameterizedLinear):  # type: ignore[misc]
    """PEFT's LoRA layer, y = W x + b + (alpha / r) B A dropout(x), as one of this package's layers.

    W is frozen, b trains if it did before. The state dict has PEFT's names: `base_layer.weight`,
    `lora_A.default.weight`, `lora_B.default.weight`.

    What is drawn for the layer depends on its `name`. A and B are in fp32 where W is in half precision, as in PEFT
    (`autocast_adapter_dtype`).
    """

    # PEFT's is the base weight, without the adapters
    weight = ReparameterizedLinear.weight

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        # PEFT takes it from its config, which is one for all layers
        self.fan_in_fan_out = isinstance(base_layer, Conv1D)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's, with less memory: dropout keeps no copy of x, and sums are made in place."""
        if args or kwargs or self.disable_adapters or self.merged or self.active_adapters != [ADAPTER]:
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x)
        x, dropout = self._cast_input_dtype(x, self.A.dtype), self.lora_dropout[ADAPTER]
        if self.training and isinstance(dropout, nn.Dropout) and dropout.p > 0:
            # drawn and rounded as nn.Dropout does it on a CPU
            kept = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout.p)
            scale = torch.ones((), dtype=x.dtype).div_(1 - dropout.p).item()
            inside = _DroppedProduct.apply(x, self.A, kept, scale)
        else:
            inside = self.lora_A[ADAPTER](x)
        return result.add_(self.lora_B[ADAPTER](inside).mul_(self.factor))

    @property
    def A(self) -> Tensor:
        """The parameter A: (r, n)."""
        return self.lora_A[ADAPTER].get_parameter("weight")

    @property
    def B(self) -> Tensor:
        """The parameter B: (m, r)."""
        return self.lora_B[ADAPTER].get_parameter("weight")

    @property
    def factor(self) -> float:
        """alpha / r."""
        return float(self.scaling[ADAPTER])

    @property
    def base_weight(self) -> Tensor:
        """The frozen parameter W: (m, n), transposed in a `Conv1D`."""
        return self.base_layer.get_parameter("weight")

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        return self.compose(*self.weight_parts())

    def weight_parts(self) -> tuple[Tensor, ...]:
        return self.base_weight, self.A, self.B

    def compose(self, *parts: Tensor) -> Tensor:
        weight, A, B = parts
        return add_product(weight.T if self.fan_in_fan_out else weight, B, A, self.factor)

    def unreadable(self) -> str | None:
        dropped = self.training and isinstance(self.lora_dropout[ADAPTER], nn.Dropout)
        return "where no dropout reaches the adapters' input (dropout=0 is served)" if dropped else None

    def keep_adapters_precise(self) -> None:
        """A and B in fp32 where W is in half precision, in which a step of Adam at a small rate would be lost."""
        if self.base_weight.dtype.itemsize < 4:
            self.lora_A.float()
            self.lora_B.float()

    def draw(self, generator: torch.Generator) -> None:
        draw_adapters(self, generator)


class LoRAExperts(ReparameterizedStack):
    """LoRA on a stack of experts' matrices, W + (alpha / r) B A for each, with A: (E, r, n) and B: (E, m, r).

    W is frozen. The sum is rounded to W's dtype, as PEFT does it for such parameters (`target_parameters`): experts
    take a parameter, so that no input of theirs can be dropped.

    Args:
        weight: the parameter, as it is stored.
        stack: its layout.
        key: its name in the module of experts.
        r: rank of every matrix.
        alpha: the product is scaled by alpha / r.
    """

    def __init__(self, weight: nn.Parameter, stack: Stack, key: str, r: int, alpha: float) -> None:
        super().__init__(stack, key)
        self.r, self.factor = r, alpha / r
        self.base_weight = weight
        self.stored_transposed = {"base_weight": stack.transposed}
        kwargs: Any = dict(dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
        self.A = nn.Parameter(torch.empty(stack.count, r, stack.cols, **kwargs))
        self.B = nn.Parameter(torch.empty(stack.count, stack.rows, r, **kwargs))

    def weight_parts(self) -> tuple[Tensor, ...]:
        return self.base_weight, self.A, self.B

    def compose(self, *parts: Tensor) -> Tensor:
        weight, A, B = parts
        return add_product(weight.mT if self.fan_in_fan_out else weight, B, A, self.factor)

    def draw(self, generator: torch.Generator) -> None:
        draw_adapters(self, generator)


@torch.no_grad()
def draw_adapters(layer: LoRALinear | LoRAExperts, generator: torch.Generator) -> None:
    """A Kaiming-uniform (a = sqrt 5), B zero; the values do not depend on device, dtype or number of processes."""
    # with fan-in n that is uniform in these bounds
    bound = 1 / math.sqrt(layer.in_features)
    A = torch.empty(layer.A.shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)
    local(layer.A).copy_(own_rows(A, layer.A, f"{layer.name}.A"))
    local(layer.B).zero_()


@register
@dataclass
class LoRAConfig(LowRankConfig):
    """LoRA on every target with PEFT's layers; embeddings, norms, head and biases train as they are.

    A starts Kaiming-uniform and B at zero (Section 4.1; PEFT's and the official code's choice where the paper draws A
    from a Gaussian), so the model starts as the function it was. What was frozen before stays frozen. On a model in
    half precision the adapters are in fp32.
    """

    method: ClassVar[str] = "lora"
    label: ClassVar[str] = "LoRA"
    paper: ClassVar[Paper | None] = Paper(
        title="LoRA: Low-Rank Adaptation of Large Language Models",
        arxiv="2106.09685",
        authors="Edward J. Hu, Yelong Shen, Phillip Wallis, Zeyuan Allen-Zhu, Yuanzhi Li, Shean Wang, Lu Wang, "
        "Weizhu Chen",
    )
    replaces_layers: ClassVar[bool] = True
    takes_stacks: ClassVar[bool] = True
    keeps_weights: ClassVar[bool] = True

    r: int | None = field(default=None, metadata={"help": "Rank of the adapters; default hidden_size / 4."})
    alpha: float = field(default=32, metadata={"help": "The adapters' product is scaled by alpha / r."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapters' input while training."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alpha > 0:
            raise ValueError(f"alpha={self.alpha!r}: the scaling's numerator is positive, 32 for example")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r}: the share that is dropped lies in [0, 1), 0.1 for example")

    def replace_layers(self, model: nn.Module, ranks: dict[str, int], seed: int) -> None:
        _check_weights(model, list(ranks))
        trained = [(p, p.requires_grad) for p in model.parameters()]
        common = Counter(ranks.values()).most_common(1)[0][0]
        config = peft.LoraConfig(
            r=common,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            # PEFT takes names in a list for suffixes as well; both patterns here match whole names
            target_modules="|".join(map(re.escape, ranks)),
            rank_pattern={f"^{re.escape(name)}": r for name, r in ranks.items() if r != common},
        )
        config._register_custom_module({nn.Linear: LoRALinear, Conv1D: LoRALinear})
        # PEFT refuses Mamba's layers by the model's type, because a model that reads their weight would read the base
        # weight, which is not so here; where the type has experts it takes the names for those of experts, and leaves
        # the layers alone; and it would note on the model that its checkpoints are adapters
        bare = nn.Module()
        bare._modules = model._modules
        # PEFT draws values of its own, which are not used
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            peft.inject_adapter_in_model(config, bare, ADAPTER)
        for p, trains in trained:
            p.requires_grad_(trains)
        for name in ranks:
            layer = model.get_submodule(name)
            assert isinstance(layer, LoRALinear), name
            layer.name = name
            layer.keep_adapters_precise()
            layer.base_weight.requires_grad_(False)
            layer.train(layer.base_layer.training)
            layer.draw(seeded_generator(seed, name))

    def replace_stack(self, weight: nn.Parameter, stack: Stack, r: int, key: str, name: str, seed: int) -> LoRAExperts:
        if self.dropout > 0:
            raise ValueError(
                f"dropout={self.dropout:g}: the experts of {name} are one parameter, whose adapters' input cannot be "
                "dropped; set dropout=0, or leave the experts full-rank by naming the other layers in target_modules"
            )
        _check_floating(weight, name)
        layer = LoRAExperts(weight, stack, key, r, self.alpha)
        layer.name = name
        layer.base_weight.requires_grad_(False)
        layer.draw(seeded_generator(seed, name))
        return layer

    def before_training(self, model: nn.Module, args: TrainingArguments) -> None:
        """`ValueError` for FSDP where what trains is in several dtypes: FSDP shards parameters of one."""
        trained = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad})
        sharded = args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        mixed = args.bf16 or args.fp16 or os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no"
        if len(trained) > 1 and sharded and not mixed:
            raise ValueError(
                f"FSDP shards parameters of one dtype, and here {' and '.join(trained)} train, the adapters in "
                "float32: set bf16=True, with which accelerate trains all in float32, or load the model in float32"
            )

    def state_elements(self, m: int, n: int, r: int) -> int:
        return 2 * r * (m + n)


def _check_weights(model: nn.Module, names: list[str]) -> None:
    """`ValueError` for quantised weights, which cannot be a base that is merged into."""
    for name in names:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        _check_floating(weight, name)


def _check_floating(weight: Tensor, name: str) -> None:
    if not weight.is_floating_point():
        raise ValueError(f"the weight of layer {name} is {weight.dtype}: load the model without quantisation")
