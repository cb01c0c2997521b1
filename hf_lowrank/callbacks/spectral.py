"""Spectra of the weights and of their updates during training (the study's H8 to H13)."""

from typing import ClassVar

import torch
from transformers import TrainerState, TrainingArguments

from hf_lowrank.callbacks.base import BUDGET, MetricCallback, output_folder
from hf_lowrank.callbacks.snapshots import Snapshot
from hf_lowrank.measurements.base import Measurement
from hf_lowrank.measurements.spaces import SPACES, spaces_of
from hf_lowrank.measurements.spectral import Earlier, measure_spectra
from hf_lowrank.sharding import all_gather_object

__all__ = ["SpectralCallback"]


class SpectralCallback(MetricCallback):
    """Singular-value metrics of every target matrix, and of its change since the last measurement and since the start.

    Dense space: a reparameterised layer is measured as the matrix it multiplies with, and one that has none (CoLA's)
    as the product of its factors, in the space `linearised`. The weights of the first and
    the last measurement are kept in `<output_dir>/spectral_snapshots/`; where they are not at hand, as after a resume
    on another machine, the rows about updates are left out. Nothing random is drawn and no parameter is touched.

    Args:
        every: optimizer steps between two measurements; the start and the end of training are measured as well.
        target_modules: layers to measure, as in a method's config; default: every linear layer inside the repeated
            blocks.
        space: `dense`, `native` as in the study, where each factor of a reparameterised layer counts by itself, or
            `both`.
        budget: share of the training time for all metric callbacks together; None for no limit.
    """

    name: ClassVar[str] = "spectral"
    alternative: ClassVar[str] = "give one with space='both'"

    def __init__(
        self,
        every: int = 500,
        target_modules: list[str] | str | None = None,
        *,
        space: str = "dense",
        budget: float | None = BUDGET,
    ) -> None:
        super().__init__(every, budget)
        if space not in SPACES:
            raise ValueError(f"space={space!r}: it is {', '.join(map(repr, SPACES))}")
        self.space = space
        self.target_modules = target_modules
        self._last: int | None = None

    def restore(self, model: torch.nn.Module, args: TrainingArguments, state: TrainerState) -> None:
        self._last = self._measured_at
        if state.global_step == 0 and state.is_world_process_zero:
            for name in ("previous", "initial"):
                Snapshot(output_folder(args) / "spectral_snapshots", name).remove()

    def measure(self, model: torch.nn.Module, args: TrainingArguments, state: TrainerState) -> Measurement:
        step, folder = state.global_step, output_folder(args) / "spectral_snapshots"
        previous, initial = Snapshot(folder, "previous"), Snapshot(folder, "initial")
        # one process a machine writes, the others there read
        writes = args.local_process_index == 0
        before, start = self._earlier(previous, self._last, step), self._earlier(initial, 0, step)
        found = Measurement([], [])
        kept: dict[str, torch.Tensor] = {}
        for space in spaces_of(model, self.space):
            part, weights = measure_spectra(
                model, step, before, start, self.target_modules, space, shared=args.world_size > 1, keep=writes
            )
            found, kept = found + part, kept | weights
        if writes:
            previous.save(kept, step)
        if writes and step == 0:
            initial.save(kept, step)
        self._last = step
        return found

    def _earlier(self, snapshot: Snapshot, taken_at: int | None, step: int) -> Earlier | None:
        """The snapshot of a step, where every process can see what it needs of it."""
        # one from beyond the checkpoint that the run was resumed from is of another history
        usable = taken_at is not None and taken_at < step and snapshot.holds(taken_at)
        if not all(all_gather_object(usable)) or taken_at is None:
            return None
        return Earlier(taken_at, lambda name: snapshot.get(taken_at, name))
