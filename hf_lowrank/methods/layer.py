"""What the layers that methods put in a linear layer's place share.

Shapes: W: (m, n) = (out_features, in_features), the dense weight.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from hf_lowrank.methods.derived_weight import derive

__all__ = ["ReparameterizedLinear"]


class ReparameterizedLinear(nn.Module, ABC):
    """A layer that stands in a linear layer's place and keeps something other than W: (m, n).

    Attributes:
        has_dense_form: whether a matrix computes the same function; if none does, `dense_weight` is the product
            of the factors (the layer linearised), and `dense_state` an error.
        in_features, out_features: n and m.
        fan_in_fan_out: True if the layer it replaced stores W transposed (`Conv1D`), so that the dense form of
            the model gets its weight the way plain transformers expects it.
        name: path of the layer in the model that it was put into.
    """

    has_dense_form: ClassVar[bool] = True

    in_features: int
    out_features: int
    fan_in_fan_out: bool
    name: str = ""

    @abstractmethod
    def dense_weight(self) -> Tensor:
        """The matrix W: (m, n) this layer multiplies with, detached from the graph."""

    @property
    def weight(self) -> Tensor:
        """W as the replaced layer stores it, for models that read it instead of calling the layer.

        Gradients flow to the layer's parameters. Reading its shape, dtype or device costs nothing.

        Raises:
            UncalledLayerError: when an operation takes it, if that is not what calling the layer computes.
        """
        return derive(self)

    def weight_parts(self) -> tuple[Tensor, ...]:
        """What `compose` makes W of; the first one has W's dtype and device."""
        return tuple(self.parameters())

    def compose(self, *parts: Tensor) -> Tensor:
        """W: (m, n), differentiable; for layers that are not `unreadable`."""
        raise NotImplementedError(f"{type(self).__name__} defines no compose")

    def unreadable(self) -> str | None:
        """Why a product with `weight` is not what calling the layer computes, as a clause; None if it is."""
        return f"and no matrix computes what a {type(self).__name__} does"

    def dense_state(self) -> dict[str, Tensor]:
        """State of the linear layer that computes the same function, under that layer's own names."""
        if not self.has_dense_form:
            raise ValueError(f"{type(self).__name__} has no dense form: it is no linear function of its input")
        weight = self.dense_weight()
        state = {"weight": weight.T.contiguous() if self.fan_in_fan_out else weight}
        bias = getattr(self, "bias", None)
        if bias is not None:
            state["bias"] = bias.detach()
        return state

    def dense_place(self, path: str) -> str:
        """Where the module is in the dense model that `dense_state` belongs to; `path` is the layer's own."""
        return path

    def fixed_structure(self) -> dict[str, Tensor]:
        """Buffers that are drawn once and never trained, by name; two layers that differ here are not the same."""
        return {}
