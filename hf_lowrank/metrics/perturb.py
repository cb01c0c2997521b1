"""Set parameters to other values for a while and restore them bit for bit, also after an exception."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hf_lowrank.sharding import is_dtensor, local, reshard

__all__ = [
    "apart", "check_names", "each_point", "evaluating", "is_conv1d", "kept", "parameters_of", "transposed_weights",
]  # fmt: skip

T = TypeVar("T")


def is_conv1d(layer: object) -> bool:
    """Whether a layer is GPT-2's, with its weight transposed; a model that has one has imported transformers."""
    return isinstance(layer, getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", ()))


def transposed_weights(model: nn.Module) -> set[str]:
    """Names of the parameters that are stored as (in, out), so that their outputs are columns."""
    return {f"{name}.weight" if name else "weight" for name, module in model.named_modules() if is_conv1d(module)}


@contextmanager
def kept(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield copies of the tensors, and write them back at the end, also after an exception.

    Memory: one copy of the tensors.
    """
    copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    try:
        yield copies
    finally:
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(copies[name])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; afterwards every module has its former mode, and FSDP2's weights are sharded again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        reshard(model)
        for module in training:
            # train() would also switch the modules inside
            module.training = True


@torch.no_grad()
def each_point(
    model: nn.Module,
    direction: Mapping[str, Tensor],
    grid: Sequence[float] | NDArray[np.float64],
    measure: Callable[[nn.Module], T],
) -> list[T]:
    """Call `measure` at theta + x d for every x of the grid; return its results.

    Each point is theta plus x d in float32 or better, rounded once to the parameter's dtype, so that no error
    accumulates. Afterwards, also after an exception, the parameters are bit for bit what they were.

    Args:
        model: in eval mode; if FSDP2 shards it, every process must call this.
        direction: parameter name -> tensor, for every parameter.
        grid: step lengths.
        measure: takes the model.

    Raises:
        ValueError: the direction is not one of this model's parameters.
    """
    reshard(model)
    parameters = parameters_of(model)
    check_names(direction, parameters, "the direction")
    own = {name: local(p.detach()) for name, p in parameters.items()}
    steps = apart({name: local(d.detach()) for name, d in direction.items()}, own)
    results = []
    with kept(own) as original:
        for x in grid:
            for name, p in own.items():
                if x == 0:
                    p.copy_(original[name])
                elif steps[name].dtype == p.dtype:
                    torch.add(original[name], steps[name], alpha=float(x), out=p)
                else:
                    p.copy_(torch.add(original[name].to(steps[name].dtype), steps[name], alpha=float(x)))
            results.append(measure(model))
            # drop the weights of this point that the forward passes have gathered
            reshard(model)
    return results


def apart(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The given tensors; those that share memory with the model's own are copied, since the model changes."""
    storages = {tensor.untyped_storage().data_ptr() for tensor in own.values()}
    return {
        name: tensor.clone() if tensor.untyped_storage().data_ptr() in storages else tensor
        for name, tensor in given.items()
    }


def check_names(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Raise `ValueError` with the name of the first tensor that is missing, unknown or of another shape."""
    for problem, names in (
        ("lacks", expected.keys() - given.keys()),
        ("has the unknown", given.keys() - expected.keys()),
        ("has another shape for", {k for k in given.keys() & expected.keys() if given[k].shape != expected[k].shape}),
    ):
        if names:
            raise ValueError(
                f"{what} {problem} {min(names)} ({len(names)} in all): it belongs to a model of another architecture "
                "or form; compare dense forms (hf_lowrank.to_dense) of models of one size"
            )


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """All named parameters, tied ones once; `ValueError` where one holds codes of quantised numbers."""
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    for name, p in parameters.items():
        wrapped = is_traceable_wrapper_subclass(p) and not is_dtensor(p)
        if wrapped or p.dtype.itemsize == 1 or not p.dtype.is_floating_point:
            raise ValueError(
                f"{name} holds quantised numbers ({type(p).__name__} of {p.dtype}), whose codes cannot be moved along "
                "a line: measure space='dense', or load the model dequantised"
            )
    return parameters
