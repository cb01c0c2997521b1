"""Barriers on the line between two models (H6, H7, and the seed-to-seed null beside them)."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_lowrank.families.callback import BUDGET, SequenceCallback, output_folder
from hf_lowrank.families.records import Measurement, record
from hf_lowrank.families.snapshots import Snapshot
from hf_lowrank.families.spaces import in_space, no_dense_form
from hf_lowrank.metrics.interpolation import barrier, barrier_weights, chord_weights, each_between
from hf_lowrank.metrics.perplexity import Estimate, mean_loss
from hf_lowrank.metrics.perturb import evaluating
from hf_lowrank.metrics.sequences import EvaluationSet
from hf_lowrank.sharding import all_gather_object, is_sharded, local, reshard

__all__ = ["InterpolationCallback", "InterpolationSettings", "measure_interpolation"]


@dataclass(frozen=True)
class InterpolationSettings:
    """The grids of positions.

    Attributes:
        points: positions from 0 to 1 between neighbouring checkpoints.
        cross_points: positions between two runs.
        beyond: how far the line between two runs is extended at both ends.

    Raises:
        ValueError: fewer than 3 points, or an extension that is negative or leaves 0 and 1 off the grid.
    """

    points: int = 13
    cross_points: int = 13
    beyond: float = 0.0

    def __post_init__(self) -> None:
        if self.points < 3 or self.cross_points < 3:
            raise ValueError(f"points={self.points}, cross_points={self.cross_points}: give 3 or more")
        self.cross_grid()

    def grid(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Positions between neighbouring checkpoints."""
        return np.linspace(0, 1, self.points)

    def cross_grid(self) -> np.ndarray[Any, np.dtype[np.float64]]:
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


def measure_interpolation(
    model: nn.Module,
    states: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    evaluation: EvaluationSet,
    alphas: np.ndarray[Any, np.dtype[np.float64]],
    subject: str,
    step: int,
    other: tuple[str, int],
    space: str | None,
    progress: Callable[[], Any] = lambda: None,
    settings: Mapping[str, Any] | None = None,
) -> Measurement:
    """The barrier between two state dicts of one architecture.

    Args:
        model: gives the architecture; its own weights end as they were.
        states: the ends at 0 and 1.
        evaluation: the sequences; where it is shared, every process calls this.
        alphas: positions with 0 and 1 among them.
        subject: `consecutive`, `cross_method`, `cross_seed`, or the latter two with `_aligned`.
        step: of the run that the record belongs to.
        other: name and step of the other end.
        space: what the parameters are.
        progress: called after every position.
        settings: what else is to be noted.

    Raises:
        ValueError: the state dicts are of different architectures.
    """

    def losses(model: nn.Module) -> tuple[Tensor, Tensor]:
        found = evaluation.losses(model)
        progress()
        return found

    with evaluating(model):
        found = each_between(model, states[0], states[1], alphas, losses)
    noted = {
        "other": other[0],
        "other_step": other[1],
        "points": len(alphas),
        "from": float(alphas[0]),
        "to": float(alphas[-1]),
        **evaluation.settings(),
        **(settings or {}),
    }
    means = [mean_loss(*at) for at in found]
    values = np.array([mean.value for mean in means])
    sums, tokens = np.stack([at[0].numpy() for at in found]), found[0][1]

    def weighted(weights: Any) -> Any:
        # a loss that does not count may be infinite
        return mean_loss(torch.from_numpy(weights[weights != 0] @ sums[weights != 0]), tokens)

    prefix, over = f"interpolation/{subject}", {**noted, "stderr": "over sequences"}
    records = [
        record(f"{prefix}/barrier", weighted(barrier_weights(alphas, values)), step, over, space),
        record(f"{prefix}/barrier_chord", weighted(chord_weights(alphas, values)), step, over, space),
        record(f"{prefix}/barrier_alpha", barrier(alphas, values).alpha, step, noted, space),
    ]
    return Measurement(records, _curve(alphas, means, {"step": step, "space": space, "subject": subject}, other))


def _curve(alphas: Any, means: list[Estimate], at: Mapping[str, Any], other: tuple[str, int]) -> list[dict[str, Any]]:
    """The losses as rows, position by position."""
    return [
        {
            **at,
            "other": other[0],
            "other_step": other[1],
            "alpha": float(alpha),
            "loss": mean.value,
            "stderr": mean.stderr,
        }
        for alpha, mean in zip(alphas, means, strict=True)
    ]


class InterpolationCallback(SequenceCallback):
    """The loss on the line between every two neighbouring saved checkpoints.

    It measures whenever the Trainer saves. Dense space where there is one, the parameters as trained otherwise (CoLA).
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

    name: ClassVar[str] = "interpolation"

    def __init__(self, dataset: Any, points: int = 13, *, sequences: int = 32, budget: float | None = BUDGET) -> None:
        super().__init__(dataset, 1, budget, sequences)
        self.settings = InterpolationSettings(points=points)
        self._last: int | None = None

    def _snapshot(self, args: TrainingArguments) -> Snapshot:
        return Snapshot(output_folder(args) / "interpolation_snapshots", "previous")

    def restore(self, model: torch.nn.Module, args: TrainingArguments, state: TrainerState) -> None:
        self._last = None
        if state.global_step == 0 and state.is_world_process_zero:
            self._snapshot(args).remove()
        if state.global_step > 0:
            # the weights that training goes on from are those of its checkpoint
            self._keep(model, args, state.global_step)

    def _first(self, args: TrainingArguments, state: TrainerState, model: torch.nn.Module) -> None:
        """Nothing: no checkpoint was saved yet."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Nothing: this one follows the checkpoints."""

    on_train_end = on_step_end

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._measured_at != state.global_step and self._last is not None and self._fits(state):
            self._run(args, state, kwargs["model"])
        if self.failed is None:
            started = time.monotonic()
            self._guarded(lambda: self._keep(kwargs["model"], args, state.global_step), state)
            self._charge(time.monotonic() - started)

    def _keep(self, model: torch.nn.Module, args: TrainingArguments, step: int) -> None:
        chosen, _ = in_space(model, "dense" if no_dense_form(model) is None else "native")
        # whole weights are the same in every process: one file a machine will do
        if is_sharded(chosen) or args.local_process_index == 0:
            self._snapshot(args).save(_own_state(chosen), step)
        self._last = step

    def measure(self, model: torch.nn.Module, args: TrainingArguments, state: TrainerState) -> Measurement:
        assert self._last is not None
        why = no_dense_form(model)
        chosen, space = in_space(model, "dense" if why is None else "native")
        now, snapshot = _own_state(chosen), self._snapshot(args)
        # another process's file stands for this one's where all weights are whole; a shard is found here alone
        complete = snapshot.holds(self._last) and set(now) <= set(snapshot.names(self._last))
        if not all(all_gather_object(complete)):
            return Measurement([], [])
        before = {name: snapshot.get(self._last, name) for name in now}
        # they stay on the CPU: only what is measured takes memory on a GPU
        aliases = _aliases(chosen)
        states: list[Any] = [{name: state[first] for name, first in aliases.items()} for state in (before, now)]
        noted = {} if why is None else {"note": why.text}
        return measure_interpolation(
            chosen,
            (states[0], states[1]),
            self.evaluation(args),
            self.settings.grid(),
            "consecutive",
            state.global_step,
            (f"step {self._last}", self._last),
            space,
            settings=noted,
        )


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
