"""Barriers between neighbouring checkpoints during training (the study's H6)."""

import time
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_lowrank.callbacks.base import BUDGET, SequenceCallback, output_folder
from hf_lowrank.callbacks.snapshots import Snapshot
from hf_lowrank.measurements.base import Measurement
from hf_lowrank.measurements.interpolation import InterpolationSettings, measure_interpolation
from hf_lowrank.measurements.spaces import in_space, no_dense_form
from hf_lowrank.sharding import all_gather_object, is_sharded, local, reshard

__all__ = ["InterpolationCallback"]


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
