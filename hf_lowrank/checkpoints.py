"""Checkpoints on disk: finding complete ones, loading them strictly, and converting a model to its dense form.

Trainer and AutoModel do not load strictly: weights of one form enter a model of another form without an error. The
functions here check every name and shape.
"""

import copy
import json
import logging
import re
import shutil
import zipfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from hf_lowrank.conversion import check_names, convert_when_loading, own_names
from hf_lowrank.methods.base import CONFIG_NAME, METHODS, LowRankConfig, ReparameterizedLinear
from hf_lowrank.methods.prepare import apply_method, method_of, structure_hash
from hf_lowrank.methods.recorded import default_settings, take_start
from hf_lowrank.model_config import (
    NATIVE_FOLDER,
    CheckpointError,
    base_architecture,
    mark_native,
    read_config,
    read_json,
)  # fmt: skip
from hf_lowrank.optim.plan import changed_settings
from hf_lowrank.sharding import reshard

__all__ = [
    "CheckpointError", "check_checkpoint", "check_resume", "check_same_size", "dense_state_dict", "export",
    "gather_model", "last_checkpoint", "list_checkpoints", "load_model", "to_dense", "weight_files",
]  # fmt: skip

logger = logging.getLogger(__name__)

# config entries that decide the shapes of the weights
SIZE_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "n_embd", "n_layer", "n_head", "n_inner",
)  # fmt: skip


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders `checkpoint-<step>` of a run, oldest step first, complete or not."""
    folder = Path(output_dir)
    folders = [p for p in folder.glob("checkpoint-*") if p.is_dir() and re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(folders, key=lambda p: int(p.name.rpartition("-")[2]))


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint of a run, or None; incomplete ones are skipped with a warning.

    Trainer itself takes the newest folder even if it is incomplete, and forgets the optimizer's moments if their file
    is missing.

    Raises:
        CheckpointError: the run saves its models alone (`save_only_model`), so that it cannot go on anywhere.
    """
    checkpoints = list_checkpoints(output_dir)
    if checkpoints and all(_is_model_alone(checkpoint) for checkpoint in checkpoints):
        raise CheckpointError(
            f"{checkpoints[-1]} was saved with save_only_model, so that training cannot go on from it: start anew in "
            "another output folder, or continue with its weights alone, hf_lowrank.from_pretrained(checkpoint)"
        )
    for checkpoint in reversed(checkpoints):
        try:
            check_checkpoint(checkpoint)
        except CheckpointError as error:
            logger.warning("%s: skipped", error)
        else:
            return str(checkpoint)
    return None


def _is_model_alone(checkpoint: Path) -> bool:
    """Whether a checkpoint has what Trainer writes last, and nothing that only resuming needs."""
    needed_to_resume = [*checkpoint.glob("optimizer*"), *checkpoint.glob("scheduler*"), *checkpoint.glob("rng_state*")]
    return (checkpoint / "trainer_state.json").is_file() and not needed_to_resume


def check_checkpoint(checkpoint: str | Path) -> None:
    """Raise `CheckpointError` if a run cannot resume exactly from this folder; the message names the file at fault."""
    folder = Path(checkpoint)
    named = re.fullmatch(r"checkpoint-(\d+)", folder.resolve().name)
    if not folder.is_dir() or named is None:
        raise CheckpointError(f"{folder} is no checkpoint: give a folder named checkpoint-<step>")
    if (folder / "config.json").is_file():
        read_json(folder / "config.json")
    _check_weights(folder)
    sharded = any(p.is_dir() and p.name.startswith("optimizer") for p in folder.iterdir())
    # the files of accelerate for a full FSDP state dict
    whole = [name for name in ("optimizer.bin", "pytorch_model_fsdp.bin") if (folder / name).is_file()]
    optimizer = [] if sharded else whole if "optimizer.bin" in whole else ["optimizer.pt"]
    for name in (*optimizer, "scheduler.pt"):
        _check_zip(folder / name)
    random_states = list(folder.glob("rng_state*.pth"))
    if not random_states:
        raise CheckpointError(f"{folder} is incomplete: rng_state.pth is missing")
    for path in random_states:
        _check_zip(path)
    state = read_json(folder / "trainer_state.json")
    if state.get("global_step") != int(named[1]):
        raise CheckpointError(f"{folder} is damaged: trainer_state.json is of step {state.get('global_step')}")


