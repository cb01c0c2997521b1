"""Start a run from another one's weights, at step 0 and with an optimizer of its own."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_lowrank.checkpoints import CheckpointError, dense_state_dict
from hf_lowrank.hub.load import from_pretrained, load_report
from hf_lowrank.methods.base import LowRankConfig, ReparameterizedLinear
from hf_lowrank.methods.recorded import layers_of, method_of, structure_hash
from hf_lowrank.report.io import ReportError

__all__ = ["WarmStart"]


class WarmStart:
    """The weights of a run, checkpoint or repo for a model of the same architecture and size.

    A method that keeps a layer's weights starts from the dense form of the source: LoRA and ReLoRA put fresh adapters
    on it. One that replaces them (SLTrain, CoLA, plain factors) starts from a source with the same layers.

    Args:
        source: a run, publish or checkpoint folder, or a Hub repo id (also `repo@revision`).
        config: the method of the new run.

    Raises:
        FileNotFoundError, OSError: the source is not there or cannot be reached.
        hf_lowrank.CheckpointError: it has not the weights that the method starts from.
    """

    def __init__(self, source: str | Path, config: LowRankConfig) -> None:
        self.source, model = str(source), from_pretrained(source)
        theirs = method_of(model)
        self.dense = not config.replaces_layers or config.keeps_weights
        if self.dense:
            lacking = [m for m in model.modules() if isinstance(m, ReparameterizedLinear) and not m.has_dense_form]
            if lacking:
                raise CheckpointError(
                    f"init_from={self.source!r} is a {theirs.label if theirs else type(lacking[0]).__name__} run, "
                    f"which has no dense weights for {config.label} to start from: start from a run that has, or "
                    "train on with its own method"
                )
            self.state = dense_state_dict(model)
        elif theirs is None or layers_of(theirs) != layers_of(config):
            label = "a plain model" if theirs is None else f"a {theirs.label} run of other layers"
            raise CheckpointError(
                f"init_from={self.source!r} is {label}, whose weights {config.label} with these settings cannot "
                "take over: start from a run with the same method and settings, or leave init_from out"
            )
        else:
            self.state = model.state_dict()
        self.record = {"source": self.source, **_of_report(source, model), "form": "dense" if self.dense else "native"}

    def places(self, model: nn.Module) -> dict[str, Tensor]:
        """The tensors of a model that the weights go to, by name; layers put around them later change nothing.

        Raises:
            hf_lowrank.CheckpointError: names or shapes differ. The message has the first difference.
        """
        tensors: dict[str, Tensor] = dict(model.state_dict())
        own = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        theirs = {name: tuple(tensor.shape) for name, tensor in self.state.items()}
        for name in sorted(own.keys() | theirs.keys()):
            mine, other = own.get(name), theirs.get(name)
            if mine != other:
                raise CheckpointError(
                    f"init_from={self.source!r} does not fit this model: {name} is {_shape(other)} there and "
                    f"{_shape(mine)} here; a run starts from one of the same architecture, size and vocabulary"
                )
        return tensors

    @torch.no_grad()
    def fill(self, places: dict[str, Tensor], model: nn.Module) -> None:
        """Copy the weights, in the precision of their places, and record in the model's config where they are from."""
        for name, tensor in places.items():
            tensor.copy_(self.state[name])
        config: Any = getattr(model, "config", None)
        if config is not None:
            # sparse supports are the source's now
            config.lowrank = config.lowrank | {"structure": structure_hash(model), "init_from": self.record}


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else " x ".join(map(str, shape)) or "a number"


def _of_report(source: str | Path, model: PreTrainedModel) -> dict[str, Any]:
    """Method, and step if a report tells it, of the run that weights are from."""
    method = method_of(model)
    found: dict[str, Any] = {"method": "fullrank" if method is None else method.method, "step": None}
    name, _, step = Path(source).name.rpartition("-")
    if name == "checkpoint" and step.isdecimal():
        return found | {"step": int(step)}
    try:
        return found | {"step": load_report(source).run.steps}
    # a plain model has none
    except (OSError, ReportError):
        return found
