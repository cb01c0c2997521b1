"""Which layers of a model a method changes and a metric looks at.

The targets are the linear layers (`Linear`, transformers' `Conv1D`, or what a method put in their place) inside the
model's repeated blocks. Nothing here knows an architecture by its name.
"""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from hf_lowrank.methods.base import ReparameterizedLinear
from hf_lowrank.methods.foreign import base_layer, foreign_weight, is_adapted, is_foreign, is_quantized
from hf_lowrank.sharding import reshard, whole

__all__ = [
    "Target", "dense_copy", "dense_weights", "find_targets", "hidden_size", "linear_layers", "native_weights",
    "target_parameters", "whole_layer",
]  # fmt: skip


@dataclass(frozen=True)
class Target:
    """One target layer with weight W: (m, n) = (rows, cols).

    Attributes:
        name: full module path.
        module: the layer.
        rows, cols: m (out_features) and n (in_features).
        layer: index of the block it is in, None outside of the blocks.
        kind: its path inside the block (`self_attn.q_proj`), the same in every block.
    """

    name: str
    module: nn.Module
    rows: int
    cols: int
    layer: int | None
    kind: str

    @property
    def weight_name(self) -> str:
        """Name of the weight parameter, for a layer that has one."""
        return f"{self.name}.weight"

    def dense_weight(self) -> Tensor:
        """W: (m, n), detached; transposed where the layer stores it so."""
        if isinstance(self.module, ReparameterizedLinear):
            return self.module.dense_weight()
        weight = foreign_weight(self.module, self.name)
        return weight.T if isinstance(base_layer(self.module), Conv1D) else weight


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """(m, n) of a linear layer; None for any other module."""
    module = base_layer(module)
    if isinstance(module, nn.Linear | ReparameterizedLinear):
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):
        n, m = module.weight.shape
        return m, n
    return None


def _blocks(model: nn.Module) -> list[str]:
    """Paths of the outermost module lists that hold linear layers: the repeated blocks."""
    blocks: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") for outer in blocks)
        if isinstance(module, nn.ModuleList) and not inside and any(_shape(m) for m in module.modules()):
            blocks.append(name)
    return blocks


def linear_layers(model: nn.Module) -> list[Target]:
    """Every linear layer of the model, in the order of its modules."""
    blocks = _blocks(model)
    layers: list[Target] = []
    replaced: str | None = None
    for name, module in model.named_modules():
        # a method's layer may hold linear layers of its own, and so may PEFT's
        if replaced is not None and name.startswith(replaced):
            continue
        replaced = f"{name}." if isinstance(module, ReparameterizedLinear) or is_adapted(module) else None
        shape = _shape(module)
        # what PEFT trains a copy of is not used any more
        if shape is None or name.endswith(".original_module"):
            continue
        layer, kind = None, name
        for block in blocks:
            if name.startswith(block + "."):
                index, _, kind = name[len(block) + 1 :].partition(".")
                layer, kind = int(index), kind or type(module).__name__
        layers.append(Target(name, module, *shape, layer, kind))
    return layers


def _matches(name: str, patterns: list[str]) -> bool:
    return any(name == pattern or name.endswith("." + pattern) for pattern in patterns)


def find_targets(model: nn.Module, target_modules: list[str] | str | None = None) -> list[Target]:
    """The target layers of a model.

    Args:
        model: any module; for the default it must have repeated blocks.
        target_modules: names or suffixes, a regular expression for the full path, `"all-linear"` (all but the
            output embeddings or the classification head), or None for every linear layer inside the repeated blocks.

    Raises:
        ValueError: nothing matches, or one of the names matches nothing; the message lists the linear layers.
    """
    layers = linear_layers(model)
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    if target_modules is None:
        targets = [layer for layer in layers if layer.layer is not None]
        wanted = "the repeated blocks"
    elif target_modules == "all-linear":
        # the head of a classifier lies beside the body, and has no output embeddings
        body = getattr(model, "base_model", model)
        beside = set() if head is not None or body is model else set(model.modules()) - set(body.modules())
        targets = [layer for layer in layers if layer.module is not head and layer.module not in beside]
        wanted = "'all-linear'"
    elif isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise ValueError(f"target_modules={target_modules!r} is no regular expression: {error}") from error
        targets = [layer for layer in layers if pattern.fullmatch(layer.name)]
        wanted = f"target_modules={target_modules!r}"
    else:
        unmatched = [name for name in target_modules if not any(_matches(layer.name, [name]) for layer in layers)]
        targets = [] if unmatched else [layer for layer in layers if _matches(layer.name, target_modules)]
        wanted = f"target_modules={unmatched or target_modules!r}"
    if not targets:
        there = ", ".join(dict.fromkeys(layer.kind for layer in layers)) or "none"
        raise ValueError(f"no layer matches {wanted}; the model's linear layers are: {there}")
    return targets