def check_resume(checkpoint: str | Path, model: PreTrainedModel) -> None:
    """Raise `CheckpointError` if a checkpoint's method, settings or sizes differ from those of a prepared model.

    From then on the model takes the names that transformers gives its weights on disk, as after `prepare`.
    """
    convert_when_loading(model)
    config = read_json(Path(checkpoint) / "config.json")
    own = json.loads(json.dumps(model.config.to_dict(), default=str))
    saved, mine = (c.get("lowrank") or {} for c in (config, own))
    method = mine.get("method", "fullrank")
    ignored = (*METHODS[method].runtime_fields, "init_from")
    changed = changed_settings(saved, mine, default_settings(method), ignored)
    sizes = [k for k in SIZE_KEYS if k in config and k in own and config[k] != own[k]]
    changed += [f"{k} is {config[k]!r} there, {own[k]!r} here" for k in sizes]
    if changed:
        raise CheckpointError(
            f"{checkpoint} belongs to another run ({'; '.join(changed)}): resume with the settings it was made with, "
            "or start anew in another output folder"
        )
    take_start(checkpoint, model)


def check_same_size(baseline: Path | dict[str, Any], own: dict[str, Any], name: str) -> None:
    """Raise `CheckpointError` if a baseline, given by its config or config.json, has other sizes than a model."""
    config = read_json(baseline) if isinstance(baseline, Path) else baseline
    there, here = ({"model_type": base_architecture(c), **{k: c.get(k) for k in SIZE_KEYS}} for c in (config, own))
    different = [f"{k} is {there[k]} there, {here[k]} here" for k in here if there[k] != here[k]]
    if different:
        raise CheckpointError(
            f"baseline {name} is another model ({'; '.join(different)}): take a run of the same size and tokenizer"
        )


def _check_zip(path: Path) -> None:
    # torch.save writes a zip file, which ends with its directory
    if not path.is_file():
        raise CheckpointError(f"{path.parent} is incomplete: {path.name} is missing")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path.parent} is cut short: {path.name} ends too early")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder's model; raises `CheckpointError` if their index is damaged."""
    # like transformers, prefer the single file: saving a model again leaves an old index behind
    if (folder / SAFE_WEIGHTS_INDEX_NAME).is_file() and not (folder / SAFE_WEIGHTS_NAME).is_file():
        index = read_json(folder / SAFE_WEIGHTS_INDEX_NAME)
        weight_map = index.get("weight_map")
        names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
        if not names:
            raise CheckpointError(f"{folder} is damaged: {SAFE_WEIGHTS_INDEX_NAME} names no file")
        if any(Path(name).name != name for name in names):
            raise CheckpointError(f"{folder}: {SAFE_WEIGHTS_INDEX_NAME} names files outside of its folder")
        return [folder / name for name in names]
    return [folder / SAFE_WEIGHTS_NAME]


def _check_weights(folder: Path) -> None:
    if any(p.is_dir() and p.name.startswith("pytorch_model_fsdp") for p in folder.iterdir()):
        return
    for path in weight_files(folder):
        if not path.is_file():
            pickled = [name for name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME) if (folder / name).is_file()]
            if pickled:
                raise CheckpointError(
                    f"{folder} holds {pickled[0]} and no safetensors, and pickled files are not read here: load it "
                    "once with transformers and save it again with model.save_pretrained(folder)"
                )
            raise CheckpointError(f"{folder} is incomplete: {path.name} is missing")
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{folder} is cut short: {path.name} ends too early ({error})") from None


