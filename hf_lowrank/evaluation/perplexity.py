"""Perplexity in a Trainer's evaluation, through `evaluate`."""

import inspect
import logging
import math
import sys
from collections.abc import Callable
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import evaluate
import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer

from hf_lowrank.evaluation.modules import path
from hf_lowrank.metrics.perplexity import losses_of_logits, mean_loss
from hf_lowrank.metrics.sequences import check_next_token, predicts_next_token, without_autocast

__all__ = ["perplexity_metrics"]

logger = logging.getLogger(__name__)

# whether a model's own loss shifts the labels, by model
_shifted: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()


def perplexity_metrics() -> dict[str, Callable[..., Any]]:
    """`Trainer(..., **perplexity_metrics())`: `eval_perplexity` and `eval_perplexity_stderr` at every evaluation.

    Each batch's logits come down to a loss and a number of tokens a sequence before Trainer keeps or gathers anything,
    so memory does not grow with the evaluation set. The mean is weighted by tokens, in contrast to `eval_loss`, which
    Trainer averages over batches: exp(eval_loss) is another number where sequences or batches differ in length.

    Logits and labels are aligned as in the model's own loss: the next token's of a causal model, the same position's
    of a masked one and of an encoder-decoder. A model that is causal by name and sees later tokens has no perplexity,
    and the log says so once.

    Of a mixture of experts, `eval_loss` is the model's own loss: with the routers' auxiliary loss where
    `output_router_logits` is set. `eval_perplexity` is that of the tokens alone.

    With `--prediction_loss_only` Trainer computes no metrics. Where the model's loss needs no logits (Liger's fused
    one), that saves the memory of one batch's.

    Returns:
        `compute_metrics`, which takes `batch_eval_metrics` as well, and `preprocess_logits_for_metrics`.
    """
    # in memory: on disk, processes that evaluate side by side would wait for each other's file
    module = evaluate.load(path("perplexity"), module_type="measurement", keep_in_memory=True)

    def compute_metrics(found: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        # a list of batches with `eval_do_concat_batches=False`
        batches = found.predictions if isinstance(found.predictions, list) else [found.predictions]
        for batch in batches:
            losses, tokens = np.asarray(batch.cpu() if isinstance(batch, Tensor) else batch).T
            if np.isnan(tokens).any():
                return {}
            module.add_batch(losses=losses, tokens=tokens.astype(np.int64))
        if not compute_result:
            return {}
        return {name: value for name, value in module.compute().items() if name.startswith("perplexity")}

    return {"compute_metrics": compute_metrics, "preprocess_logits_for_metrics": _sequence_sums}


def _evaluated_model() -> nn.Module | None:
    """The model that the calling Trainer evaluates: it hands on logits and labels alone."""
    frame = sys._getframe().f_back
    while frame is not None:
        if isinstance(trainer := frame.f_locals.get("self"), Trainer):
            return trainer.accelerator.unwrap_model(trainer.model)
        frame = frame.f_back
    return None


def _is_shifted(model: nn.Module, vocabulary: int) -> bool:
    """Whether position i predicts label i + 1 in the model's own loss; `ValueError` where it sees later tokens."""
    ids = (3 + 7 * torch.arange(12, device=next(model.parameters()).device))[None] % vocabulary
    causal = predicts_next_token(model)
    if causal:
        check_next_token(model, {"input_ids": ids})
    if model not in _shifted:
        try:
            # without the routers' auxiliary loss
            plain = {"output_router_logits": False} if _takes(model, "output_router_logits") else {}
            with torch.no_grad(), without_autocast(model):
                own = model(input_ids=ids, labels=ids, **plain)
            away = [
                abs(mean_loss(*losses_of_logits(own.logits, ids, s)).value - own.loss.item()) for s in (True, False)
            ]
            _shifted[model] = away[0] < away[1] if away[0] != away[1] else causal
        # a model that needs more than tokens, or keeps its logits to itself
        except Exception:
            _shifted[model] = causal
    return _shifted[model]


def _takes(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters


@cache
def _warn_once(message: str) -> None:
    logger.warning("no perplexity: %s", message)


def _logits(outputs: Any, labels: Tensor) -> Tensor:
    """The logits among what a model gives beside its loss: a mixture of experts gives its auxiliary loss first."""
    given = [outputs] if isinstance(outputs, Tensor) else [x for x in outputs if isinstance(x, Tensor)]
    fitting = [x for x in given if x.ndim == 3 and x.shape[:-1] == labels.shape]
    return (fitting or given)[0]


def _sequence_sums(outputs: Any, labels: Tensor) -> Tensor:
    """(n, 2): summed loss and number of predicted tokens of each sequence; NaN if there is no such loss."""
    logits, model = _logits(outputs, labels), _evaluated_model()
    try:
        if labels.ndim != 2 or logits.shape[:-1] != labels.shape:
            raise ValueError(f"logits of shape {tuple(logits.shape)} are none of labels {tuple(labels.shape)}")
        shifted = model is None or _is_shifted(model, logits.shape[-1])
    except ValueError as error:
        _warn_once(str(error))
        return torch.full((len(labels), 2), math.nan, device=labels.device)
    losses, tokens = losses_of_logits(logits, labels, shifted)
    return torch.stack([losses, tokens.to(losses.dtype)], dim=1)
