"""A forward and a backward pass on a few tokens: do the layers that a method has put into a model train?"""

import inspect
import logging
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import TrainingArguments
from transformers.utils import logging as transformers_logging

from hf_lowrank.methods.base import ReparameterizedLinear, uses_deepspeed
from hf_lowrank.methods.derived_weight import Composed, UncalledLayerError, collect_unserved
from hf_lowrank.methods.foreign import is_foreign
from hf_lowrank.methods.stacks import layer_path
from hf_lowrank.methods.targets import Target
from hf_lowrank.sharding import is_dtensor

__all__ = [
    "check_first_batch", "own_weights", "probe", "trained_layers", "unchanged_on_error", "warn_unused",
    "without_gradient",
]  # fmt: skip

logger = logging.getLogger(__name__)

# half a second of sound at 16 kHz
SAMPLES = 8000


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Where an error is raised inside, the model gets back its modules, their attributes, its config and what trains.

    Values of tensors that were changed in place stay changed.
    """
    restore = _remember(model)
    try:
        yield
    except BaseException:
        restore()
        raise


def _remember(model: nn.Module) -> Callable[[], None]:
    """A function that undoes every later change of modules, attributes and `requires_grad`."""

    def shallow(values: dict[str, Any]) -> dict[str, Any]:
        return {k: v.copy() if isinstance(v, dict | list | set) else v for k, v in values.items()}

    holders = [*model.modules(), *filter(None, [getattr(model, "config", None)])]
    attributes = [(vars(holder), shallow(vars(holder))) for holder in holders]
    trained = [(p, p.requires_grad) for p in model.parameters()]

    def restore() -> None:
        for current, before in attributes:
            current.clear()
            current.update(before)
        for p, trains in trained:
            p.requires_grad_(trains)

    return restore


@contextmanager
def _left_as_it_is(model: nn.Module) -> Iterator[None]:
    """Undo what forward passes change: modes, attributes, buffers and random states. Gradients are not touched."""
    restore = _remember(model)
    states = random.getstate(), np.random.get_state()
    devices = {p.device for p in model.parameters()} - {torch.device("cpu"), torch.device("meta")}
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            for device in devices:
                stack.enter_context(torch.random.fork_rng(devices=[device], device_type=device.type))
            # a batch norm's statistics, say, are changed in place
            copies: dict[int, Tensor] = {}
            for module in model.modules():
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[name] = copies.setdefault(id(buffer), buffer.clone())
            yield
    finally:
        restore()
        random.setstate(states[0])
        np.random.set_state(states[1])


def trained_layers(model: nn.Module) -> dict[str, tuple[ReparameterizedLinear, list[Tensor]]]:
    """The methods' layers by name, each with the parameters that train in the weight's place."""
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, ReparameterizedLinear):
            bias = getattr(module, "bias", None)
            factors: list[Tensor] = [p for p in module.parameters() if p.requires_grad and p is not bias]
            if factors:
                layers[name] = module, factors
    return layers


def without_gradient(model: nn.Module) -> list[str]:
    """Names of the layers none of whose trained parameters has a gradient other than zero, after a backward pass."""
    layers = trained_layers(model).items()
    return [name for name, (_, factors) in layers if not any(_is_reached(p.grad) for p in factors)]


def warn_unused(model: nn.Module, unused: list[str], source: str) -> None:
    """Name the layers that got no gradient, if there are any."""
    if unused:
        shown = ", ".join(unused[:8]) + (f" and {len(unused) - 8} more" if len(unused) > 8 else "")
        logger.warning(
            "%d of %d target layers got no gradient from %s, so that they train only if the model uses them for other "
            "inputs (leave a layer that it never uses out with target_modules): %s",
            len(unused), len(trained_layers(model)), source, shown,
        )  # fmt: skip


def check_first_batch(known: set[str], model: nn.Module, args: TrainingArguments) -> None:
    """Name the layers that got no gradient from a training's first batch, if there are others than the known ones."""
    # ZeRO and FSDP 1 keep gradients elsewhere
    flat = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
    if args.should_log and not flat and not uses_deepspeed(args):
        unused = without_gradient(model)
        warn_unused(model, unused if set(unused) - known else [], "the first batch")


def own_weights(targets: list[Target]) -> dict[str, Tensor]:
    """Where a method's layer will be -> the weight there, for the plain layers and stacks among the targets."""
    weights = {}
    for target in targets:
        module: Any = target.module
        if isinstance(module, ReparameterizedLinear) or is_foreign(module):
            continue
        path = target.name if target.stack is None else layer_path(target.weight_name)
        weights[path] = getattr(module, target.weight_name.rpartition(".")[2])
    return weights


def _is_reached(gradient: Tensor | None) -> bool:
    # a shard may be zero where the whole is not
    return gradient is not None and (is_dtensor(gradient) or bool(gradient.count_nonzero()))


