"""config.json of a checkpoint or a published folder: reading it safely, and marking what only hf_lowrank can load."""

import json
import shutil
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

__all__ = [
    "NATIVE_FOLDER", "CheckpointError", "base_architecture", "loading_class", "mark_native", "read_config",
    "read_json", "remove_model",
]  # fmt: skip

# the model as trained, in a published folder that holds its dense form
NATIVE_FOLDER = "native"

# transformers downloads the kernel that one of these names and runs its code
KERNELS = frozenset(
    ["attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"]
)

# name of the file that transformers loads instead of its own choice
WEIGHTS = "transformers_weights"


class CheckpointError(ValueError):
    """A checkpoint is incomplete, damaged, or not in the form that was asked for."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises `CheckpointError` where the file is missing or holds no valid object."""
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} is incomplete: {path.name} is missing") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path.parent} is cut short: {path.name} is no valid JSON ({error})") from None


def loading_class(architecture: str | None, dense: bool) -> str | None:
    """The class of transformers that loads what is published of a model; None if none does.

    Args:
        architecture: the class of the model that was trained.
        dense: whether it is published in its dense form, and not with code of its own.
    """
    if architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return "AutoModelForCausalLM"
    if architecture is None or not hasattr(transformers, architecture):
        return None
    return architecture if dense else "AutoModel"


def remove_model(folder: Path) -> None:
    """Remove the model of an earlier run from a published folder."""
    shutil.rmtree(folder / NATIVE_FOLDER, ignore_errors=True)
    for path in (folder / "config.json", *folder.glob("model*.safetensors*")):
        path.unlink(missing_ok=True)


def base_architecture(values: dict[str, Any]) -> str | None:
    """The model type of transformers behind a config.json, also if it is published under a type of its own."""
    lowrank = values.get("lowrank")
    published = lowrank.get("published") if isinstance(lowrank, dict) else None
    model_type = (published if isinstance(published, dict) else values).get("model_type")
    return model_type if isinstance(model_type, str) else None


def read_config(folder: Path) -> PreTrainedConfig:
    """The config of a folder's model; for a type of its own, the config of the model that it builds on.

    Entries that would make transformers run somebody's code, a modelling file or a kernel, are dropped.

    Raises:
        CheckpointError: config.json makes no config of a model that transformers knows.
    """
    # transformers writes infinity as {"__float__": "Infinity"}
    values = PreTrainedConfig._decode_special_floats(_without_kernels(read_json(folder / "config.json")))
    for key in ("auto_map", WEIGHTS):
        values.pop(key, None)
    lowrank = values.get("lowrank")
    if not isinstance(lowrank, dict | None):
        raise CheckpointError(f"{folder} is damaged: lowrank in config.json is no object")
    if lowrank and "published" in lowrank:
        published = lowrank.pop("published")
        try:
            values |= {key: published[key] for key in ("model_type", "architectures")}
            config_class = CONFIG_MAPPING[values["model_type"]]
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{folder} is damaged: config.json does not say what its code builds on") from error
    else:
        try:
            config_class = CONFIG_MAPPING[values.get("model_type")]
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{folder}: model type {values.get('model_type')!r} in config.json is unknown to the transformers "
                "that is installed (code of the folder's own is not run): upgrade it, or check the folder"
            ) from error
    try:
        config: PreTrainedConfig = config_class.from_dict(values, name_or_path=str(folder))
    # values of the wrong kind make transformers raise anything
    except Exception as error:
        raise CheckpointError(f"{folder}: config.json makes no {values['model_type']} model ({error})") from error
    return config


def mark_native(folder: Path, method: str) -> None:
    """Make plain transformers refuse a folder whose weights are a method's factors.

    Otherwise it would load the weights that fit and start the method's layers from random values, with only a warning.
    `AutoModel` stops at the unknown model type. A model class looks for the file that `transformers_weights` names,
    and reports that it does not exist.
    """
    path = folder / "config.json"
    values = read_json(path)
    published = {"model_type": values["model_type"], "architectures": values["architectures"]}
    values |= {
        "model_type": f"{method}_{values['model_type']}",
        "architectures": [f"{method}_{name}" for name in values["architectures"]],
        "lowrank": {**values["lowrank"], "published": published},
        WEIGHTS: "load-it-with-hf_lowrank.safetensors",
    }
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _without_kernels(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _without_kernels(value) for key, value in values.items() if key not in KERNELS}
    return values
