"""Spectra of every target matrix and of its updates (H8 to H13)."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import TrainerState, TrainingArguments

from hf_lowrank.families.callback import BUDGET, MetricCallback, output_folder
from hf_lowrank.families.records import Measurement, Record, finite
from hf_lowrank.families.snapshots import Snapshot
from hf_lowrank.families.spaces import SPACES, spaces_of
from hf_lowrank.methods.targets import Target, dense_weights, native_weights
from hf_lowrank.metrics.spectra import (
    measure_each,
    relative_norm,
    singular_vectors,
    spectral_metrics,
    subspace_overlap,
)
from hf_lowrank.sharding import all_gather_object, rank_and_world

__all__ = ["Earlier", "SpectralCallback", "averages", "measure_spectra", "update_metrics", "weight_metrics"]

# dimension of the two updates' subspaces that are compared
OVERLAP_K = 8
# what is reported of an update's spectrum beside its norm
UPDATE_METRICS = ("effective_rank_score", "stable_rank", "effective_rank", "spectral_gap", "spectral_norm")


class Earlier:
    """Weights of an earlier step: `get` gives a matrix by its target's name, None where it is not at hand.

    Attributes:
        step: the step they are of.
    """

    def __init__(self, step: int, get: Callable[[str], Tensor | None]) -> None:
        self.step, self.get = step, get


def _space(target: Target) -> str:
    """`linearised` for a layer that no matrix stands for: it is measured as the product of its factors."""
    return "dense" if getattr(target.module, "has_dense_form", True) else "linearised"


def measure_spectra(
    model: nn.Module,
    step: int,
    previous: Earlier | None = None,
    initial: Earlier | None = None,
    target_modules: list[str] | str | None = None,
    space: str = "dense",
    shared: bool = False,
    keep: bool = True,
    progress: Callable[[], Any] = lambda: None,
) -> tuple[Measurement, dict[str, Tensor]]:
    """Singular-value metrics of every target, and of its change since `previous` and since `initial`.

    Dense space: a reparameterised layer is measured as the matrix it multiplies with, and one that has none (CoLA's)
    as the product of its factors, in the space `linearised`. Native space: each factor by itself. A matrix with NaN is
    a row with its error, and the others are measured.

    Args:
        model: whole, or sharded by FSDP2.
        step: the optimizer step of the model.
        previous, initial: earlier weights; rows about updates are left out where there are none.
        target_modules: layers to measure, as in a method's config.
        space: `dense` or `native`.
        keep: return the weights as well, all of them; otherwise nothing beyond a few matrices is held.
        shared: every process calls this and measures its share of the matrices; all get the whole result.
        progress: called after every matrix.

    Returns:
        The measurement, and for the next one's `previous` the weights and the top singular vectors of the updates,
        on the CPU; empty without `keep`.
    """
    rank, world = rank_and_world() if shared else (0, 1)
    rows: list[tuple[int, dict[str, Any]]] = []
    kept: dict[str, Tensor] = {}
    top: dict[str, Tensor] = {}

    def mine() -> Iterator[tuple[tuple[int, Target], Tensor]]:
        # where weights are sharded every process must come along for the others' matrices
        weights = dense_weights if space == "dense" else native_weights
        for i, (target, weight) in enumerate(weights(model, target_modules)):
            if keep:
                kept[target.name] = weight.detach().to("cpu", copy=True).contiguous()
            if i % world == rank:
                yield (i, target), weight

    for (i, target), found in measure_each(lambda at, weight: _row(at[1], weight, previous, initial), mine()):
        if isinstance(found, Exception):
            raise found
        row, vectors = found
        rows.append((i, {"step": step, "space": _space(target) if space == "dense" else space, **row}))
        top.update({f"{target.name}.update_{side}": tensor for side, tensor in vectors.items()})
        progress()
    parts = all_gather_object((rows, top)) if shared else [(rows, top)]
    rows = sorted((row for part, _ in parts for row in part), key=lambda item: item[0])
    for _, vectors in parts if keep else []:
        kept.update(vectors)
    earlier = {"update": previous, "update_from_init": initial}
    since = {subject: None if weights is None else weights.step for subject, weights in earlier.items()}
    return Measurement(_by_space([row for _, row in rows], step, since), [row for _, row in rows]), kept


def _row(
    target: Target, weight: Tensor, previous: Earlier | None, initial: Earlier | None
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
        if initial is not None:
            _put_update(row, weight, initial.get(target.name), "update_from_init")
        if previous is not None:
            update = _put_update(row, weight, previous.get(target.name), "update")
            if update is not None and update.any():
                vectors = dict(zip(("left", "right"), singular_vectors(update, OVERLAP_K), strict=True))
                for side, tensor in vectors.items():
                    earlier = previous.get(f"{target.name}.update_{side}")
                    if earlier is not None:
                        row[f"spectral/update/overlap_{side}"] = subspace_overlap(tensor.cpu(), earlier)
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


def _put_update(row: dict[str, Any], weight: Tensor, before: Tensor | None, subject: str) -> Tensor | None:
    """Put the metrics of weight - before into the row; None where the earlier weight does not fit."""
    if before is None or before.shape != weight.shape:
        return None
    found, update = update_metrics(weight, before.to(weight.device), subject)
    row |= found
    return update


def _by_space(rows: list[dict[str, Any]], step: int, since: dict[str, int | None]) -> list[Record]:
    # the dense ones last: where a model has both, the log shows theirs
    spaces = sorted({row["space"] for row in rows}, reverse=True)
    means = [averages([row for row in rows if row["space"] == space], step, space, since) for space in spaces]
    return [record for records in means for record in records]


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
        settings: dict[str, Any] = {"average": "mean over matrices", "matrices": len(values), "total": len(rows)}
        if metric.startswith("overlap"):
            settings["k"] = OVERLAP_K
        if subject in since:
            settings["since"] = since[subject]
        if metric == "relative_norm":
            records.append(Record(f"spectral/{subject}/relative_norm_mean", mean, None, step, settings, space))
            squares = [
                sum(row.get(f"spectral/{subject}/{key}", 0.0) ** 2 for row in rows) for key in ("norm", "norm_before")
            ]
            mean = finite(math.sqrt(squares[0] / squares[1])) if squares[1] > 0 else None
            settings = {**settings, "average": "all matrices together"}
        records.append(Record(name, mean, None, step, settings, space))
    return records


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
