"""Loss and perplexity on a fixed evaluation set, with standard errors.

L = sum_i l_i / sum_i t_i over sequences i with summed negative log-likelihood l_i (nats) and t_i predicted tokens:
the token-weighted mean. Sequences are the sampling unit, so the standard error is that of a ratio of means.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

__all__ = ["Estimate", "losses_of_logits", "mean_loss", "perplexity"]

IGNORED = -100


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error, in the same unit."""

    value: float
    stderr: float


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
    """exp of a mean loss in nats; the standard error is of first order (delta method)."""
    value = math.exp(min(loss.value, 700.0))
    return Estimate(value, value * loss.stderr)


@torch.no_grad()
def losses_of_logits(logits: Tensor, labels: Tensor, shifted: bool = True) -> tuple[Tensor, Tensor]:
    """Summed loss and number of predicted tokens of each sequence, from logits that are already in memory.

    `sequence_losses` computes the same without holding all logits. This keeps one sequence's in float32 beside them.

    Args:
        logits: (n, t, vocabulary).
        labels: (n, t), -100 if nothing is predicted.
        shifted: whether position i predicts label i + 1; otherwise label i, as in encoders and encoder-decoders.

    Returns:
        (n,) nats, in float64 if the device supports it, and (n,) counts.
    """
    logits, targets = (logits[:, :-1], labels[:, 1:]) if shifted else (logits, labels)
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    sums = [
        F.cross_entropy(row.float(), target, ignore_index=IGNORED, reduction="none").sum(dtype=exact)
        for row, target in zip(logits, targets, strict=True)
    ]
    return torch.stack(sums), (targets != IGNORED).sum(1)
