"""Loss and perplexity on the whole validation set; during training the report callback measures them at the end."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_lowrank.families.family import Context, Family, RunStep, Unit, family
from hf_lowrank.families.records import Measurement, Record, record
from hf_lowrank.metrics.perplexity import mean_loss, perplexity
from hf_lowrank.metrics.perturb import evaluating
from hf_lowrank.report.catalogue import LOSS
from hf_lowrank.report.samples import Sampled, Samples

__all__ = ["Loss", "loss_records", "over_sequences"]


def over_sequences(losses: Tensor, tokens: Tensor, units: tuple[str, ...]) -> Samples:
    """Losses (n,) in nats and numbers of predicted tokens (n,) of sequences, with an id for each."""
    return Samples("sequence", units, losses.double().cpu().numpy(), tokens.double().cpu().numpy())


def loss_records(losses: Samples, step: int, settings: Mapping[str, Any]) -> list[Record]:
    """Validation loss (nats a token) and perplexity, with standard errors over sequences.

    Raises:
        ValueError: no token is predicted.
    """
    loss = mean_loss(*(torch.from_numpy(part) for part in (losses.sums[0], losses.weights)))
    value = perplexity(loss).value
    # to first order, as its error
    shares = value + value * len(losses.units) * (losses.sums[0] - loss.value * losses.weights) / losses.weights.sum()
    named = {
        "validation_loss": Sampled(loss.value, losses),
        "perplexity": Sampled(value, Samples.equal("sequence", losses.units, shares)),
    }
    return [record(name, number, step, settings) for name, number in named.items()]


@family
class Loss(Family):
    """Loss and perplexity, with standard errors over sequences."""

    entry = LOSS
    sequences = "all"
    cost = 1

    def units(self, here: RunStep) -> list[Unit]:  # type: ignore[override]
        return [Unit(self.entry.name, here.now)]

    def measure(self, at: Context) -> Measurement:
        assert at.sequences is not None
        with evaluating(at.model):
            losses = over_sequences(*at.sequences.losses(at.model), at.sequences.units())
        return Measurement(loss_records(losses, at.step, at.sequences.settings()))
