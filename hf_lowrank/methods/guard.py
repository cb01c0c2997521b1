"""Refuse states of another form where they would be loaded in part, without a word."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowrank.methods.layer import ReparameterizedLinear
from hf_lowrank.methods.recorded import fixed_structure
from hf_lowrank.methods.targets import Target

__all__ = ["guard_loading"]


def guard_loading(model: nn.Module, targets: list[Target]) -> None:
    """Refuse a state dict of another form where `load_state_dict(strict=False)`, Trainer's way, would half-load it."""
    expected = {
        t.weight_name.rpartition(".")[0]: set(t.module.state_dict())
        for t in targets
        if t.stack is None or isinstance(t.module, ReparameterizedLinear)
    }
    # a local function could not be pickled with the model
    model.register_load_state_dict_pre_hook(functools.partial(_refuse_other_forms, expected))


def _refuse_other_forms(
    expected: dict[str, set[str]], module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    for name, keys in expected.items():
        start = f"{prefix}{name}."
        saved_keys = {key[len(start) :] for key in state_dict if key.startswith(start)}
        if saved_keys and saved_keys != keys:
            raise ValueError(
                f"the checkpoint holds {', '.join(sorted(saved_keys))} for layer {name}, which here has "
                f"{', '.join(sorted(keys))}: it was trained with another method; resume with that method, or load "
                "it with hf_lowrank.from_pretrained"
            )
    for name, tensor in fixed_structure(module).items():
        saved = state_dict.get(f"{prefix}{name}", tensor)
        if saved.shape != tensor.shape or not torch.equal(saved.to(tensor.device), tensor):
            raise ValueError(
                f"{name} differs from the checkpoint's, which was drawn with another seed or sparsity: resume "
                "with the seed and settings of the run that saved it"
            )