def probe(model: nn.Module, replaced: Mapping[str, Tensor]) -> list[str] | None:
    """Run a few tokens forward and backward, in eval and in train mode. The model stays as it is, to the bit.

    Args:
        model: with a method's layers.
        replaced: layer name -> the weight that the method has replaced or frozen.

    Returns:
        Names of the layers that got no gradient (a model may use some layers only sometimes), or None where the model
        cannot be run: nothing tells what it takes, or it fails on that.

    Raises:
        UncalledLayerError: the model uses a layer in a way that the method's cannot serve.
    """
    layers = trained_layers(model)
    # torch's attention reads this weight, whatever the model takes
    read: list[Any] = [m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    refused: list[Composed] = [m for m in read if isinstance(m, ReparameterizedLinear) and m.unreadable()]
    if refused:
        raise _unserved(refused, layers)
    inputs = _example(model)
    if not layers or inputs is None:
        return None
    reached: dict[str, bool] | None = None
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with _left_as_it_is(model), torch.enable_grad():
            for weight in replaced.values():
                weight.requires_grad_(weight.is_floating_point())
            for training in (False, True):
                model.train(training)
                try:
                    with collect_unserved() as unserved:
                        loss = _loss(model(**inputs))
                    if unserved:
                        raise _unserved(unserved, layers)
                    got = {} if loss is None else _reached(loss, layers, replaced)
                except UncalledLayerError:
                    raise
                # a model may fail on such an input in any way, and may do so in one of the modes alone
                except Exception as error:
                    logger.debug("no probe of %s (train=%s): %s", type(model).__name__, training, error)
                    continue
                reached = {name: found or (reached or {}).get(name, False) for name, found in got.items()}
    finally:
        transformers_logging.set_verbosity(verbosity)
    return [name for name, found in reached.items() if not found] if reached else None


def _reached(
    loss: Tensor, layers: dict[str, tuple[ReparameterizedLinear, list[Tensor]]], replaced: Mapping[str, Tensor]
) -> dict[str, bool]:
    """Layer -> whether the loss depends on its factors; `UncalledLayerError` where it does on the weight instead."""
    factors = [p for _, own in layers.values() for p in own]
    gradients = dict(zip(map(id, factors), _gradients(loss, factors), strict=True))
    reached = {name: any(_is_reached(gradients[id(p)]) for p in own) for name, (_, own) in layers.items()}
    # a frozen weight that is part of the layer is reached with the layer
    suspects = [n for n in layers if n in replaced and not (reached[n] and _has(layers[n][0], replaced[n]))]
    for name, gradient in zip(suspects, _gradients(loss, [replaced[n] for n in suspects]), strict=True):
        if _is_reached(gradient):
            raise UncalledLayerError("keeps using the weight that {} had before", [layers[name][0]])
    return reached


def _unserved(unserved: list[Composed], layers: Mapping[str, Any]) -> UncalledLayerError:
    refused = list(dict.fromkeys(unserved))
    kinds = [layer.name.rpartition(".")[2] for layer in refused]
    others = sorted({name.rpartition(".")[2] for name in layers}.difference(kinds))
    reason = refused[0].unreadable()
    return UncalledLayerError(
        f"computes with the weight of {{}} without calling the layer, {reason}",
        refused,
        f"; the others are {others}" if others else "",
    )


def _has(layer: nn.Module, weight: Tensor) -> bool:
    return any(p is weight for p in layer.parameters())


def _gradients(loss: Tensor, tensors: list[Tensor]) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)) if tensors else []


def _loss(output: Any) -> Tensor | None:
    """A sum of all that the model returns with a gradient, randomly weighted; None if there is nothing."""
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple):
        terms = [term for term in map(_loss, output) if term is not None]
        return torch.stack([term.to(terms[0].device) for term in terms]).sum() if terms else None
    if not isinstance(output, Tensor) or not output.requires_grad:
        return None
    generator = torch.Generator().manual_seed(output.numel())
    return (output.float() * torch.randn(output.shape, generator=generator).to(output.device)).sum()


def _guess(model: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    """The one input of a module that tells nothing: ids if its first layer looks them up, else that layer's features.

    Where this is wrong the model fails on it, and training's first batch tells what the probe would have.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    for module in model.modules() if len(needed) == 1 else ():
        if isinstance(module, nn.Embedding):
            return {needed[0]: torch.arange(8).view(2, 4) % module.num_embeddings}
        if isinstance(features := getattr(module, "in_features", None), int):
            return {needed[0]: torch.randn(2, 4, features, generator=generator)}
    return {}


def _example(model: nn.Module) -> dict[str, Any] | None:
    """Inputs of a few tokens, an image or a piece of sound, as the model asks for; None if nothing tells what."""
    name: Any = getattr(model, "main_input_name", None)
    config: Any = getattr(model, "config", None)
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.device.type == "meta":
        return None
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    frames, mels = getattr(config, "max_source_positions", None), getattr(config, "num_mel_bins", None)
    given = getattr(model, "dummy_inputs", None)
    inputs: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {}
    generator = torch.Generator().manual_seed(0)
    if name == "input_values":
        inputs = {name: torch.randn(1, SAMPLES, generator=generator)}
    elif name == "pixel_values" and size is not None:
        inputs = {
            name: torch.randn(1, channels, *((size, size) if isinstance(size, int) else size), generator=generator)
        }
    elif name == "input_features" and frames and mels:
        inputs = {name: torch.randn(1, mels, 2 * frames, generator=generator)}
    elif name is None and not inputs:
        inputs = _guess(model, generator)
    if not inputs or name not in (None, *inputs):
        return None
    if getattr(config, "is_encoder_decoder", False):
        inputs.setdefault("decoder_input_ids", torch.arange(1, 4).expand(len(inputs[name]), -1))
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else None
    vocabulary = getattr(text_config, "vocab_size", None)
    for key, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            inputs[key] = value.to(parameter.device, getattr(model, "dtype", parameter.dtype))
        elif isinstance(value, Tensor):
            inputs[key] = (value % vocabulary if vocabulary and key.endswith("ids") else value).to(parameter.device)
    return inputs
