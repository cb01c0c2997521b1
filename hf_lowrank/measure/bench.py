"""A run on the bench: which units of work it needs, and how each is done."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from hf_lowrank.checkpoints import check_same_size
from hf_lowrank.conversion import stored_names
from hf_lowrank.families.activation import measure_activations
from hf_lowrank.families.curvature import measure_curvature
from hf_lowrank.families.interpolation import measure_interpolation
from hf_lowrank.families.landscape import measure_landscape, measure_trajectory
from hf_lowrank.families.loss import measure_loss
from hf_lowrank.families.presets import Preset
from hf_lowrank.families.records import Measurement, Record
from hf_lowrank.families.spaces import in_space, no_dense_form
from hf_lowrank.families.spectral import Earlier, measure_spectra
from hf_lowrank.measure.source import Checkpoint, RunSource
from hf_lowrank.measure.units import Unit, headline_of
from hf_lowrank.methods import METHODS
from hf_lowrank.methods.targets import find_targets, native_weights
from hf_lowrank.metrics.alignment import align
from hf_lowrank.metrics.sequences import EvaluationSet
from hf_lowrank.metrics.trajectory import TrajectoryPCA, trajectory_pca

__all__ = ["Bench", "PartialError"]


class PartialError(Exception):
    """A part of a unit could not be measured; `found` is the other part."""

    def __init__(self, reason: str, found: Measurement) -> None:
        super().__init__(reason)
        self.found = found


class Bench:
    """A run on the bench: its models, loaded when a unit needs them and kept while the next ones do.

    Attributes:
        run: the run that is measured.
        reference: the baseline, None without one.
        others: the other runs that are measured along with it.
        preset: settings.
        evaluation, whole: the sequences, a few of them and all; set before the first unit is done.
    """

    def __init__(
        self, run: RunSource, reference: RunSource | None, others: list[RunSource], preset: Preset, device: str
    ) -> None:
        self.run, self.reference, self.others = run, reference, others
        self.preset, self.device = preset, device
        self.evaluation: EvaluationSet | None = None
        self.whole: EvaluationSet | None = None
        self._models: dict[Checkpoint, PreTrainedModel] = {}

    def release(self) -> None:
        """Forget the models."""
        self._models.clear()

    def baseline_at(self, step: int) -> Checkpoint | None:
        """The baseline's checkpoint of a step, or its newest where it has none of that step."""
        if self.reference is None:
            return None
        return self.reference.at(step) or self.reference.checkpoints[-1]

    def partners(self, step: int) -> list[RunSource]:
        """The runs that a barrier is measured to: the baseline at every step, the others at the last common one."""
        found = [] if self.reference is None or self.reference is self.run else [self.reference]
        for other in self.others:
            common = [c.step for c in self.run.checkpoints if other.at(c.step) is not None]
            if other is not self.reference and step == max(common, default=None):
                found.append(other)
        return found

    def spaces(self) -> tuple[str, ...]:
        """The spaces of this run's landscapes: where layers are plain there is one, and it is dense."""
        native = (self.run.config.get("lowrank") or {}).get("form") == "native"
        replaced = self.run.method in METHODS and METHODS[self.run.method].replaces_layers
        return ("native", "dense") if native and replaced else ("dense",)

    def sequences(self, unit: Unit) -> EvaluationSet:
        """What a unit is measured on: all rows for the loss, a few for what takes many forward passes."""
        chosen = self.whole if unit.family == "loss" else self.evaluation
        assert chosen is not None
        return chosen

    @property
    def has_dense_form(self) -> bool:
        """Whether dense matrices compute what the run's models compute."""
        return self.run.method not in METHODS or METHODS[self.run.method].has_dense_form

    def model(self, checkpoint: Checkpoint) -> PreTrainedModel:
        """A checkpoint's model as trained; the two that were asked for last are kept."""
        if checkpoint not in self._models:
            while len(self._models) > 1:
                del self._models[next(iter(self._models))]
            self._models[checkpoint] = checkpoint.load(self.device)
        self._models[checkpoint] = self._models.pop(checkpoint)
        return self._models[checkpoint]

    def units(self, families: tuple[str, ...], steps: tuple[int, ...] | None) -> Iterator[Unit]:
        """The work that the run needs, checkpoint by checkpoint and the cheap metrics first.

        Raises:
            ValueError: a step is asked for that there is no checkpoint of, or the baseline is of another size or has
                another tokenizer.
        """
        checkpoints = self.run.checkpoints
        self.run.check_steps(steps or ())
        if self.reference is not None and self.reference is not self.run:
            check_same_size(self.reference.config, self.run.config, self.reference.name)
            if self.run.has_another_tokenizer(self.reference):
                raise ValueError(
                    f"baseline {self.reference.name} has another tokenizer than {self.run.name}, to which the same "
                    "ids are other texts: take a run of the same size and tokenizer"
                )
        for before, now in zip([None, *checkpoints], checkpoints, strict=False):
            if steps is None or now.step in steps:
                for family in families:
                    yield from self._units(family, now, before)

    def _units(self, family: str, now: Checkpoint, before: Checkpoint | None) -> Iterator[Unit]:
        pair = (now,) if before is None else (now, before)
        checkpoints = self.run.checkpoints
        if family == "spectral":
            yield from (Unit(family, now.step, pair, space=space) for space in self.spaces())
        elif family == "activation":
            if (other := self.baseline_at(now.step)) is not None:
                yield Unit(family, now.step, (now, other))
        elif family == "interpolation":
            if before is not None:
                spaces = self.spaces() if self.has_dense_form else ("native",)
                yield from (Unit(family, now.step, pair, space=space, subject="consecutive") for space in spaces)
            for run in self.partners(now.step):
                at = run.at(now.step)
                yield Unit(family, now.step, (now,) if at is None else (now, at), subject="cross", other=run.name)
        elif family == "curvature":
            spaces = self.spaces() if self.has_dense_form else ("native",)
            yield from (Unit(family, now.step, (now,), space=space) for space in spaces)
        elif family == "landscape":
            yield from (Unit(family, now.step, (now,), space=space) for space in self.spaces())
            if now is checkpoints[-1] and self.preset.landscape.trajectory and before is not None:
                yield Unit(family, now.step, (now, *checkpoints[:-1]), subject="trajectory")
        else:
            yield Unit(family, now.step, (now,))

    def do(self, unit: Unit, progress: Callable[[], Any]) -> Measurement:
        """Do a unit's work."""
        kinds: dict[str, Callable[[Unit, Callable[[], Any]], Measurement]] = {
            "loss": self._loss,
            "spectral": self._spectral,
            "activation": self._activation,
            "interpolation": self._interpolation,
            "curvature": self._curvature,
            "landscape": self._landscape,
        }
        return kinds[unit.family](unit, progress)

    def _loss(self, unit: Unit, progress: Callable[[], Any]) -> Measurement:
        assert self.whole is not None
        return measure_loss(self.model(unit.checkpoints[0]), self.whole, unit.step)

    def _spectral(self, unit: Unit, progress: Callable[[], Any]) -> Measurement:
        now, *before = unit.checkpoints
        space, previous, lost = str(unit.space), None, None
        model = self.model(now)
        if before:
            # the vectors of its own update are not at hand: overlaps of updates are measured during training
            try:
                weights = dict(self._weights(before[0], space))
                previous = Earlier(before[0].step, lambda name: weights[name]() if name in weights else None)
            # whatever is wrong with the checkpoint before, this one's weights are there
            except Exception as error:
                lost = error
        found, _ = measure_spectra(model, unit.step, previous=previous, space=space, keep=False, progress=progress)
        if lost is not None:
            raise PartialError(
                f"no update since step {before[0].step}: {type(lost).__name__}: {lost}", found
            ) from lost
        return found

    def _weights(self, checkpoint: Checkpoint, space: str) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """What gives each matrix of a checkpoint: the dense ones are made one at a time."""
        model = self.model(checkpoint)
        if space == "dense":
            yield from ((t.name, t.dense_weight) for t in find_targets(model))
        else:
            yield from ((t.name, weight.clone) for t, weight in native_weights(model))

    def _activation(self, unit: Unit, progress: Callable[[], Any]) -> Measurement:
        assert self.reference is not None
        assert self.evaluation is not None
        model, baseline = (self.model(checkpoint) for checkpoint in unit.checkpoints)
        step = unit.checkpoints[1].step
        return measure_activations(model, baseline, self.evaluation, unit.step, self.reference.name, step, progress)

    def _curvature(self, unit: Unit, progress: Callable[[], Any]) -> Measurement:
        assert self.evaluation is not None
        model, space = in_space(self.model(unit.checkpoints[0]), str(unit.space))
        return measure_curvature(model, self.evaluation, self.preset.curvature, unit.step, space, progress)

    def _landscape(self, unit: Unit, progress: Callable[[], Any]) -> Measurement:
        assert self.evaluation is not None
        model, settings = self.model(unit.checkpoints[0]), self.preset.landscape
        if unit.subject == "trajectory":
            order = sorted(unit.checkpoints, key=lambda c: c.step)
            names = stored_names(model, order[-1].weights)
            pca = _components([c.weights for c in order], min(settings.trajectory, len(order) - 1), names)
            _, space = in_space(model, "native")
            return measure_trajectory(model, self.evaluation, pca, settings, unit.step, space, progress)
        if unit.space == "dense" and (why := no_dense_form(model)):
            return Measurement([why.record(name, unit.step) for name in headline_of(unit)], [])
        chosen, space = in_space(model, str(unit.space))
        return measure_landscape(chosen, self.evaluation, settings, unit.step, space, progress)

    def _interpolation(self, unit: Unit, progress: Callable[[], Any]) -> Measurement:
        assert self.evaluation is not None
        settings = self.preset.interpolation
        if len(unit.checkpoints) == 1:
            return _marked(unit, f"{unit.other} has no checkpoint of step {unit.step}")
        now, other = (self.model(checkpoint) for checkpoint in unit.checkpoints)
        if unit.other is None:
            ends, before = [in_space(m, str(unit.space)) for m in (other, now)], unit.checkpoints[1].step
            states = (ends[0][0].state_dict(), ends[1][0].state_dict())
            return measure_interpolation(
                ends[1][0], states, self.evaluation, settings.grid(), "consecutive", unit.step,
                (f"step {before}", before), ends[1][1], progress,
            )  # fmt: skip
        if why := (no_dense_form(now) or no_dense_form(other)):
            return _marked(unit, why.text)
        if self._peer(unit).has_another_tokenizer(self.run):
            return _marked(unit, f"{unit.other} has another tokenizer, to which the same ids are other texts")
        return self._cross(unit, now, other, progress)

    def _peer(self, unit: Unit) -> RunSource:
        """The run at a barrier's other end."""
        return next(run for run in [*self.others, self.reference] if run is not None and run.name == unit.other)

    def _cross(
        self, unit: Unit, now: PreTrainedModel, other: PreTrainedModel, progress: Callable[[], Any]
    ) -> Measurement:
        """The barrier to another run, as it is and after the other's units and heads are permuted to match."""
        assert self.evaluation is not None
        assert unit.other is not None
        peer = self._peer(unit)
        subject = "cross_seed" if peer.settings() == self.run.settings() else "cross_method"
        (mine, _), (theirs, _) = (in_space(model, "dense") for model in (now, other))
        a, b = mine.state_dict(), theirs.state_dict()
        noted: dict[str, Any] = {"other_method": peer.method, "other_seed": peer.seed}
        other_end = (unit.other, unit.checkpoints[1].step)

        def barrier(end: Mapping[str, Tensor], name: str) -> Measurement:
            assert self.evaluation is not None
            grid = self.preset.interpolation.cross_grid()
            return measure_interpolation(
                mine, (a, end), self.evaluation, grid, name, unit.step, other_end, "dense", progress, noted
            )

        found = barrier(b, subject)
        try:
            aligned = align(mine, a, b).state
        # a layout whose symmetries are not known here
        except ValueError as error:
            name = f"interpolation/{subject}_aligned/barrier"
            note = {"note": str(error), "other": unit.other}
            return found + Measurement([Record(name, None, None, unit.step, note, "dense")], [])
        return found + barrier(aligned, f"{subject}_aligned")


def _components(checkpoints: list[list[Path]], k: int, names: list[str]) -> TrajectoryPCA:
    """The first k components, or one where the checkpoints lie on a line."""
    try:
        return trajectory_pca(checkpoints, k, names)
    except ValueError:
        if k == 1:
            raise
        return trajectory_pca(checkpoints, 1, names)


def _marked(unit: Unit, note: str) -> Measurement:
    """A row that says why a barrier could not be measured."""
    settings = {"note": note, "other": unit.other}
    return Measurement([Record(headline_of(unit)[0], None, None, unit.step, settings, "dense")], [])
