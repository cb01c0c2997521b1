"""What a model's config records of the method that trains it."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hf_lowrank.methods.base import METHODS, LowRankConfig, ReparameterizedLinear

__all__ = ["RECORDED", "default_settings", "fixed_structure", "layers_of", "method_of", "structure_hash", "take_start"]

# what a model's config has of a method beside its settings
RECORDED = ("form", "structure", "init_from")


def method_of(model: nn.Module) -> LowRankConfig | None:
    """The method that a model's config records, None if it records none."""
    recorded = getattr(getattr(model, "config", None), "lowrank", None)
    if not recorded:
        return None
    return LowRankConfig.from_dict({k: v for k, v in recorded.items() if k not in RECORDED})


def default_settings(method: str) -> dict[str, Any]:
    """The defaults of a method's settings; nothing for a method that is not registered."""
    config_cls = METHODS.get(method)
    fields = () if config_cls is None else dataclasses.fields(config_cls)
    return {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}


def take_start(checkpoint: str | Path, model: nn.Module) -> None:
    """Record in a model's config what the run of a checkpoint started from: going on needs no `init_from`."""
    config: Any = getattr(model, "config", None)
    file = Path(checkpoint) / "config.json"
    recorded = getattr(config, "lowrank", None)
    if not recorded or not file.is_file():
        return
    start = (json.loads(file.read_text()).get("lowrank") or {}).get("init_from")
    own = {key: value for key, value in recorded.items() if key != "init_from"}
    config.lowrank = own if start is None else {**own, "init_from": start}


def layers_of(config: LowRankConfig) -> dict[str, Any]:
    """What decides how a method's layers look and compute."""
    return {key: value for key, value in config.identity().items() if key != "other_lr_scale"}


def structure_hash(model: nn.Module) -> str | None:
    """Hash of everything that a method drew once and never trains (sparse supports); None if there is nothing."""
    structure = fixed_structure(model)
    digest = hashlib.sha256()
    for name, tensor in structure.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest() if structure else None


def fixed_structure(model: nn.Module) -> dict[str, Tensor]:
    """What the layers drew once and never train, by name."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, ReparameterizedLinear)]
    return {f"{name}.{key}": value for name, layer in layers for key, value in sorted(layer.fixed_structure().items())}
