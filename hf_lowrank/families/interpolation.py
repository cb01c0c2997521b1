"""Barriers on the line between two models (H6, H7, and the seed-to-seed null beside them)."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_lowrank.families.callback import BUDGET, SequenceCallback
from hf_lowrank.families.family import Context, Family, Peer, Run, RunStep, Unit, family
from hf_lowrank.families.loss import over_sequences
from hf_lowrank.families.records import Measurement, Record, record
from hf_lowrank.families.snapshots import Snapshot
from hf_lowrank.families.spaces import in_space, no_dense_form
from hf_lowrank.metrics.alignment import align
from hf_lowrank.metrics.interpolation import barrier, barrier_weights, chord_weights, each_between
from hf_lowrank.metrics.perplexity import mean_loss
from hf_lowrank.metrics.perturb import evaluating
from hf_lowrank.report.catalogue import INTERPOLATION
from hf_lowrank.report.samples import Sampled
from hf_lowrank.sharding import all_gather_object, is_sharded, local, reshard

__all__ = [
    "Interpolation", "InterpolationCallback", "InterpolationSettings", "barrier_numbers", "loss_path_records",
]  # fmt: skip

Grid = NDArray[np.float64]
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class InterpolationSettings:
    """The grids of positions.

    Attributes:
        points: positions from 0 to 1 between neighbouring checkpoints.
        cross_points: positions between two runs.
        cross_sequences: how many of the sequences barriers between two runs are measured on, the first ones; None for
            all.
        beyond: how far the line between two runs is extended at both ends.

    Raises:
        ValueError: fewer than 3 points, no sequence, or an extension that is negative or leaves 0 and 1 off the grid.
    """

    points: int = 13
    cross_points: int = 13
    beyond: float = 0.0
    cross_sequences: int | None = None

    def __post_init__(self) -> None:
        if self.cross_sequences is not None and self.cross_sequences < 1:
            raise ValueError(f"cross_sequences={self.cross_sequences}: give 1 or more, or None for all")
        if self.points < 3 or self.cross_points < 3:
            raise ValueError(f"points={self.points}, cross_points={self.cross_points}: give 3 or more")
        self.cross_grid()

    def grid(self) -> Grid:
        """Positions between neighbouring checkpoints."""
        return np.linspace(0, 1, self.points)

    def cross_grid(self) -> Grid:
        """Positions between two runs; 0 and 1 are among them exactly."""
        alphas = np.linspace(-self.beyond, 1 + self.beyond, self.cross_points)
        for end in (0.0, 1.0):
            nearest = int(np.abs(alphas - end).argmin())
            if self.beyond < 0 or abs(alphas[nearest] - end) > 1e-9:
                raise ValueError(
                    f"cross_points={self.cross_points}, beyond={self.beyond}: 0 and 1 must fall on the grid; "
                    "21 points and 0.0 do that, and 31 points and 0.25"
                )
            alphas[nearest] = end
        return alphas


@family
class Interpolation(Family):
    """Barriers to the checkpoint before (`consecutive`) and to other runs (`cross_method`, `cross_seed`).

    A barrier to another run is measured as it is and after the other's units and heads are permuted to match.
    """

    entry = INTERPOLATION
    Settings = InterpolationSettings
    study = InterpolationSettings(points=21, cross_points=21, cross_sequences=500)
    subjects = ("consecutive", "cross")
    cost = 13

    def units(self, here: RunStep) -> Iterator[Unit]:
        name = self.entry.name
        if here.previous is not None:
            for space in here.exact_spaces:
                yield Unit(name, here.now, space, "consecutive", previous=here.previous)
        for run in self._partners(here):
            yield Unit(name, here.now, subject="cross", other=run)

    def _partners(self, here: RunStep) -> Iterator[Run]:
        """The runs at the other end: the baseline at every step, the others at the last step that both have."""
        if here.baseline is not None and here.baseline is not here.run:
            yield here.baseline
        for other in here.others:
            common = [c.step for c in here.run.checkpoints if other.at(c.step) is not None]
            if other is not here.baseline and here.now.step == max(common, default=None):
                yield other

    def measure(self, at: Context) -> Measurement:
        return self._to_another_run(at) if at.subject == "cross" else self._to_the_previous(at)

    def _to_the_previous(self, at: Context) -> Measurement:
        assert at.previous is not None
        model, space = in_space(at.model, at.space)
        ends = _kept_ends(model, at.previous)
        if ends is None and at.previous.load is not None:
            ends = (in_space(at.previous.load(), at.space)[0].state_dict(), model.state_dict())
        if ends is None:
            return Measurement()
        reference = {"other": at.previous.name, "other_step": at.previous.step}
        why = no_dense_form(at.model)
        about = {} if why is None else {"note": why}
        return loss_path_records(at, model, ends, "consecutive", space, {}, reference, about)

    def _to_another_run(self, at: Context) -> Measurement:
        peer = at.other
        assert peer is not None
        if peer.load is None:
            return _not_measured(at, "cross_method", f"{peer.name} has no checkpoint of step {at.step}")
        theirs = peer.load()
        if why := (no_dense_form(at.model) or no_dense_form(theirs)):
            return _not_measured(at, "cross_method", why)
        assert peer.run is not None
        assert at.run is not None
        if peer.run.has_another_tokenizer(at.run):
            note = f"{peer.name} has another tokenizer, to which the same ids are other texts"
            return _not_measured(at, "cross_method", note)
        subject = "cross_seed" if peer.run.settings() == at.run.settings() else "cross_method"
        mine, other = in_space(at.model, "dense")[0], in_space(theirs, "dense")[0]
        a, b = mine.state_dict(), other.state_dict()
        settings, reference = {"other": peer.name}, {"other_step": peer.step}
        about = {"other_method": peer.run.method, "other_seed": peer.run.seed}
        measured = loss_path_records(at, mine, (a, b), subject, "dense", settings, reference, about)
        try:
            aligned = align(mine, a, b).state
        # a layout whose symmetries are not known here
        except ValueError as error:
            return measured + _not_measured(at, f"{subject}_aligned", str(error))
        ends = (a, aligned)
        return measured + loss_path_records(at, mine, ends, f"{subject}_aligned", "dense", settings, reference, about)

    def across_runs(
        self, runs: Sequence[Run], measured_of: Callable[[Run], Measurement]
    ) -> dict[str, list[dict[str, Any]]]:
        """`barrier_map`: the barrier of every two runs at the last step that both have, measured by either."""
        pairs: dict[tuple[str, str, bool], dict[str, Any]] = {}
        for run in runs:
            for number in measured_of(run).records:
                _, subject, metric = number.name.split("/")
                if metric == "barrier" and subject.startswith("cross_") and number.value is not None:
                    key = (run.name, str(number.settings.get("other")), subject.endswith("_aligned"))
                    if key not in pairs or pairs[key]["step"] <= number.step:
                        pairs[key] = {"step": number.step, "barrier": number.value, "stderr": number.stderr}
        rows = []
        for a, b in permutations(runs, 2):
            for aligned in (False, True):
                pair = pairs.get((a.name, b.name, aligned)) or pairs.get((b.name, a.name, aligned))
                if pair is not None:
                    ends = {"run_a": a.name, "method_a": a.method, "run_b": b.name, "method_b": b.method}
                    rows.append(ends | {"aligned": aligned} | pair)
        return {"barrier_map": rows} if rows else {}


def _not_measured(at: Context, subject: str, note: str) -> Measurement:
    """A record that says why a barrier to another run could not be measured."""
    assert at.other is not None
    name, settings = f"interpolation/{subject}/barrier", {"other": at.other.name}
    return Measurement([Record(name, None, None, at.step, settings, "dense", about={"note": note})])


def loss_path_records(
    at: Context,
    model: nn.Module,
    ends: tuple[State, State],
    subject: str,
    space: str | None,
    settings: Mapping[str, Any],
    reference: Mapping[str, Any],
    about: Mapping[str, Any] | None = None,
) -> Measurement:
    """The barrier between two state dicts of one architecture.

    Args:
        at: gives sequences, grid and step; where its sequences are shared, every process calls this.
        model: gives the architecture; its own weights end as they were.
        ends: the state dicts at 0 and 1.
        subject: `consecutive`, `cross_method`, `cross_seed`, or the latter two with `_aligned`.
        space: what the parameters are.
        settings, reference, about: of the records; one of the first two names the `other` end, and `reference` its
            `other_step`.

    Raises:
        ValueError: the state dicts are of different architectures.
    """
    sequences = at.sequences
    assert sequences is not None
    if subject == "consecutive":
        alphas = at.settings.grid()
    else:
        alphas, few = at.settings.cross_grid(), at.settings.cross_sequences
        sequences = sequences if few is None else sequences.first(few)

    def losses(model: nn.Module) -> tuple[Tensor, Tensor]:
        result = sequences.losses(model)
        at.progress()
        return result

    with evaluating(model):
        path = each_between(model, ends[0], ends[1], alphas, losses)
    means = [mean_loss(*point) for point in path]
    sums, tokens = np.stack([point[0].numpy() for point in path]), path[0][1]
    settings = {**settings, "points": len(alphas), "from": float(alphas[0]), "to": float(alphas[-1])}
    settings |= sequences.settings()

    measured = Measurement()
    for key, number in barrier_numbers(alphas, sums, tokens, sequences.units()).items():
        name = f"interpolation/{subject}/{key}"
        measured.records.append(record(name, number, at.step, settings, space, reference, **(about or {})))
    row = {"step": at.step, "space": space, "subject": subject, "other": {**settings, **reference}["other"]}
    row["other_step"] = reference["other_step"]
    for alpha, mean in zip(alphas, means, strict=True):
        measured.rows.append({**row, "alpha": float(alpha), "loss": mean.value, "stderr": mean.stderr})
    return measured


def barrier_numbers(alphas: Grid, sums: Grid, tokens: Tensor, units: tuple[str, ...]) -> dict[str, Sampled | float]:
    """The barriers of a path, with errors over sequences, and where the highest point is.

    Args:
        alphas: (p,) positions.
        sums: (p, n) summed losses of the sequences.
        tokens: (n,) their numbers of predicted tokens.
        units: (n,) their ids.
    """
    values = np.array([mean_loss(torch.from_numpy(point), tokens).value for point in sums])

    def weighted(weights: Grid) -> Sampled:
        # a loss that does not count may be infinite
        parts = torch.from_numpy(weights[weights != 0] @ sums[weights != 0])
        return Sampled(mean_loss(parts, tokens).value, over_sequences(parts, tokens, units))

    return {
        "barrier": weighted(barrier_weights(alphas, values)),
        "barrier_chord": weighted(chord_weights(alphas, values)),
        "barrier_alpha": barrier(alphas, values).alpha,
    }


def _kept_ends(model: nn.Module, previous: Peer) -> tuple[State, State] | None:
    """The previous weights that a callback has kept and those of now; None if they are not at hand everywhere."""
    if previous.tensor is None:
        return None
    now = _own_state(model)
    # another process's file stands for this one's where all weights are whole; a shard is found here alone
    before = {name: previous.tensor(name) for name in now}
    if not all(all_gather_object(all(tensor is not None for tensor in before.values()))):
        return None
    # they stay on the CPU: only what is measured takes memory on a GPU
    aliases = _aliases(model)
    ends: list[Any] = [{name: state[first] for name, first in aliases.items()} for state in (before, now)]
    return ends[0], ends[1]


class InterpolationCallback(SequenceCallback):
    """The loss on the line between every two neighbouring saved checkpoints.

    It measures whenever the Trainer saves. Dense space if there is one, the parameters as trained otherwise (CoLA).
    The weights of the last save are kept in `<output_dir>/interpolation_snapshots/`, so that checkpoints may be
    rotated away.

    Args:
        dataset: tokenized rows, such as a Trainer's `eval_dataset`.
        points: positions on [0, 1], ends included.
        sequences: how many rows of the data set, spread evenly.
        budget: share of the training time for all metric callbacks together; None for no limit.

    Raises:
        ValueError: fewer than 3 points.
    """

    family = Interpolation

    def __init__(self, dataset: Any, points: int = 13, *, sequences: int = 32, budget: float | None = BUDGET) -> None:
        super().__init__(dataset, 1, budget, sequences, settings=InterpolationSettings(points=points))
        self._last: int | None = None

    def _snapshot(self, args: TrainingArguments) -> Snapshot:
        return Snapshot(Path(str(args.output_dir)) / "interpolation_snapshots", "previous")

    def spaces(self, model: torch.nn.Module) -> tuple[str, ...]:
        return ("dense" if no_dense_form(model) is None else "native",)

    def restore(self, model: torch.nn.Module, args: TrainingArguments, state: TrainerState) -> None:
        self._last = None
        if state.global_step == 0 and state.is_world_process_zero:
            self._snapshot(args).remove()
        if state.global_step > 0:
            # the weights that training continues from are those of its checkpoint
            self._keep(model, args, state.global_step)

    def _first(self, args: TrainingArguments, state: TrainerState, model: torch.nn.Module) -> None:
        """Nothing: no checkpoint was saved yet."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Nothing: this callback follows the checkpoints."""

    on_train_end = on_step_end

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._measured_at != state.global_step and self._last is not None and self._fits(state):
            self._run(args, state, kwargs["model"])
        if self.failed is None:
            started = time.monotonic()
            self._guarded(lambda: self._keep(kwargs["model"], args, state.global_step), state)
            self._charge(time.monotonic() - started)

    def _keep(self, model: torch.nn.Module, args: TrainingArguments, step: int) -> None:
        chosen, _ = in_space(model, self.spaces(model)[0])
        # whole weights are the same in every process: one file a machine will do
        if is_sharded(chosen) or args.local_process_index == 0:
            self._snapshot(args).save(_own_state(chosen), step)
        self._last = step

    def measure(self, model: torch.nn.Module, args: TrainingArguments, state: TrainerState) -> Measurement:
        snapshot, last = self._snapshot(args), self._last
        assert last is not None
        previous = Peer(f"step {last}", last, tensor=lambda name: snapshot.get(last, name))
        return self.measure_at(self.context(model, args, state, previous=previous))


def _aliases(model: torch.nn.Module) -> dict[str, str]:
    """Name in the state dict -> the first name of the same tensor."""
    reshard(model)
    first: dict[int, str] = {}
    return {name: first.setdefault(id(t), name) for name, t in model.state_dict(keep_vars=True).items()}


def _own_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """Copies on the CPU of what this process holds, tied tensors once."""
    aliases, state = _aliases(model), model.state_dict(keep_vars=True)
    return {
        name: local(state[name].detach()).to("cpu", copy=True).contiguous()
        for name, first in aliases.items()
        if name == first
    }
