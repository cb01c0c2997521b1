"""Experts that a layer keeps in one parameter, as transformers 5 does: a stack (E, m, n), one matrix an expert.

Nothing here knows an architecture by its name: a stack is a parameter of three dimensions in a module of experts.
"""

from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["Stack", "stacks", "stacks_in"]


@dataclass(frozen=True)
class Stack:
    """A stack of matrices W: (m, n) = (out_features, in_features).

    Attributes:
        count: E.
        rows, cols: m and n.
        transposed: whether it is stored as (E, n, m).
    """

    count: int
    rows: int
    cols: int
    transposed: bool


def stacks(model: nn.Module) -> dict[str, Stack]:
    """Parameter name -> stack, for the whole model."""
    return {
        f"{path}.{name}" if path else name: stack
        for path, module in model.named_modules()
        for name, stack in stacks_in(module, path).items()
    }


def stacks_in(module: nn.Module, path: str) -> dict[str, Stack]:
    """Parameter name -> stack, for the parameters of a module itself.

    Args:
        module: of any kind; experts have `num_experts`, or say so by their class or their place.
        path: of the module in its model.
    """
    own = {name: p for name, p in module._parameters.items() if p is not None and _holds_matrices(p)}
    named = "expert" in f"{path} {type(module).__name__}".lower()
    if not own or isinstance(module, nn.modules.conv._ConvNd) or not (named or hasattr(module, "num_experts")):
        return {}
    layouts = [_is_transposed(module, name, p) for name, p in own.items()]
    # where one parameter's shape does not tell, another's does
    transposed = next((layout for layout in layouts if layout is not None), False)
    # a method's layer keeps parameters of several layouts
    declared: dict[str, bool] = getattr(module, "stored_transposed", {})
    found = {}
    for name, p in own.items():
        flipped = declared.get(name, transposed)
        rows, cols = reversed(p.shape[1:]) if flipped else p.shape[1:]
        found[name] = Stack(p.shape[0], rows, cols, flipped)
    return found


def _holds_matrices(p: Tensor) -> bool:
    return p.ndim == 3 and min(p.shape[1:]) > 1 and p.is_floating_point() and p.dtype.itemsize > 1


def _is_transposed(module: nn.Module, name: str, p: Tensor) -> bool | None:
    """Whether the parameter is stored as (E, in, out); None if nothing tells."""
    declared = getattr(module, "is_transposed", None)
    if declared is not None:
        return bool(declared)
    hidden = getattr(module, "hidden_size", None) or getattr(module, "hidden_dim", None)
    if hidden not in p.shape[1:] or p.shape[1] == p.shape[2]:
        return None
    # the last of an expert's layers writes the hidden states, and the others read them
    writes = name.startswith(("down", "w2", "output"))
    return bool(p.shape[2 if writes else 1] == hidden)
