"""A family of metrics that another package defines: the size of a model's weights, and of their change."""

from dataclasses import dataclass

import hf_lowrank as lr
from hf_lowrank.families import Family, Measurement, MetricCallback, Unit, family, record
from hf_lowrank.figures.drawing import metrics_over_steps
from hf_lowrank.report.catalogue import Entry, HeadlineMetric, Picture

ENTRY = Entry(
    "toy",
    "Toy numbers",
    (
        HeadlineMetric(None, "toy/weights/size", "Mean size of the weights", "mean absolute weight"),
        HeadlineMetric(None, "toy/change/size", "Mean size of the change", "mean absolute change"),
    ),
    (Picture("toy_over_steps.png", "Toy numbers over training", "toy.json", "toy_family:toy_over_steps"),),
)


@dataclass(frozen=True)
class ToySettings:
    """`scale` multiplies every number."""

    scale: float = 1.0


def _weights(model):
    return {name: p.detach().double() for name, p in model.named_parameters()}


@family
class Toy(Family):
    """Mean absolute weight, and the change since the checkpoint before where there is one."""

    entry = ENTRY
    Settings = ToySettings
    sequences = None

    def units(self, here):
        yield Unit(self.entry.name, here.now, previous=here.previous)

    def measure(self, at):
        weights, count = _weights(at.model), sum(p.numel() for p in at.model.parameters())
        settings, scale = {"scale": at.settings.scale}, at.settings.scale
        size = scale * sum(float(w.abs().sum()) for w in weights.values()) / count
        measured = Measurement([record("toy/weights/size", size, at.step, settings, parameters=count)])
        if at.previous is not None:
            before = _weights(at.previous.load())
            change = scale * sum(float((w - before[name]).abs().sum()) for name, w in weights.items()) / count
            reference = {"since": at.previous.step}
            measured.records.append(record("toy/change/size", change, at.step, settings, reference=reference))
        return measured


class ToyCallback(MetricCallback):
    """The toy numbers during training."""

    family = Toy


def toy_over_steps(records):
    """Draw the toy numbers."""
    return metrics_over_steps(records, ENTRY.metrics, "Toy numbers over training")


def train(folder, resume=None, callbacks=(), settings=None):
    """Four steps with the toy's callback."""
    from tiny_runs import METHODS, arguments, make_trainer

    args = arguments(folder, max_steps=4, save_strategy="steps", save_steps=2)
    trainer = make_trainer(METHODS["sltrain"], args, callbacks=list(callbacks))
    lr.attach(trainer, ToyCallback(every=1, budget=None, settings=settings))
    trainer.train(resume_from_checkpoint=resume)
