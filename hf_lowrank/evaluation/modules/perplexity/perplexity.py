"""Perplexity and token-weighted mean loss with standard errors, from the losses of sequences. The measurement of the
same
name at evaluate-measurement runs a model of the Hub over texts; this one takes the losses that an evaluation has
computed already, of any model: in a Trainer's `compute_metrics` for example.
"""

import math
from typing import Any

import datasets
import torch

from hf_lowrank.evaluation import measurement
from hf_lowrank.metrics.perplexity import mean_loss, perplexity


class Perplexity(measurement.Measurement):
    """Perplexity of losses, token-weighted, with its standard error.

    Args:
        losses: summed negative log-likelihood of each sequence, in nats.
        tokens: number of predicted tokens of each sequence. Losses of single tokens take 1 each, and the
            standard error
            is then over tokens.

    Returns:
        dict of float:
        perplexity: exp of the token-weighted mean loss,
        loss: that mean, in nats a token,
        tokens: how many there are in all.
        With two or more sequences also perplexity_stderr (to first order) and loss_stderr, over sequences.

    Raises:
        ValueError: different numbers of losses and tokens, or no predicted token.

    Examples:

        >>> import evaluate
        >>> from hf_lowrank.evaluation.modules import path
        >>> perplexity = evaluate.load(path("perplexity"), module_type="measurement")
        >>> results = perplexity.compute(losses=[40.0, 20.0, 60.0], tokens=[20, 10, 30])
        >>> print(results["loss"], round(results["perplexity"], 4), results["perplexity_stderr"])
        2.0 7.3891 0.0
    """

    features = datasets.Features({"losses": datasets.Value("float64"), "tokens": datasets.Value("int64")})
    citations = ("beyondperplexity2026", "jelinek1977perplexity")
    reference_urls = ("https://arxiv.org/abs/2605.13652",)

    def _compute(self, losses: list[Any], tokens: list[Any]) -> dict[str, float]:
        counts = torch.tensor(tokens, dtype=torch.float64)
        loss = mean_loss(torch.tensor(losses, dtype=torch.float64), counts)
        results = {"tokens": float(counts.sum())}
        for name, found in {"loss": loss, "perplexity": perplexity(loss)}.items():
            results[name] = found.value
            if math.isfinite(found.stderr):
                results[f"{name}_stderr"] = found.stderr
        return results
