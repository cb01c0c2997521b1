"""What a method keeps in the place of a stack of experts' matrices, which transformers 5 has as one parameter.

Shapes: a stack W: (E, m, n), one matrix an expert; stored as (E, n, m) where it is transposed.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowrank.experts import Stack
from hf_lowrank.methods.base import ReparameterizedLinear

__all__ = ["ReparameterizedStack", "StackOfLayers", "layer_path", "put_stack"]

PREFIX = "lowrank_"


class ReparameterizedStack(ReparameterizedLinear):
    """A layer's counterpart for the matrices of all experts; whatever it keeps has E as its first dimension.

    It is a module beside the parameter's place, `experts.lowrank_down_proj` for `experts.down_proj`: a name that no
    rule for saving experts one by one takes for the parameter's. While the experts compute, their attribute
    `down_proj` is W, made once a forward pass.

    Args:
        stack: of the matrices that it stands for.
        key: the parameter's name in the module of experts.
    """

    def __init__(self, stack: Stack, key: str) -> None:
        super().__init__()
        self.stack, self.key = stack, key
        self.in_features, self.out_features = stack.cols, stack.rows
        self.fan_in_fan_out = stack.transposed

    @abstractmethod
    def weight_parts(self) -> tuple[Tensor, ...]:
        """What `compose` makes W of: all that the layer keeps, buffers as well."""

    @abstractmethod
    def compose(self, *parts: Tensor) -> Tensor:
        """W: (E, m, n) of whole parts, or as many matrices of it as the parts are of; differentiable."""

    @property
    def weight(self) -> Tensor:
        """W as the parameter was stored, differentiable."""
        W = self.compose(*self.weight_parts())
        return W.mT.contiguous() if self.fan_in_fan_out else W

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        return self.compose(*self.weight_parts())

    @torch.no_grad()
    def dense_matrix(self, index: int) -> Tensor:
        """One expert's matrix: (m, n), detached."""
        return self.compose(*(part[index : index + 1] for part in self.weight_parts()))[0]

    def unreadable(self) -> str | None:
        return None

    def dense_state(self) -> dict[str, Tensor]:
        """The stack under its name in the module of experts, beside which the layer is."""
        return {self.key: self.weight.detach()}

    def dense_place(self, path: str) -> str:
        return path.rpartition(".")[0]

    def extra_repr(self) -> str:
        return f"experts={self.stack.count}, in_features={self.in_features}, out_features={self.out_features}"


class StackOfLayers(ReparameterizedStack):
    """The parameters and buffers of E of a method's layers, each as one of its own with a first dimension of E.

    Args:
        stack, key: see `ReparameterizedStack`.
        layers: one an expert, without biases; all of one kind and size.
    """

    def __init__(self, stack: Stack, key: str, layers: Sequence[ReparameterizedLinear]) -> None:
        super().__init__(stack, key)
        for name, _ in layers[0].named_parameters():
            values = torch.stack([layer.get_parameter(name).detach() for layer in layers])
            self.register_parameter(name, nn.Parameter(values))
        for name, _ in layers[0].named_buffers():
            self.register_buffer(name, torch.stack([layer.get_buffer(name) for layer in layers]))


def layer_path(weight_name: str) -> str:
    """Where the layer is that stands for the stack of this name."""
    holder, _, key = weight_name.rpartition(".")
    return f"{holder}.{PREFIX}{key}" if holder else PREFIX + key


def put_stack(experts: nn.Module, layer: ReparameterizedStack, name: str) -> None:
    """Put a target's layer into a module of experts, which then no longer has the parameter of the layer's key."""
    layer.name = name
    layer.train(experts.training)
    delattr(experts, layer.key)
    experts.add_module(PREFIX + layer.key, layer)
    # transformers draws values only for modules that it has not marked so, and would look for the parameter
    experts._is_hf_initialized = True  # type: ignore[assignment]
    if _serve not in experts._forward_pre_hooks.values():
        experts.register_forward_pre_hook(_serve)
        experts.register_forward_hook(_withdraw, always_call=True)


def _own_layers(experts: nn.Module) -> list[ReparameterizedStack]:
    return [module for module in experts.children() if isinstance(module, ReparameterizedStack)]


def _serve(experts: nn.Module, inputs: Any) -> None:
    for layer in _own_layers(experts):
        experts.__dict__[layer.key] = layer.weight


def _withdraw(experts: nn.Module, inputs: Any, output: Any) -> None:
    for layer in _own_layers(experts):
        experts.__dict__.pop(layer.key, None)
