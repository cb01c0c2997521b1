"""Loss and perplexity on a fixed evaluation set, with standard errors.

L = sum_i l_i / sum_i t_i over sequences i with summed negative log-likelihood l_i (nats) and t_i predicted tokens:
the token-weighted mean. Sequences are the sampling unit, so the standard error is that of a ratio of means.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

__all__ = ["Estimate", "mean_loss", "perplexity", "sequence_losses"]

IGNORED = -100


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error, in the same unit."""

    value: float
    stderr: float


@torch.no_grad()
def sequence_losses(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Summed loss and number of predicted tokens of each sequence.

    Args:
        model: causal language model; it is called as it is, so put it in eval mode first.
        batch: `input_ids` and `labels` (batch, length), -100 where nothing is predicted, and whatever else the
            model takes.

    Returns:
        (batch,) float64 nats and (batch,) counts.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    losses = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return losses.double().sum(1), (labels != IGNORED).sum(1)


def mean_loss(losses: Tensor, tokens: Tensor) -> Estimate:
    """Token-weighted mean loss in nats a token, from per-sequence sums.

    Args:
        losses, tokens: (sequences,) as from `sequence_losses`.

    Raises:
        ValueError: no token is predicted.
    """
    losses, tokens = losses.double(), tokens.double()
    count, total = len(losses), tokens.sum().item()
    if total == 0:
        raise ValueError("the evaluation set predicts no token: every label is -100 or every sequence has one token")
    value = losses.sum().item() / total
    if count < 2:
        return Estimate(value, math.nan)
    residual = losses - value * tokens
    return Estimate(value, math.sqrt(count / (count - 1) * residual.square().sum().item()) / total)


def perplexity(loss: Estimate) -> Estimate:
    """exp of a mean loss in nats, the standard error to first order (delta method)."""
    value = math.exp(min(loss.value, 700.0))
    return Estimate(value, value * loss.stderr)