def load_model(folder: str | Path, *, dense: bool = False) -> PreTrainedModel:
    """Load a model from a local checkpoint or published folder, every weight accounted for.

    Args:
        folder: holds config.json and safetensors; a published folder may hold the trainable form in `native/`.
        dense: the plain transformers model instead of the model as trained.

    Returns:
        The model in eval mode, on the CPU, in the dtype it was saved in; as trained, bit for bit, unless `dense`.

    Raises:
        CheckpointError: files are missing or cut short, names or shapes do not fit the method in config.json, or the
            folder does not hold the form that was asked for.
    """
    folder = Path(folder)
    if not dense and (folder / NATIVE_FOLDER / "config.json").is_file():
        folder = folder / NATIVE_FOLDER
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no config.json: give a checkpoint or a published folder")
    _check_weights(folder)
    config = read_config(folder)
    if getattr(config, "quantization_config", None):
        raise CheckpointError(
            f"{folder} holds quantised weights, which are not read here: load it with transformers and save it "
            "dequantised"
        )
    lowrank = getattr(config, "lowrank", None) or {}
    model = _model_of(config, folder)
    method = method_of(model)
    if dense and method is not None and not method.has_dense_form:
        raise _no_dense_form(folder, method.label)
    if method is not None and method.replaces_layers:
        if lowrank.get("form") == "native":
            apply_method(model, method, seed=0)
        elif not dense:
            raise CheckpointError(
                f"{folder} holds the dense form only: load it with dense=True, or fetch native/ as well"
            )
    state = {name: tensor for path in weight_files(folder) for name, tensor in load_file(path).items()}
    _load_strictly(model, state, folder)
    if lowrank:
        if lowrank.get("form") == "native" and structure_hash(model) != lowrank.get("structure"):
            raise CheckpointError(f"{folder} is damaged: the sparse support does not match its hash in config.json")
        model.config.lowrank = lowrank
    model.eval()
    # Trainer's checkpoints and native/ hold it as well
    if (folder / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return to_dense(model) if dense else model


def _model_of(config: PreTrainedConfig, folder: Path) -> PreTrainedModel:
    """A plain model with initial values, for a config from an untrusted source."""
    model: PreTrainedModel
    try:
        model_cls = getattr(transformers, (config.architectures or [""])[0], None)
        with _random_state_kept():
            if isinstance(model_cls, type) and issubclass(model_cls, PreTrainedModel):
                model = model_cls._from_config(config, dtype=config.dtype)
            else:
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    # transformers and torch may raise anything for senseless values
    except Exception as error:
        raise CheckpointError(f"{folder}: no model can be made from config.json ({error})") from error
    return model


def _no_dense_form(where: Any, label: str) -> CheckpointError:
    return CheckpointError(
        f"{where} has no dense form, since no linear layer computes what {label}'s layers do: take it as trained, "
        "with hf_lowrank.from_pretrained and no dense=True, or published with AutoModelForCausalLM and "
        "trust_remote_code=True"
    )


def _random_state_kept() -> AbstractContextManager[None]:
    """Keep the random state while a model gets initial values that are overwritten; a training run depends on it."""
    return torch.random.fork_rng(devices=[])


def _load_strictly(model: PreTrainedModel, state: dict[str, Tensor], where: Path) -> None:
    _take_dtypes(model, state)
    converted = own_names(model, state)
    check_names(model, converted, where)
    _take_dtypes(model, converted)
    model.load_state_dict(converted, strict=False)


def _take_dtypes(model: PreTrainedModel, state: dict[str, Tensor]) -> None:
    """Parameters get the precision that they were saved in: a model may have more than one."""
    for name, parameter in model.named_parameters():
        if name in state:
            parameter.data = parameter.data.to(state[name].dtype)


def dense_state_dict(model: torch.nn.Module) -> dict[str, Tensor]:
    """State dict of the plain transformers model that computes the same function."""
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, ReparameterizedLinear):
            for key in module.state_dict():
                del state[f"{name}.{key}"]
            place = module.dense_place(name)
            state.update({f"{place}.{key}": tensor for key, tensor in module.dense_state().items()})
    return state


