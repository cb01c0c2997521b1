"""The space a metric looks at: the parameters as trained, or the dense matrices they compute."""

import torch
from transformers import PreTrainedModel

from hf_lowrank.checkpoints import gather_model, to_dense
from hf_lowrank.methods.base import ReparameterizedLinear
from hf_lowrank.methods.foreign import is_foreign
from hf_lowrank.methods.prepare import method_of
from hf_lowrank.methods.targets import dense_copy
from hf_lowrank.sharding import is_sharded

__all__ = ["SPACES", "in_space", "is_reparameterized", "no_dense_form", "spaces_of", "unsharded"]

SPACES = ("native", "dense", "both")


def is_reparameterized(model: torch.nn.Module) -> bool:
    """Whether a method, PEFT or a quantisation has put its layers into the model."""
    return any(isinstance(module, ReparameterizedLinear) or is_foreign(module) for module in model.modules())


def no_dense_form(model: torch.nn.Module) -> str | None:
    """The reason why no dense matrices compute what the model computes; None if they do."""
    if all(module.has_dense_form for module in model.modules() if isinstance(module, ReparameterizedLinear)):
        return None
    method = method_of(model) if isinstance(model, PreTrainedModel) else None
    label = "its method" if method is None else method.label
    return f"{label} has no dense form: no matrix computes what its layers compute"


def unsharded(model: torch.nn.Module) -> torch.nn.Module:
    """The whole model on every process where FSDP2 shards it, on the same device; the model itself otherwise."""
    if not is_sharded(model) or not isinstance(model, PreTrainedModel):
        return model
    device = next(model.parameters()).device
    gathered = gather_model(model, keep=True)
    assert gathered is not None
    return gathered.to(device)  # type: ignore[arg-type]


def spaces_of(model: torch.nn.Module, space: str) -> tuple[str, ...]:
    """The spaces to measure in for one of `SPACES`: where layers are plain, native and dense are the same: `dense`."""
    if not is_reparameterized(model):
        return ("dense",)
    return ("native", "dense") if space == "both" else (space,)


def in_space(model: torch.nn.Module, space: str) -> tuple[torch.nn.Module, str]:
    """The model in a space, and the space's name for the report.

    The parameters of a model whose layers are plain are its dense matrices: it is returned as it is, as `dense`.

    Raises:
        CheckpointError: `dense` is asked for and there is no dense form.
    """
    if not is_reparameterized(model):
        return model, "dense"
    if space == "native":
        return model, "native"
    if any(map(is_foreign, model.modules())):
        return dense_copy(unsharded(model)), "dense"
    if not isinstance(model, PreTrainedModel):
        return model, "native"
    device = next(model.parameters()).device
    whole = unsharded(model)
    assert isinstance(whole, PreTrainedModel)
    return to_dense(whole).to(device), "dense"  # type: ignore[arg-type]
