"""Perplexity in a Trainer's evaluation, through `evaluate`."""

from collections.abc import Callable
from typing import Any

import evaluate
import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from hf_lowrank.evaluation.modules import path
from hf_lowrank.metrics.perplexity import losses_of_logits

__all__ = ["perplexity_metrics"]


def perplexity_metrics() -> dict[str, Callable[..., Any]]:
    """`Trainer(..., **perplexity_metrics())`: `eval_perplexity` and `eval_perplexity_stderr` at every evaluation.

    Each batch's logits come down to a loss and a number of tokens a sequence before Trainer keeps or gathers anything,
    so memory does not grow with the evaluation set. The mean is weighted by tokens, in contrast to `eval_loss`, which
    Trainer averages over batches: exp(eval_loss) is another number where sequences or batches differ in length.

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
            module.add_batch(losses=losses, tokens=tokens.astype(np.int64))
        if not compute_result:
            return {}
        return {name: value for name, value in module.compute().items() if name.startswith("perplexity")}

    return {"compute_metrics": compute_metrics, "preprocess_logits_for_metrics": _sequence_sums}


def _sequence_sums(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """(n, 2): summed loss and number of predicted tokens of each sequence."""
    # a model that gives more than logits gives them first
    losses, tokens = losses_of_logits(logits if isinstance(logits, Tensor) else logits[0], labels)
    return torch.stack([losses, tokens.to(losses.dtype)], dim=1)
