"""Spectra of every target matrix and of its updates (H8 to H13)."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerState, TrainingArguments

from hf_lowrank.families.callback import BUDGET, MetricCallback
from hf_lowrank.families.family import Context, Family, Peer, RunStep, Unit, family
from hf_lowrank.families.records import Measurement, PartialError, Record, finite
from hf_lowrank.families.snapshots import Snapshot
from hf_lowrank.methods.targets import Target, dense_weights, linear_layers, native_weights
from hf_lowrank.metrics.spectra import (
    measure_each,
    relative_norm,
    singular_vectors,
    spectral_metrics,
    subspace_overlap,
)
from hf_lowrank.report.catalogue import SPECTRAL
from hf_lowrank.sharding import all_gather_object, rank_and_world

__all__ = ["Spectral", "SpectralCallback", "SpectralSettings", "averages", "update_metrics", "weight_metrics"]

# dimension of the two updates' subspaces that are compared
OVERLAP_K = 8
# what is reported of an update's spectrum beside its norm
UPDATE_METRICS = ("effective_rank_score", "stable_rank", "effective_rank", "spectral_gap", "spectral_norm")
# a matrix of an earlier step by its target's name, None if it is not at hand
Weights = Callable[[str], Tensor | None]


@dataclass(frozen=True)
class SpectralSettings:
    """Which layers are measured, as in a method's config; None for every linear layer inside the repeated blocks."""

    target_modules: list[str] | str | None = None


@family
class Spectral(Family):
    """Singular-value metrics of every target, and of its change since `previous` and since `initial`.

    Dense space: a reparameterised layer is measured as the matrix it multiplies with, and one that has none (CoLA's)
    as the product of its factors, in the space `linearised`. Native space: each factor by itself. A matrix with NaN is
    a row with its error, and the others are measured. Rows about updates are left out where the earlier weights are
    not at hand.
    """

    entry = SPECTRAL
    Settings = SpectralSettings
    sequences = None
    cost = 2

    def units(self, here: RunStep) -> Iterator[Unit]:
        for space in here.spaces:
            yield Unit(self.entry.name, here.now, space, previous=here.previous)

    def measure(self, at: Context) -> Measurement:
        since, lost = {"update_from_init": _weights(at.initial, at.space)}, None
        try:
            since["update"] = _weights(at.previous, at.space)
        # whatever is wrong with the checkpoint before, this one's weights are there
        except Exception as error:
            since["update"], lost = None, error
        measured = _measure(at, since)
        if lost is not None and at.previous is not None:
            reason = f"no update since step {at.previous.step}: {type(lost).__name__}: {lost}"
            raise PartialError(reason, measured) from lost
        return measured


def _weights(peer: Peer | None, space: str) -> Weights | None:
    """What gives the matrices of another model, the dense ones made one at a time."""
    if peer is None or peer.load is None:
        return None if peer is None else peer.tensor
    model = peer.load()
    if space == "dense":
        makers = {matrix.name: matrix.dense_weight for target in linear_layers(model) for matrix in target.matrices()}
    else:
        makers = {target.name: weight.clone for target, weight in native_weights(model)}
    return lambda name: makers[name]() if name in makers else None


def _measure(at: Context, since: Mapping[str, Weights | None]) -> Measurement:
    rank, world = rank_and_world() if at.shared else (0, 1)
    rows: dict[int, dict[str, Any]] = {}
    vectors: dict[str, Tensor] = {}

    def matrices_of_this_process() -> Iterator[tuple[tuple[int, Target], Tensor]]:
        # where weights are sharded every process must come along for the others' matrices
        weights = dense_weights if at.space == "dense" else native_weights
        modules = at.settings.target_modules if at.settings else None
        for i, (target, weight) in enumerate(weights(at.model, modules)):
            if at.kept is not None:
                at.kept[target.name] = weight.detach().to("cpu", copy=True).contiguous()
            if i % world == rank:
                yield (i, target), weight

    measuring = measure_each(lambda which, weight: _row(which[1], weight, since), matrices_of_this_process())
    for (i, target), result in measuring:
        if isinstance(result, Exception):
            raise result
        rows[i] = {"step": at.step, "space": _space(target) if at.space == "dense" else at.space, **result[0]}
        vectors |= {f"{target.name}.update_{side}": tensor for side, tensor in result[1].items()}
        at.progress()
    for other_rows, other_vectors in all_gather_object((rows, vectors)) if at.shared else [(rows, vectors)]:
        rows |= other_rows
        if at.kept is not None:
            at.kept.update(other_vectors)
    in_order = [rows[i] for i in sorted(rows)]
    peers = {"update": at.previous, "update_from_init": at.initial}
    steps = {subject: None if since[subject] is None or peer is None else peer.step for subject, peer in peers.items()}
    # the dense ones last: where a model has both, the log shows theirs
    spaces = sorted({row["space"] for row in in_order}, reverse=True)
    means = [averages([row for row in in_order if row["space"] == space], at.step, space, steps) for space in spaces]
    return Measurement([record for records in means for record in records], in_order)


