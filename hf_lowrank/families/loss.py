"""Loss and perplexity on the whole validation set; during training the report callback measures them at the end."""

from collections.abc import Mapping
from typing import Any

from hf_lowrank.families.family import Context, Family, RunStep, Unit, family
from hf_lowrank.families.records import Measurement, Record, record
from hf_lowrank.metrics.perplexity import Estimate, mean_loss, perplexity
from hf_lowrank.metrics.perturb import evaluating
from hf_lowrank.report.catalogue import LOSS

__all__ = ["Loss", "loss_records"]


def loss_records(loss: Estimate, step: int, settings: Mapping[str, Any]) -> list[Record]:
    """Validation loss (nats a token) and perplexity, with standard errors over sequences."""
    named = {"validation_loss": loss, "perplexity": perplexity(loss)}
    return [record(name, number, step, settings, stderr="over sequences") for name, number in named.items()]


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
            loss = mean_loss(*at.sequences.losses(at.model))
        return Measurement(loss_records(loss, at.step, at.sequences.settings()))