def to_dense(model: PreTrainedModel) -> PreTrainedModel:
    """A new plain transformers model that computes the same function; `model` stays as it is.

    Every linear layer is the dense matrix it stands for (for SLTrain (alpha / r) B A + S), rounded to its dtype.

    Raises:
        CheckpointError: no dense model computes the same function, because of CoLA's activation between its factors.
    """
    if not _has_dense_form(model):
        method = method_of(model)
        raise _no_dense_form("the model", "its method" if method is None else method.label)
    config = type(model.config).from_dict(model.config.to_dict())
    if getattr(config, "lowrank", None):
        replaced = any(isinstance(m, ReparameterizedLinear) for m in model.modules())
        config.lowrank = {**config.lowrank, "form": "dense" if replaced else config.lowrank["form"]}
    with _random_state_kept():
        dense = type(model)._from_config(config, dtype=model.dtype)
    _load_strictly(dense, dense_state_dict(model), Path(model.name_or_path or "the model"))
    dense.to(model.device)
    dense.train(model.training)
    if model.can_generate():
        dense.generation_config = copy.deepcopy(model.generation_config)
    return dense


def gather_model(model: PreTrainedModel, keep: bool = True) -> PreTrainedModel | None:
    """A whole copy on the CPU of a model that FSDP2 has sharded; an unsharded model itself.

    Every process must call this. A process that passes `keep=False` takes part and gets None.
    """
    reshard(model)
    if not any(isinstance(p, DTensor) for p in model.parameters()):
        return model if keep else None
    state = {}
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            state[name] = whole.detach().cpu()
    if not keep:
        return None
    # fully_shard has replaced the model's class by one of its own
    model_cls = next(
        c for c in type(model).__mro__ if not issubclass(c, FSDPModule) and issubclass(c, PreTrainedModel)
    )
    method = method_of(model)
    with _random_state_kept():
        whole_model: PreTrainedModel = model_cls._from_config(
            type(model.config).from_dict(model.config.to_dict()), dtype=model.dtype
        )
        if method is not None and method.replaces_layers:
            apply_method(whole_model, method, seed=0)
            whole_model.config.lowrank = model.config.lowrank
    _load_strictly(whole_model, state, Path(model.name_or_path or "the model"))
    whole_model.train(model.training)
    if model.can_generate():
        whole_model.generation_config = copy.deepcopy(model.generation_config)
    return whole_model


def _has_dense_form(model: torch.nn.Module) -> bool:
    return all(module.has_dense_form for module in model.modules() if isinstance(module, ReparameterizedLinear))


def export(model: PreTrainedModel, publish: Path, tokenizer: Any = None) -> None:
    """Write a model for others: dense weights for plain transformers, and `native/` if the trained form differs.

    A model without a dense form is written as trained, with the code that plain transformers needs to load it.

    Args:
        model: the model as trained.
        publish: folder to write to; made when missing.
        tokenizer: saved beside the weights when given.
    """
    method = method_of(model)
    replaced = any(isinstance(m, ReparameterizedLinear) for m in model.modules())
    dense = _has_dense_form(model)
    (to_dense(model) if replaced and dense else model).save_pretrained(publish)
    # a run with another method may have written to this folder
    shutil.rmtree(publish / NATIVE_FOLDER, ignore_errors=True)
    for name in (CONFIG_NAME, *(f"modeling_{other}.py" for other in METHODS)):
        (publish / name).unlink(missing_ok=True)
    if replaced and dense:
        model.save_pretrained(publish / NATIVE_FOLDER)
        if method is not None:
            mark_native(publish / NATIVE_FOLDER, method.method)
    if tokenizer is not None:
        tokenizer.save_pretrained(publish)
    if method is not None:
        method.save_pretrained(publish)
        if not dense:
            _publish_code(method, model, publish)


def _publish_code(method: LowRankConfig, model: PreTrainedModel, publish: Path) -> None:
    try:
        method.publish_code(model, publish)
    # the model class is not from transformers; hf_lowrank can still load the weights
    except ValueError as error:
        logger.warning("%s is for hf_lowrank.from_pretrained alone: %s", publish, error)
