"""A run's units of work: which it needs, and the models and sequences that each is done with."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from hf_lowrank.checkpoints import check_same_size
from hf_lowrank.families.family import Context, Peer, Preset, Run, RunStep, Unit, get_family
from hf_lowrank.families.records import Measurement
from hf_lowrank.measure.source import Checkpoint, RunSource
from hf_lowrank.methods import LowRankConfig, get_method
from hf_lowrank.metrics.sequences import EvaluationSet

__all__ = ["RunUnits"]


class RunUnits:
    """The units of one run; its models are loaded when a unit needs them and kept while the next ones do.

    Attributes:
        run: the run that is measured.
        baseline: the run that it is compared with, None without one.
        others: the other runs that are measured along with it.
        preset: settings of the families.
        few, whole: a few of the sequences and all of them; set before the first unit is done.
    """

    def __init__(
        self, run: RunSource, baseline: RunSource | None, others: list[RunSource], preset: Preset, device: str
    ) -> None:
        self.run, self.baseline, self.others = run, baseline, others
        self.preset, self.device = preset, device
        self.few: EvaluationSet | None = None
        self.whole: EvaluationSet | None = None
        self._models: dict[Checkpoint, PreTrainedModel] = {}

    def release(self) -> None:
        """Free the models."""
        self._models.clear()

    def units(self, families: tuple[str, ...], steps: tuple[int, ...] | None) -> Iterator[Unit]:
        """The work that the run needs, checkpoint by checkpoint and the cheap families first.

        Raises:
            ValueError: there is no checkpoint of a step that is asked for, or the baseline is of another size or has
                another tokenizer.
        """
        self.run.check_steps(steps or ())
        if self.baseline is not None and self.baseline is not self.run:
            check_same_size(self.baseline.config, self.run.config, self.baseline.name)
            if self.run.has_another_tokenizer(self.baseline):
                raise ValueError(
                    f"baseline {self.baseline.name} has another tokenizer than {self.run.name}, to which the same "
                    "ids are other texts: take a run of the same size and tokenizer"
                )
        method = _method(self.run.method)
        native = (self.run.config.get("lowrank") or {}).get("form") == "native"
        spaces = ("native", "dense") if native and method is not None and method.replaces_layers else ("dense",)
        exact_spaces = spaces if method is None or method.has_dense_form else ("native",)
        checkpoints = self.run.checkpoints
        for previous, now in zip([None, *checkpoints], checkpoints, strict=False):
            for name in families if steps is None or now.step in steps else ():
                family = get_family(name)
                settings = self.preset.of(family)
                yield from family.units(
                    RunStep(self.run, now, previous, self.baseline, self.others, spaces, exact_spaces, settings)
                )

    def settings(self, unit: Unit) -> Any:
        """The settings of a unit's family."""
        return self.preset.of(get_family(unit.family))

    def sequences(self, unit: Unit) -> EvaluationSet | None:
        """What a unit is measured on, None if it needs no sequences."""
        return {"few": self.few, "all": self.whole, None: None}[get_family(unit.family).sequences]

    def do(self, unit: Unit, progress: Callable[[], Any]) -> Measurement:
        """Measure a unit; raises whatever prevents it, a `PartialError` where a part was measured."""
        earlier = sorted(unit.checkpoints, key=lambda checkpoint: checkpoint.step) if unit.earlier else []
        at = Context(
            model=self._model(unit.now),
            step=unit.step,
            settings=self.settings(unit),
            sequences=self.sequences(unit),
            space=unit.space or "native",
            subject=unit.subject,
            previous=self._peer(f"step {unit.previous.step}", unit.previous) if unit.previous else None,
            baseline=self._peer(self.baseline.name, unit.baseline) if self.baseline and unit.baseline else None,
            other=self._peer(unit.other.name, unit.other.at(unit.step), unit.other) if unit.other else None,
            run=self.run,
            earlier=[checkpoint.weights for checkpoint in earlier],
            progress=progress,
        )
        return get_family(unit.family).measure(at)

    def _peer(self, name: str, checkpoint: Any, run: Run | None = None) -> Peer:
        load = None if checkpoint is None else partial(self._model, checkpoint)
        return Peer(name, None if checkpoint is None else checkpoint.step, load, run=run)

    def _model(self, checkpoint: Any) -> PreTrainedModel:
        """A checkpoint's model as trained; the two that were asked for last are kept."""
        if checkpoint not in self._models:
            while len(self._models) > 1:
                del self._models[next(iter(self._models))]
            self._models[checkpoint] = checkpoint.load(self.device)
        self._models[checkpoint] = self._models.pop(checkpoint)
        return self._models[checkpoint]


def _method(name: str) -> type[LowRankConfig] | None:
    """The method of a run, None if it is not known here."""
    try:
        return get_method(name)
    except ValueError:
        return None
