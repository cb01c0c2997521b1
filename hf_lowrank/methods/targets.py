"""Which layers of a model a method changes and a metric looks at.

The targets are the linear layers (`Linear`, transformers' `Conv1D`, or what a method put in their place) and the
stacks of experts' matrices inside the model's repeated blocks. Nothing here knows an architecture by its name.
"""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from hf_lowrank.experts import Stack, stacks_in
from hf_lowrank.methods.base import METHODS, LowRankConfig, ReparameterizedLinear
from hf_lowrank.methods.foreign import base_layer, foreign_weight, is_adapted, is_foreign, is_quantized
from hf_lowrank.methods.stacks import ReparameterizedStack
from hf_lowrank.sharding import reshard, whole

__all__ = [
    "Target", "blocks_of", "dense_copy", "dense_weights", "find_targets", "hidden_size", "is_router", "linear_layers",
    "method_targets", "native_weights", "refuse_shared", "target_parameters", "whole_layer",
]  # fmt: skip


@dataclass(frozen=True)
class Target:
    """One target layer with weight W: (m, n) = (rows, cols), or a stack of such matrices, one an expert.

    Attributes:
        name: full path: of the module, or of the parameter that is a stack (`model.layers.0.mlp.experts.down_proj`).
        module: the layer, or the one that holds the stack.
        rows, cols: m (out_features) and n (in_features).
        layer: index of the block it is in, None outside of the blocks.
        kind: its path inside the block (`self_attn.q_proj`), the same in every block.
        weight_name: name of the weight parameter, for a layer that has one.
        stack: of a stack's matrices.
        index: which matrix of the stack this is; None for all of it.
    """

    name: str
    module: nn.Module
    rows: int
    cols: int
    layer: int | None
    kind: str
    weight_name: str
    stack: Stack | None = None
    index: int | None = None

    @property
    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Name in the module -> parameter: of the layer, or the stack alone."""
        name = self.weight_name.rpartition(".")[2]
        own = dict(self.module.named_parameters())
        whole = self.stack is None or isinstance(self.module, ReparameterizedStack)
        return own if whole else {name: own[name]}

    @property
    def trains(self) -> bool:
        """Whether all of these but a bias train."""
        return all(p.requires_grad for name, p in self.own_parameters.items() if name.rpartition(".")[2] != "bias")

    @property
    def trained_names(self) -> list[str]:
        """Names in the model of what an optimizer trains in W's place: the weight itself, or a layer's factors."""
        if not isinstance(self.module, ReparameterizedLinear):
            return [self.weight_name]
        return [f"{self.name}.{name}" for name in self.own_parameters if name.rpartition(".")[2] != "bias"]

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Shape of the matrix as it lies in memory, and as the optimizer sees it."""
        transposed = isinstance(self.module, Conv1D) if self.stack is None else self.stack.transposed
        return (self.cols, self.rows) if transposed else (self.rows, self.cols)

    def matrices(self) -> "list[Target]":
        """The target itself, or each matrix of a stack as one: `model.layers.0.mlp.experts.down_proj[3]`."""
        if self.stack is None:
            return [self]
        return [
            replace(self, name=f"{self.name}[{i}]", kind=f"{self.kind}[{i}]", index=i) for i in range(self.stack.count)
        ]

    def dense_weight(self) -> Tensor:
        """W: (m, n), detached; transposed where the layer stores it so. Of a stack, one of its `matrices`."""
        if self.stack is not None:
            assert self.index is not None, f"{self.name} is a stack"
            if isinstance(self.module, ReparameterizedStack):
                return self.module.dense_matrix(self.index)
            matrix = self.module.get_parameter(self.weight_name.rpartition(".")[2])[self.index].detach()
            return matrix.T if self.stack.transposed else matrix
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


def blocks_of(model: nn.Module) -> list[str]:
    """Paths of the outermost module lists that hold linear layers: the repeated blocks."""
    blocks: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") for outer in blocks)
        if isinstance(module, nn.ModuleList) and not inside and any(_shape(m) for m in module.modules()):
            blocks.append(name)
    return blocks


def linear_layers(model: nn.Module) -> list[Target]:
    """Every linear layer and stack of experts' matrices of the model, in the order of its modules."""
    blocks = blocks_of(model)
    layers: list[Target] = []

    def place(name: str, bare: str) -> tuple[int | None, str]:
        """The index of the block that a layer is in, and its path there; `bare` for a block that is the layer."""
        layer, kind = None, name
        for block in blocks:
            if name.startswith(block + "."):
                index, _, kind = name[len(block) + 1 :].partition(".")
                layer, kind = int(index), kind or bare
        return layer, kind

    replaced: str | None = None
    for name, module in model.named_modules():
        # a method's layer may hold linear layers of its own, and so may PEFT's
        if replaced is not None and name.startswith(replaced):
            continue
        replaced = f"{name}." if isinstance(module, ReparameterizedLinear) or is_adapted(module) else None
        if isinstance(module, ReparameterizedStack):
            holder, key = name.rpartition(".")[0], module.key
            path = holder if key == "weight" else f"{holder}.{key}"
            sizes = module.stack.rows, module.stack.cols
            layers.append(Target(path, module, *sizes, *place(path, key), f"{name}.weight", module.stack))
            continue
        for key, stack in stacks_in(module, name).items():
            path = name if key == "weight" else f"{name}.{key}"
            where = place(path, key)
            layers.append(Target(path, module, stack.rows, stack.cols, *where, f"{name}.{key}", stack))
        shape = _shape(module)
        # what PEFT trains a copy of is not used any more
        if shape is None or name.endswith(".original_module"):
            continue
        layers.append(Target(name, module, *shape, *place(name, type(module).__name__), f"{name}.weight"))
    return layers


