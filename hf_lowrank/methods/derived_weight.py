"""The weight of a layer that keeps something else, for models that read the weight where others call the layer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["Composed", "DerivedWeight", "UncalledLayerError", "collect_unserved", "derive"]

# what a kernel takes that computes with addresses, and what would put other numbers in W's place
MEMORY = {Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage, Tensor.data.__set__}  # type: ignore[attr-defined]

# what writes to its first argument; the names of others end in an underscore
IN_PLACE = {"__setitem__", *(f"__i{name}__" for name in (
    "add", "and", "div", "floordiv", "lshift", "mod", "mul", "or", "pow", "rshift", "sub", "truediv", "xor",
))}  # fmt: skip

# what gives a part of W, or W in another shape, that one could write to
_VIEWS = (
    "__getitem__ chunk diagonal expand flatten movedim narrow permute ravel reshape select split squeeze swapaxes t "
    "tensor_split transpose unbind unflatten unsqueeze view view_as"
)
VIEWS = {getattr(owner, name) for owner in (Tensor, torch) for name in _VIEWS.split() if hasattr(owner, name)}
VIEWS |= {Tensor.T.__get__, Tensor.mT.__get__, Tensor.data.__get__, Tensor.detach}  # type: ignore[attr-defined]


class Composed(Protocol):
    """What is needed of a layer; see `hf_lowrank.methods.base.ReparameterizedLinear`."""

    name: str
    in_features: int
    out_features: int
    fan_in_fan_out: bool

    def dense_weight(self) -> Tensor: ...

    def weight_parts(self) -> tuple[Tensor, ...]: ...

    def compose(self, *parts: Tensor) -> Tensor: ...

    def unreadable(self) -> str | None: ...


class UncalledLayerError(ValueError):
    """A model uses the weight of layers without calling them, in a way that they cannot serve.

    Args:
        use: what the model does; `{}` stands for the layers' names.
        layers: one or more.
        way_out: what to do about it.
    """

    def __init__(self, use: str, layers: Sequence[Composed], way_out: str = "") -> None:
        names = [layer.name or type(layer).__name__ for layer in layers]
        text = "layer " + names[0] if len(names) == 1 else "layers " + ", ".join(names[:8])
        if len(names) > 8:
            text += f" and {len(names) - 8} more"
        super().__init__(f"the model {use.format(text)}: leave such layers out with target_modules{way_out}")


_UNSERVED: ContextVar[list[Composed] | None] = ContextVar("_UNSERVED", default=None)


@contextmanager
def collect_unserved() -> Iterator[list[Composed]]:
    """Inside, a read that cannot be served gives `dense_weight` and notes the layer in this list; it is no error."""
    layers: list[Composed] = []
    token = _UNSERVED.set(layers)
    try:
        yield layers
    finally:
        _UNSERVED.reset(token)


def derive(layer: Composed) -> Tensor:
    """W as the replaced layer stores it, (m, n) or transposed; gradients flow to the layer's `weight_parts`.

    Shape, dtype and device cost nothing: W is made when an operation takes it, and each time anew, so that no W
    outlives the operation.
    """
    parts = layer.weight_parts()
    # a compiler leaves out what is not used
    if torch.compiler.is_compiling() and layer.unreadable() is None:
        return _stored(layer, parts)
    weight: Tensor = _Derive.apply(layer, *parts)
    return weight


def _stored(layer: Composed, parts: tuple[Tensor, ...]) -> Tensor:
    reason, unserved = layer.unreadable(), _UNSERVED.get()
    if reason is None:
        W = layer.compose(*parts)
    elif unserved is None:
        raise UncalledLayerError(f"computes with the weight of {{}} without calling the layer, {reason}", [layer])
    else:
        unserved.append(layer)
        W = layer.dense_weight()
    return W.T.contiguous() if layer.fan_in_fan_out else W


class DerivedWeight(Tensor):
    """A tensor without storage that stands for a layer's W.

    Every operation gets W itself. Writing to it is an error, since the layer keeps no W.
    """

    layer: Composed
    parts: tuple[Tensor, ...]
    # transformers' initialisation leaves it alone
    _is_hf_initialized = True

    @staticmethod
    def __new__(cls, layer: Composed, parts: tuple[Tensor, ...]) -> "DerivedWeight":
        m, n = layer.out_features, layer.in_features
        shape = (n, m) if layer.fan_in_fan_out else (m, n)
        weight: DerivedWeight = Tensor._make_wrapper_subclass(cls, shape, dtype=parts[0].dtype, device=parts[0].device)
        weight.layer, weight.parts = layer, parts
        return weight

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DerivedWeight(of={self.layer.name or type(self.layer).__name__}, shape={tuple(self.shape)})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in MEMORY:
            weight = next(value for value in args if isinstance(value, cls))
            raise UncalledLayerError("takes the memory of the weight of {}, which has none", [weight.layer])
        # torch's fused paths (nn.TransformerEncoder, nn.MultiheadAttention) are not taken with a tensor that has such
        # a method, and call the layers instead
        layer = next((v.layer for v in (*args, *(kwargs or {}).values()) if isinstance(v, cls)), None)
        if layer is None:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return _watched(func, args, kwargs, layer)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default:
            return cls(args[0].layer, args[0].parts)
        for place, argument in enumerate(func._schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            written = tree_leaves(value) if argument.alias_info is not None and argument.alias_info.is_write else []
            if lost := [part for part in written if isinstance(part, cls)]:
                raise UncalledLayerError("writes to the weight of {}, which has none", [lost[0].layer])
        with torch.no_grad():
            args, kwargs = tree_map(lambda x: _stored(x.layer, x.parts) if isinstance(x, cls) else x, (args, kwargs))
            return func(*args, **kwargs)


class DerivedView(Tensor):
    """A part of a layer's W, or all of it in another shape: a copy, so that writing to it is an error as well."""

    layer: Composed

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, cls)]
        return _watched(func, args, kwargs, views[0].layer if views else None)