def target_parameters(model: nn.Module, targets: list[Target]) -> dict[int, str]:
    """id -> name, in the model, of the targets' parameters: W, or the factors in its place, but no biases."""
    inside = {id(p) for t in targets for name, p in t.module.named_parameters() if name.rpartition(".")[2] != "bias"}
    return {id(p): name for name, p in model.named_parameters() if id(p) in inside}


def dense_weights(model: nn.Module, target_modules: list[str] | str | None = None) -> Iterator[tuple[Target, Tensor]]:
    """Each target with its dense weight W: (m, n), one at a time, whole even if it is sharded."""
    for target in _readable_targets(model, target_modules):
        yield target, replace(target, module=whole_layer(target.module)).dense_weight()


def _readable_targets(model: nn.Module, target_modules: list[str] | str | None) -> list[Target]:
    """The targets; `ValueError` where layers beside them are quantised so that they do not look like linear ones."""
    reshard(model)
    for name, module in model.named_modules():
        if is_quantized(module) and _shape(module) is None:
            foreign_weight(module, name)
    return find_targets(model, target_modules)


def dense_copy(model: nn.Module) -> nn.Module:
    """A copy of a model with adapters of PEFT's or quantised weights, in which these are plain linear layers.

    Raises:
        ValueError: as for `foreign_weight`.
    """
    dtype = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point and p.dtype.itemsize > 1), None)
    plain = copy.deepcopy(model)
    for target in linear_layers(plain):
        if is_foreign(target.module):
            layer = nn.Linear(target.cols, target.rows, bias=False, device="meta")
            layer.weight = nn.Parameter(target.dense_weight().to(dtype).contiguous())
            layer.bias = base_layer(target.module).bias  # type: ignore[assignment]
            plain.set_submodule(target.name, layer)
    return plain


def native_weights(model: nn.Module, target_modules: list[str] | str | None = None) -> Iterator[tuple[Target, Tensor]]:
    """Each matrix that is trained in the targets' place, one at a time and whole: a method's factors, or W itself.

    A factor's target has the factor's name and shape.
    """
    for target in _readable_targets(model, target_modules):
        layer = whole_layer(target.module)
        if not isinstance(layer, ReparameterizedLinear) and not is_adapted(layer):
            yield target, replace(target, module=layer).dense_weight()
            continue
        for name, p in layer.named_parameters():
            if p.ndim == 2 and not (is_adapted(layer) and name.startswith("base_layer.")):
                names = f"{target.name}.{name}", f"{target.kind}.{name}"
                yield replace(target, name=names[0], kind=names[1], rows=p.shape[0], cols=p.shape[1]), p.detach()


def whole_layer(module: nn.Module) -> nn.Module:
    """The layer, with whole parameters if they are sharded; then every process must call this."""
    if not any(isinstance(p, DTensor) for p in module.parameters()):
        return module
    gathered = copy.copy(module)
    parameters = {
        name: p if p is None else nn.Parameter(whole(p), requires_grad=False) for name, p in module._parameters.items()
    }
    children = {name: c if c is None else whole_layer(c) for name, c in module._modules.items()}
    gathered.__dict__.update(_parameters=parameters, _modules=children)
    return gathered


def hidden_size(model: nn.Module) -> int | None:
    """The hidden size in the model's config, None if it has none."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return getattr(config, "hidden_size", None)