def is_router(target: Target) -> bool:
    """Whether a layer of a block chooses experts, or weighs an expert or the like by a single number.

    Such a layer is small, a rank hardly fits it, and no method's paper projects it. It is named `router`, or `gate`
    with fewer outputs than inputs; a layer with a single row or column is a vector.
    """
    parts = target.kind.split(".")
    named = any(part == "router" or part.endswith("_router") for part in parts)
    gate = "gate" in parts and target.rows < target.cols
    return target.layer is not None and target.stack is None and (named or gate or min(target.rows, target.cols) == 1)


def _matches(name: str, patterns: list[str]) -> bool:
    return any(name == pattern or name.endswith("." + pattern) for pattern in patterns)


def find_targets(model: nn.Module, target_modules: list[str] | str | None = None) -> list[Target]:
    """The target layers of a model.

    Args:
        model: any module; for the default it must have repeated blocks.
        target_modules: names or suffixes, a regular expression for the full path, `"all-linear"` (all but the
            output embeddings, the classification head and routers), or None for every linear layer and stack of
            experts' matrices inside the repeated blocks but routers.

    Raises:
        ValueError: nothing matches, or one of the names matches nothing; the message lists the linear layers.
    """
    layers = linear_layers(model)
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    if target_modules is None:
        targets = [layer for layer in layers if layer.layer is not None and not is_router(layer)]
        wanted = "the repeated blocks"
    elif target_modules == "all-linear":
        # the head of a classifier lies beside the body, and has no output embeddings
        body = getattr(model, "base_model", model)
        beside = set() if head is not None or body is model else set(model.modules()) - set(body.modules())
        targets = [layer for layer in layers if layer.module is not head and layer.module not in beside]
        targets = [layer for layer in targets if not is_router(layer)]
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


def method_targets(model: nn.Module, config: LowRankConfig) -> list[Target]:
    """The targets that a method changes; some leave stacks of experts' matrices as they are.

    Raises:
        ValueError: as for `find_targets`, or one of the names matches nothing but such stacks.
    """
    names = config.target_modules
    targets = find_targets(model, names)
    if config.takes_stacks:
        return targets
    layers = [target for target in targets if target.stack is None]
    unserved = (
        [] if not isinstance(names, list) else [n for n in names if not any(_matches(t.name, [n]) for t in layers)]
    )
    if unserved or not layers:
        raise ValueError(
            f"target_modules={unserved or names!r} matches only parameters that hold the experts of a layer as one "
            f"stack, {targets[0].name} for one, and {config.label} takes linear layers alone: leave them out, or "
            f"train with {', '.join(c.label for c in METHODS.values() if c.takes_stacks)}, which take them"
        )
    return layers


def target_parameters(model: nn.Module, targets: list[Target]) -> dict[int, str]:
    """id -> name, in the model, of the targets' parameters: W, or the factors in its place, but no biases."""
    inside = {id(p) for t in targets for name, p in t.own_parameters.items() if name.rpartition(".")[2] != "bias"}
    return {id(p): name for name, p in model.named_parameters() if id(p) in inside}


def dense_weights(model: nn.Module, target_modules: list[str] | str | None = None) -> Iterator[tuple[Target, Tensor]]:
    """Each target with its dense weight W: (m, n), whole even if it is sharded; one at a time, in a stack as well."""
    for target in _readable_targets(model, target_modules):
        gathered = replace(target, module=whole_layer(target.module))
        for matrix in gathered.matrices():
            yield replace(matrix, module=target.module), matrix.dense_weight()


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
            for matrix in replace(target, module=layer).matrices():
                yield replace(matrix, module=target.module), matrix.dense_weight()
            continue
        for name, p in layer.named_parameters():
            if p.ndim != (2 if target.stack is None else 3) or (is_adapted(layer) and name.startswith("base_layer.")):
                continue
            factors = {name: p} if target.stack is None else {f"{name}[{i}]": p[i] for i in range(len(p))}
            for key, factor in factors.items():
                (rows, cols), names = factor.shape, (f"{target.name}.{key}", f"{target.kind}.{key}")
                yield replace(target, name=names[0], kind=names[1], rows=rows, cols=cols), factor.detach()


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


def refuse_shared(model: nn.Module, targets: list[Target], label: str) -> None:
    """Raise `ValueError` for a target whose weight another module uses as well."""
    users: dict[int, set[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(p), set()).add(name.rpartition(".")[0])
    for target in targets:
        holder, _, key = target.weight_name.rpartition(".")
        others = users.get(id(getattr(target.module, key, None)), set()) - {holder}
        if others:
            raise ValueError(
                f"layer {target.name} shares its weight with {min(others)}, which {label} would leave behind: leave "
                "the layer out with target_modules, or untie the two"
            )