def _watched(func: Any, args: Any, kwargs: Any, layer: Composed | None) -> Any:
    """What a function gives; `UncalledLayerError` where it writes to W, or a part of it, that it would not change."""
    kwargs, name = kwargs or {}, getattr(func, "__name__", "")
    in_place = name in IN_PLACE or kwargs.get("inplace") is True or name[-1:] == "_" != name[-2:-1]
    first = [*args, *kwargs.values()][:1] if in_place else []
    # torch._foreach_mul_ and its like take lists
    written = tree_leaves([kwargs.get("out"), first])
    lost = [value for value in written if isinstance(value, DerivedWeight | DerivedView)]
    if lost:
        raise UncalledLayerError("writes to the weight of {}, which has none", [lost[0].layer])
    with torch._C.DisableTorchFunctionSubclass():
        result = func(*args, **kwargs)
    if layer is None or func not in VIEWS:
        return result
    return tuple(_view(part, layer) for part in result) if isinstance(result, tuple | list) else _view(result, layer)


def _view(tensor: Any, layer: Composed) -> Any:
    if type(tensor) is not Tensor:
        return tensor
    view = tensor.as_subclass(DerivedView)
    view.layer = layer
    return view


class _Derive(torch.autograd.Function):
    """(layer, parts) -> W without storage; the backward pass goes through `compose`, and can be differentiated."""

    @staticmethod
    def forward(layer: Composed, *parts: Tensor) -> Tensor:
        return DerivedWeight(layer, parts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.layer = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        parts = ctx.saved_tensors
        again = torch.is_grad_enabled()
        if not again:
            parts = tuple(part.detach().requires_grad_(part.requires_grad) for part in parts)
        with torch.enable_grad():
            W = _stored(ctx.layer, parts)
        wanted = [part for part, needed in zip(parts, ctx.needs_input_grad[1:], strict=True) if needed]
        gradients = iter(torch.autograd.grad(W, wanted, grad_outputs[0], create_graph=again))
        return None, *(next(gradients) if needed else None for needed in ctx.needs_input_grad[1:])
