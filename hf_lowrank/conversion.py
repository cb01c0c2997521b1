"""From the names in a checkpoint's files to those that a model has in memory.

transformers 5 saves some architectures under other names than they have in memory: experts one by one, `embed_out` for
`lm_head`. Its `from_pretrained` converts them back; `load_state_dict`, with which Trainer resumes and loads its best
model, does not, and leaves what it cannot find as it was. Here both go through `from_pretrained`.
"""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging as transformers_logging

from hf_lowrank.model_config import CheckpointError
from hf_lowrank.running import running_trainer

__all__ = ["check_names", "convert_when_loading", "own_names", "refuse_incomplete", "stored_names"]


@torch.no_grad()
def own_names(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors as a model has them, converted by transformers' own `from_pretrained`.

    Args:
        model: stays as it is; its layers may be a method's.
        state: all tensors of the checkpoint. Where every name is one of the model's, nothing is converted.

    Returns:
        Name -> tensor. What the model has no place for is there as well, for `check_names` to find.

    Raises:
        CheckpointError: the tensors cannot be converted.
    """
    if not isinstance(model, PreTrainedModel) or state.keys() <= model.state_dict().keys():
        return dict(state)
    stand_ins: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in model.parameters()
    }
    stand_ins |= {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    skeleton = copy.deepcopy(model, stand_ins)
    # these would not be reported
    skeleton._keys_to_ignore_on_load_missing = None
    # from_pretrained makes a model of the class that it is called on: this one gives it the skeleton, with its layers
    loader: Any = type(type(model).__name__, (type(model),), {"__new__": lambda cls, *args, **kwargs: skeleton})
    try:
        # from_pretrained draws values for what is missing, which is left out below
        with torch.random.fork_rng(devices=[]), _quiet():
            _, report = loader.from_pretrained(
                None,
                config=model.config,
                state_dict=dict(state),
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except RuntimeError as error:
        raise CheckpointError(f"the weights cannot be converted to {type(model).__name__}'s ({error})") from error
    converted = {name: t for name, t in skeleton.state_dict().items() if name not in report["missing_keys"]}
    converted |= {name: torch.empty(shape, device="meta") for name, shape, _ in report["mismatched_keys"]}
    return converted | {name: state.get(name, torch.empty(0)) for name in report["unexpected_keys"]}


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no report from transformers: what does not fit becomes an error here."""
    logger, shown = logging.getLogger("transformers.modeling_utils"), transformers_logging.is_progress_bar_enabled()
    # not its level: above that of warnings, transformers says which of its rules for tensor parallelism are not used
    logger.addFilter(_dropped)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.removeFilter(_dropped)
        if shown:
            transformers_logging.enable_progress_bar()


def _dropped(record: logging.LogRecord) -> bool:
    return False


def check_names(model: nn.Module, state: Mapping[str, Tensor], where: Any) -> None:
    """`CheckpointError` where a state dict lacks a tensor of the model, or has one too many or of another shape."""
    own = model.state_dict()
    wrong = [k for k in state.keys() & own.keys() if state[k].shape != own[k].shape]
    # tied weights are saved under one of their names
    storage = {k: own[k].data_ptr() for k in own}
    given = {storage[k] for k in state.keys() & own.keys()}
    computed = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    missing = [k for k in own.keys() - state.keys() - computed if storage[k] not in given]
    unexpected = state.keys() - own.keys()
    for what, names in (("lacks", missing), ("has the unknown", unexpected), ("has another shape for", wrong)):
        if names:
            raise CheckpointError(
                f"{where} {what} {min(names)} ({len(names)} in all): its weights do not fit the model and the method "
                "in config.json; take another checkpoint, or the model and method that this one was made with"
            )


def convert_when_loading(model: nn.Module) -> None:
    """Have `load_state_dict` take a checkpoint's names, as Trainer needs it to resume and to load its best model.

    What has to be converted must then be whole: `load_state_dict` raises `CheckpointError` where something is missing
    or left over, before it changes the model. A Trainer that loads a checkpoint which lacks something raises it too,
    where it would only warn.
    """
    if isinstance(model, PreTrainedModel) and not getattr(model, "_converts_when_loading", False):
        model.register_load_state_dict_pre_hook(_convert)
        model._converts_when_loading = True  # type: ignore[assignment]


def refuse_incomplete(trainer: Trainer) -> None:
    """Have a Trainer raise `CheckpointError` where it would warn that the checkpoint it has loaded lacks something."""
    trainer._issue_warnings_after_load = partial(_check_loaded, trainer)  # type: ignore[method-assign]


def _check_loaded(trainer: Trainer, load_result: Any) -> None:
    model = trainer.model
    assert model is not None
    loaded = {name: tensor for name, tensor in model.state_dict().items() if name not in load_result.missing_keys}
    check_names(model, loaded, "the checkpoint that Trainer loads")


def _convert(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    if (trainer := running_trainer(model)) is not None:
        refuse_incomplete(trainer)
    stored = {key[len(prefix) :]: tensor for key, tensor in state.items() if key.startswith(prefix)}
    converted = own_names(model, stored)
    if stored.keys() <= converted.keys():
        return
    try:
        check_names(model, converted, "the checkpoint")
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; where it lies in several files, which Trainer reads one by one, join them: "
            "hf_lowrank.from_pretrained(checkpoint).save_pretrained(checkpoint, max_shard_size='10TB')"
        ) from None
    for key in stored:
        del state[prefix + key]
    state.update({prefix + key: tensor for key, tensor in converted.items()})


def stored_names(model: nn.Module, files: Sequence[Path]) -> list[str]:
    """The names that a model's parameters have in a checkpoint's safetensors files."""
    own = [name for name, _ in model.named_parameters()]
    stored: set[str] = set()
    for path in files:
        with safe_open(path, "pt") as file:
            stored.update(file.keys())
    if stored.issuperset(own):
        return own
    buffers = {name.rpartition(".")[2] for name, _ in model.named_buffers()}
    return sorted(name for name in stored if name.rpartition(".")[2] not in buffers)
