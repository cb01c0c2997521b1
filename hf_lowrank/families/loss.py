"""Loss and perplexity on the evaluation set."""

from torch import nn

from hf_lowrank.families.records import Measurement, record
from hf_lowrank.metrics.perplexity import mean_loss, perplexity
from hf_lowrank.metrics.perturb import evaluating
from hf_lowrank.metrics.sequences import EvaluationSet

__all__ = ["measure_loss"]


def measure_loss(model: nn.Module, evaluation: EvaluationSet, step: int) -> Measurement:
    """Validation loss (nats a token) and perplexity, with standard errors over sequences."""
    with evaluating(model):
        loss = mean_loss(*evaluation.losses(model))
    settings = {**evaluation.settings(), "stderr": "over sequences"}
    named = {"validation_loss": loss, "perplexity": perplexity(loss)}
    return Measurement([record(name, found, step, settings) for name, found in named.items()], [])
