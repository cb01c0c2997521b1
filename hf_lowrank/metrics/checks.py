"""Questions to a model before its loss of the next token is measured: does it have one, and can it take the rows?"""

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hf_lowrank.metrics.perturb import evaluating

__all__ = ["check_next_token", "check_rows", "predicts_next_token", "without_autocast", "without_cache"]

# tokens of the sequence that a model is asked with whether it sees the later ones
ASKED = 16
# in half precision a change below this share of the logits' spread may be rounding: a copy in float32 tells, which
# models of fewer parameters than these get
AMBIGUOUS, COPIED = 0.1, 10**9

# by model: whether earlier logits change with the last token
_leaks: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()


def predicts_next_token(model: nn.Module) -> bool:
    """Whether a model's loss is that of the next token; it is not for an encoder or a classifier."""
    can_generate = getattr(model, "can_generate", None)
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return can_generate is None or (can_generate() and not encoder_decoder)


@torch.no_grad()
def check_next_token(model: nn.Module, rows: Mapping[str, Tensor]) -> None:
    """`ValueError` for a model whose loss on these rows is none of the next token, or that cannot take them.

    An encoder, a classifier and the like say so themselves. A model that says it is causal is asked: where another
    last token changes the logits of earlier ones (a BertLMHeadModel without `is_decoder`, say), a loss of the next
    token would be read off the input.

    Args:
        model: in any mode; if it is sharded, every process calls this.
        rows: `input_ids` (n, t) and whatever else the model takes.
    """
    check_rows(model, rows)
    name = type(model).__name__
    if not predicts_next_token(model):
        raise ValueError(f"{name} does not predict the next token: its loss cannot be measured here")
    if model not in _leaks:
        change = _change_of_earlier_logits(model, rows)
        half = any(p.dtype.itemsize < torch.float32.itemsize for p in model.parameters())
        if change and change < AMBIGUOUS and half:
            small = sum(p.numel() for p in model.parameters()) < COPIED
            change = _change_of_earlier_logits(model, rows, in_float32=True) if small else 0.0
        if change is not None:
            _leaks[model] = change > 1e-5
    if _leaks.get(model):
        raise ValueError(
            f"{name} sees later tokens: another last token changes the logits of earlier ones, so its loss of the "
            "next token means nothing; make it causal (config.is_decoder=True in most such models) or leave out "
            "what is measured on its loss"
        )


def _change_of_earlier_logits(model: nn.Module, rows: Mapping[str, Tensor], in_float32: bool = False) -> float | None:
    """How another last token changes the logits before it, in units of their spread; None if that tells nothing.

    A causal model has exactly 0 almost always; experts may round otherwise with another token among them.
    """
    outputs, device = [], next(model.parameters()).device
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        asked = copy.deepcopy(model).float() if in_float32 else model
        for inputs in _with_another_last_token(rows):
            # both with the same random state, for models that draw from it, and none of it is used up
            with evaluating(asked), without_autocast(asked), torch.random.fork_rng(devices):
                inputs = {key: value.to(device) for key, value in inputs.items()}
                outputs.append(asked(**inputs, **without_cache(asked)).logits[0].double())
        scale = outputs[0].std().item()
        change = (outputs[1] - outputs[0])[:-1].square().mean().sqrt().item()
    # a model that cannot be called like this, or has no weights yet: it is not measured either, and says why
    except Exception:
        return None
    # a head that is zero at its start
    return change / scale if scale > 0 else None


def _with_another_last_token(rows: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The beginning of the longest row, as it is and with another token at its end."""
    ids = rows["input_ids"]
    mask = rows.get("attention_mask", torch.ones_like(ids))
    row = int(mask.sum(1).argmax())
    start = int(mask[row].argmax())
    cut = slice(start, start + max(2, min(ASKED, int(mask[row].sum()))))
    before = {
        key: value[row : row + 1, cut]
        for key, value in rows.items()
        if key != "labels" and value.shape[:2] == ids.shape and value.ndim == 2
    }
    last = before["input_ids"][0, -1]
    others = ids[ids != last]
    after = {**before, "input_ids": before["input_ids"].clone()}
    after["input_ids"][0, -1] = others[0] if len(others) else (last - 1).abs()
    return before, after


def check_rows(model: nn.Module, rows: Mapping[str, Tensor]) -> None:
    """`ValueError` for rows that are longer than the model's table of positions, or have ids beyond its vocabulary.

    A GPU would say no more than "device-side assert", and be lost to the process.
    """
    name, (length, positions) = type(model).__name__, (rows["input_ids"].shape[1], _positions(model))
    if positions is not None and length > positions:
        raise ValueError(
            f"rows of {length} tokens are longer than the {positions} that {name} has positions for: cut them, with "
            f"sequence_length={positions} for example"
        )
    largest, embeddings = int(rows["input_ids"].max()), _embeddings(model)
    if embeddings is not None and largest >= embeddings.num_embeddings:
        raise ValueError(
            f"rows with the token id {largest}, and {name} has a vocabulary of {embeddings.num_embeddings}: tokenize "
            "them with the model's own tokenizer"
        )


def _embeddings(model: nn.Module) -> nn.Embedding | None:
    try:
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
    # transformers raises where a model has none, and other models lack the method
    except (AttributeError, NotImplementedError):
        return None
    return embeddings if isinstance(embeddings, nn.Embedding) else None


def _positions(model: nn.Module) -> int | None:
    """Tokens that the model's table of positions has room for; None if positions are computed, as by RoPE."""
    text = getattr(model, "config", None)
    text = getattr(text, "get_text_config", lambda: text)()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1 or getattr(text, "rope_parameters", None):
        return None
    # RoBERTa and its kin count positions from behind the padding's index
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not _embeddings(model)]
    paddings = [m.padding_idx + 1 for m in tables if m.num_embeddings == limit and m.padding_idx is not None]
    return limit - max(paddings, default=0)


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """Run the forward pass in the parameters' own precision, also if accelerate has wrapped it in autocast."""
    wrapped, original = model.__dict__.get("forward"), model.__dict__.get("_original_forward")
    if wrapped is None or original is None:
        yield
        return
    model.forward = original
    try:
        yield
    finally:
        model.forward = wrapped


def without_cache(model: nn.Module) -> dict[str, Any]:
    """Options for a forward pass without a cache of keys and values, which is not needed here."""
    takes = inspect.signature(model.forward).parameters
    return {"use_cache": False} if "use_cache" in takes else {}
