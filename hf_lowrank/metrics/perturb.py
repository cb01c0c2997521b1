"""Parameters set to other values for a while and put back bit for bit, whatever happens in between."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["check_names", "kept", "parameters_of"]


@contextmanager
def kept(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield copies of the tensors, and write them back at the end, after an exception as well.

    Memory: one copy of what is given.
    """
    copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    try:
        yield copies
    finally:
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(copies[name])


def check_names(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """`ValueError` that names the first tensor which is missing, unknown or of another shape."""
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
    """All named parameters, tied ones once."""
    return dict(model.named_parameters())
