"""config.json of a checkpoint or a published folder: read with care, and marked where it is for hf_lowrank alone."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

__all__ = ["CheckpointError", "base_architecture", "mark_native", "read_config", "read_json"]

# transformers downloads the kernel that one of these names and runs its code
KERNELS = frozenset(
    ["attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"]
)

# name of the file that transformers loads instead of its own choice
WEIGHTS = "transformers_weights"


class CheckpointError(ValueError):
    """A checkpoint that is incomplete, damaged, or of another form than asked for."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `CheckpointError` where it is missing, cut short or something else."""
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} is incomplete: {path.name} is missing") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path.parent} is cut short: {path.name} is no valid JSON ({error})") from None


def base_architecture(values: dict[str, Any]) -> str | None:
    """The model type that a config.json builds on, whatever it is published as."""
    noted = values.get("lowrank")
    published = noted.get("published") if isinstance(noted, dict) else None
    found = (published if isinstance(published, dict) else values).get("model_type")
    return found if isinstance(found, str) else None


def read_config(folder: Path) -> PreTrainedConfig:
    """The config of a folder's model; of one published under a type of its own, that of the model it builds on.

    What would make transformers run somebody's code, a modelling file or a kernel, is left out.

    Raises:
        CheckpointError: config.json makes no config of a model that transformers knows.
    """
    # transformers writes infinity as {"__float__": "Infinity"}
    values = PreTrainedConfig._decode_special_floats(_without_kernels(read_json(folder / "config.json")))
    for key in ("auto_map", WEIGHTS):
        values.pop(key, None)
    noted = values.get("lowrank")
    if not isinstance(noted, dict | None):
        raise CheckpointError(f"{folder} is damaged: lowrank in config.json is no object")
    if noted and "published" in noted:
        published = noted.pop("published")
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
    """Make plain transformers refuse the factors in a folder, which it would take for a dense model's weights.

    It would load what fits and start the method's layers from random values, with no more than a warning. A model type
    of its own stops `AutoModel`; a class that is called by its name looks for the file that `transformers_weights`
    names, and reports that there is none.
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
