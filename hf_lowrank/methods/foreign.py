"""Linear layers that other libraries have changed: PEFT's adapters beside a weight, and weights stored as codes.

Both are told by what they have and not by a library's classes, none of which need be installed.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hf_lowrank.methods.base import ReparameterizedLinear
from hf_lowrank.sharding import is_dtensor

__all__ = ["base_layer", "foreign_weight", "is_adapted", "is_foreign", "is_quantized"]

# scales that multiply the codes, and what else an fp8 layer may hold that does not change its weight
SCALES = ("weight_scale_inv", "weight_scale")
BESIDE = {"weight", "bias", "activation_scale", "input_scale", *SCALES}


def is_adapted(module: nn.Module) -> bool:
    """Whether it is a layer of PEFT's, with adapters beside the layer that it stands for."""
    peft_like = hasattr(module, "base_layer") and callable(getattr(module, "merge", None))
    return peft_like and not isinstance(module, ReparameterizedLinear)


def base_layer(module: nn.Module) -> nn.Module:
    """The layer inside PEFT's, or the layer itself."""
    while is_adapted(module):
        module = module.base_layer  # type: ignore[assignment]
    return module


def is_quantized(module: nn.Module) -> bool:
    """Whether it is a linear layer whose weight is stored as codes."""
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or not isinstance(weight, Tensor):
        # the layers of GPTQ, AWQ and HQQ
        return any(hasattr(module, name) for name in ("qweight", "W_q"))
    wrapped = is_traceable_wrapper_subclass(weight) and not is_dtensor(weight)
    return wrapped or weight.dtype.itemsize == 1 or not weight.dtype.is_floating_point


def is_foreign(module: nn.Module) -> bool:
    """Whether the matrix that the layer multiplies with is not its weight as it lies there."""
    return is_adapted(module) or is_quantized(module)


def foreign_weight(layer: nn.Module, name: str) -> Tensor:
    """The matrix that the layer multiplies with, as it is stored (transposed in a Conv1D), detached.

    Adapters are merged in float32 or better, codes are dequantised.

    Raises:
        ValueError: neither PEFT nor torch can tell the matrix; the message names the layer.
    """
    if not is_adapted(layer):
        return _numbers(layer, name).detach()
    adapted: Any = layer
    base = base_layer(layer)
    if adapted.disable_adapters:
        return _numbers(base, name).detach()
    quantized = is_quantized(base)
    if not quantized:
        adapted = copy.deepcopy(adapted).to(torch.promote_types(_numbers(base, name).dtype, torch.float32))
    active = set(adapted.active_adapters) - set(adapted.merged_adapters)
    variants = {
        *getattr(adapted, "lora_variant", {}),
        *(a for a, on in getattr(adapted, "use_dora", {}).items() if on),
    }
    if hasattr(adapted, "lora_A") and not active & variants:
        weight = _numbers(base_layer(adapted), name).detach()
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for adapter in active & set(adapted.lora_A):
            weight = weight + adapted.get_delta_weight(adapter).detach().to(weight)
        return weight
    if quantized:
        raise ValueError(f"{name} is quantised, and its {type(layer).__name__} cannot be merged: load it unquantised")
    adapted.merge()
    return _numbers(base_layer(adapted), name).detach()


def _numbers(layer: nn.Module, name: str) -> Tensor:
    """The layer's weight, dequantised if it is stored as codes."""
    weight: Any = getattr(layer, "weight", None)
    if not is_quantized(layer):
        return weight
    kind = type(layer).__name__ if weight is None else f"{type(weight).__name__} of {weight.dtype}"
    trouble = f"{name} is quantised ({kind}) in a way that cannot be undone here: load the model dequantised"
    if type(weight).__name__ in ("Params4bit", "Int8Params"):
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        return dequantize_bnb_weight(weight, getattr(layer, "state", None))
    if callable(dequantize := getattr(weight, "dequantize", None)) and is_traceable_wrapper_subclass(weight):
        return dequantize()
    beside = {key for key, _ in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]}
    if weight is None or not str(weight.dtype).startswith("torch.float8") or weight.ndim != 2 or beside - BESIDE:
        raise ValueError(trouble)
    numbers: Tensor = weight.float()
    for scale in (scale for key in SCALES if isinstance(scale := getattr(layer, key, None), Tensor)):
        scale = _spread(scale.float(), weight.shape, getattr(layer, "block_size", None))
        if torch.broadcast_shapes(scale.shape, weight.shape) != weight.shape:
            raise ValueError(trouble)
        numbers = numbers * scale
    return numbers


def _spread(scale: Tensor, shape: torch.Size, blocks: tuple[int, int] | None) -> Tensor:
    """One scale for all, one a row, or one a block, in a shape that multiplies a matrix."""
    if scale.ndim == 1 and len(scale) > 1:
        return scale[:, None]
    for dim, length in enumerate(shape):
        if scale.ndim == 2 and scale.shape[dim] not in (1, length):
            scale = scale.repeat_interleave(blocks[dim] if blocks else length // scale.shape[dim], dim)
            scale = scale.narrow(dim, 0, min(length, scale.shape[dim]))
    return scale