def _space(target: Target) -> str:
    """`linearised` for a layer that no matrix stands for: it is measured as the product of its factors."""
    return "dense" if getattr(target.module, "has_dense_form", True) else "linearised"


def _row(
    target: Target, weight: Tensor, since: Mapping[str, Weights | None]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One matrix's row, and the top singular vectors of its update for the next measurement's overlap."""
    row: dict[str, Any] = {
        "name": target.name,
        "layer": -1 if target.layer is None else target.layer,
        "module": target.kind,
        "rows": target.rows,
        "cols": target.cols,
        "error": None,
    }
    vectors: dict[str, Tensor] = {}
    try:
        row |= weight_metrics(weight)
        for subject in ("update_from_init", "update"):
            earlier = since[subject]
            before = None if earlier is None else earlier(target.name)
            if earlier is None or before is None or before.shape != weight.shape:
                continue
            metrics, update = update_metrics(weight, before.to(weight.device), subject)
            row |= metrics
            if subject == "update" and update.any():
                vectors = dict(zip(("left", "right"), singular_vectors(update, OVERLAP_K), strict=True))
                for side, tensor in vectors.items():
                    vectors_before = earlier(f"{target.name}.update_{side}")
                    if vectors_before is not None:
                        row[f"spectral/update/overlap_{side}"] = subspace_overlap(tensor.cpu(), vectors_before)
    # NaN in one matrix, or a decomposition that fails: the others are measured all the same, and a process that
    # left the loop here would leave the others waiting where weights are sharded
    except Exception as error:
        row["error"] = str(error)
    return row, {side: tensor.cpu().contiguous() for side, tensor in vectors.items()}


def weight_metrics(weight: Tensor) -> dict[str, float]:
    """Every scalar of a matrix's spectrum under its name in the report.

    Raises:
        ValueError: as for `spectral_metrics`.
    """
    return {f"spectral/weight/{key}": float(value) for key, value in spectral_metrics(weight).to_dict().items()}


def update_metrics(weight: Tensor, before: Tensor, subject: str = "update") -> tuple[dict[str, float], Tensor]:
    """Metrics of weight - before under their names in the report, and that difference in float64.

    Args:
        weight, before: (m, n), on one device.
        subject: `update`, or `update_from_init`.

    Raises:
        ValueError: the shapes differ, or as for `spectral_metrics`.
    """
    if before.shape != weight.shape:
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} and an earlier one of {tuple(before.shape)}: their difference "
            "needs the same shape"
        )
    before = before.double()
    update = weight.detach().double() - before
    # the difference of two float32 matrices carries float32 noise: no need for a float64 SVD
    metrics = spectral_metrics(update.float()).to_dict()
    named = {
        "relative_norm": relative_norm(update, before),
        "norm": update.norm().item(),
        "norm_before": before.norm().item(),
        **{key: float(metrics[key]) for key in UPDATE_METRICS},
    }
    return {f"spectral/{subject}/{key}": value for key, value in named.items()}, update


def averages(
    rows: Sequence[Mapping[str, Any]], step: int, space: str, since: Mapping[str, int | None]
) -> list[Record]:
    """Plain means over the matrices that have a finite value; relative_norm is all matrices' together, as in H11."""
    names = dict.fromkeys(key for row in rows for key in row if key.startswith("spectral/"))
    records = []
    for name in names:
        subject, metric = name.split("/")[1:]
        if metric in ("norm", "norm_before"):
            continue
        values = [row[name] for row in rows if name in row and math.isfinite(row[name])]
        mean = finite(sum(values) / len(values)) if values else None
        settings: dict[str, Any] = {"average": "mean over matrices"}
        if metric.startswith("overlap"):
            settings["k"] = OVERLAP_K
        reference = {"since": since[subject]} if subject in since else {}
        about = {"matrices": len(values), "total": len(rows)}
        if metric == "relative_norm":
            mean_name = f"spectral/{subject}/relative_norm_mean"
            records.append(Record(mean_name, mean, None, step, settings, space, reference, about))
            squares = [
                sum(row.get(f"spectral/{subject}/{key}", 0.0) ** 2 for row in rows) for key in ("norm", "norm_before")
            ]
            mean = finite(math.sqrt(squares[0] / squares[1])) if squares[1] > 0 else None
            settings = {**settings, "average": "all matrices together"}
        records.append(Record(name, mean, None, step, settings, space, reference, about))
    return records


class SpectralCallback(MetricCallback):
    """Singular-value metrics of every target matrix, and of its change since the last measurement and since the start.

    Dense space: a reparameterised layer is measured as the matrix it multiplies with, and one that has none (CoLA's)
    as the product of its factors, in the space `linearised`. The weights of the first and
    the last measurement are kept in `<output_dir>/spectral_snapshots/`; if they are not at hand, as after a resume
    on another machine, the rows about updates are left out. Nothing random is drawn and no parameter is touched.

    Args:
        every: optimizer steps between two measurements; the start and the end of training are measured as well.
        target_modules: layers to measure, as in a method's config; default: every linear layer inside the repeated
            blocks.
        space: `dense`, `native` as in the study, where each factor of a reparameterised layer counts by itself, or
            `both`.
        budget: share of the training time for all metric callbacks together; None for no limit.
    """

    family = Spectral
    alternative = "give one with space='both'"

    def __init__(
        self,
        every: int = 500,
        target_modules: list[str] | str | None = None,
        *,
        space: str = "dense",
        budget: float | None = BUDGET,
    ) -> None:
        super().__init__(every, budget, settings=SpectralSettings(target_modules), space=space)
        self._last: int | None = None

    def _snapshot(self, args: TrainingArguments, name: str) -> Snapshot:
        return Snapshot(Path(str(args.output_dir)) / "spectral_snapshots", name)

    def restore(self, model: torch.nn.Module, args: TrainingArguments, state: TrainerState) -> None:
        self._last = self._measured_at
        if state.global_step == 0 and state.is_world_process_zero:
            for name in ("previous", "initial"):
                self._snapshot(args, name).remove()

    def measure(self, model: torch.nn.Module, args: TrainingArguments, state: TrainerState) -> Measurement:
        step = state.global_step
        previous, initial = self._snapshot(args, "previous"), self._snapshot(args, "initial")
        # one process a machine writes, the others there read
        kept: dict[str, Tensor] | None = {} if args.local_process_index == 0 else None
        peers = {"previous": _kept_in(previous, self._last, step), "initial": _kept_in(initial, 0, step)}
        measured = self.measure_at(self.context(model, args, state, kept=kept, **peers))
        # the best model is of an earlier step than the last: a run that goes on does so from the last
        if self._last is not None and step < self._last:
            return measured
        if kept is not None:
            previous.save(kept, step)
            if step == 0:
                initial.save(kept, step)
        self._last = step
        return measured


def _kept_in(snapshot: Snapshot, taken_at: int | None, step: int) -> Peer | None:
    """The snapshot of a step, where every process can see what it needs of it."""
    # one from beyond the checkpoint that the run was resumed from is of another history
    usable = taken_at is not None and taken_at < step and snapshot.holds(taken_at)
    if not all(all_gather_object(usable)) or taken_at is None:
        return None
    return Peer(f"step {taken_at}", taken_at, tensor=lambda name: snapshot.get(taken_at, name))
