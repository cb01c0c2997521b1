"""Spectra of the weights and of their updates during training (metrics.md's H8 to H13)."""

import logging
import math
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerState, TrainingArguments

from hf_lowrank.callbacks.base import Measurement, MetricCallback, Record, finite
from hf_lowrank.metrics.spectra import relative_norm, singular_vectors, spectral_metrics, subspace_overlap
from hf_lowrank.report.files import replacing
from hf_lowrank.targets import Target, dense_weights

__all__ = ["SpectralCallback"]

logger = logging.getLogger(__name__)

# dimension of the two updates' subspaces that are compared
OVERLAP_K = 8
# what is reported of an update's spectrum beside its norm
UPDATE_METRICS = ("effective_rank_score", "stable_rank", "effective_rank", "spectral_gap", "spectral_norm")


class _Snapshots:
    """Weights of an earlier measurement on disk, read one matrix at a time, so that they cost no memory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def step(self) -> int | None:
        """Step the snapshot was taken at; None where there is none that can be read."""
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                return int(file.metadata()["step"])
        # a kill in mid-write leaves a file that only safetensors' own errors describe
        except Exception as error:
            logger.warning("%s cannot be read (%s): the update's spectrum starts anew", self.path, error)
            return None

    def get(self, name: str) -> Tensor | None:
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118

    def save(self, tensors: dict[str, Tensor], step: int) -> None:
        with replacing(self.path) as path:
            save_file(tensors, path, metadata={"step": str(step)})


def _space(target: Target) -> str:
    """`linearised` for a layer that no matrix stands for: it is measured as the product of its factors."""
    return "dense" if getattr(target.module, "has_dense_form", True) else "linearised"


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
    """

    name: ClassVar[str] = "spectral"

    def __init__(self, every: int = 500, target_modules: list[str] | str | None = None) -> None:
        super().__init__(every)
        self.target_modules = target_modules
        self._previous_step: int | None = None
        self._initial_step: int | None = None

    def _snapshot(self, args: TrainingArguments, which: str) -> _Snapshots:
        return _Snapshots(Path(str(args.output_dir)) / "spectral_snapshots" / f"{which}.safetensors")

    def restore(self, step: int) -> None:
        self._previous_step = self._initial_step = None
        self._resumed_at = step

    def measure(self, model: torch.nn.Module, args: TrainingArguments, state: TrainerState) -> Measurement:
        step = state.global_step
        writes = state.is_world_process_zero
        previous, initial = self._snapshot(args, "previous"), self._snapshot(args, "initial")
        if writes and step > 0:
            # a snapshot from beyond the checkpoint that the run was resumed from is of another history
            last = self._measured_before(step)
            self._previous_step = previous.step() if previous.step() == last else None
            self._initial_step = initial.step() if initial.step() == 0 else None
        rows, kept = [], {}
        for target, weight in dense_weights(model, self.target_modules):
            if not writes:
                continue
            row, vectors = self._row(target, weight, previous, initial)
            rows.append({"step": step, "space": _space(target), **row})
            kept[target.name] = weight.detach().to("cpu", copy=True).contiguous()
            kept.update({f"{target.name}.update_{side}": tensor for side, tensor in vectors.items()})
        if writes:
            previous.save(kept, step)
            if step == 0:
                initial.save(kept, step)
        # the dense ones last: where a model has both, the log shows theirs
        spaces = sorted({row["space"] for row in rows}, reverse=True)
        averages = [self._average([row for row in rows if row["space"] == space], step, space) for space in spaces]
        return Measurement([record for records in averages for record in records], rows)

    def _measured_before(self, step: int) -> int | None:
        return max((record.step for record in self.records if record.step < step), default=None)

    def _row(
        self, target: Target, weight: Tensor, previous: _Snapshots, initial: _Snapshots
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
            row.update({f"spectral/weight/{k}": float(v) for k, v in spectral_metrics(weight).to_dict().items()})
            if self._initial_step is not None:
                self._update_metrics(row, weight, initial.get(target.name), "update_from_init")
            if self._previous_step is not None:
                before = previous.get(target.name)
                update = self._update_metrics(row, weight, before, "update")
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

    def _update_metrics(
        self, row: dict[str, Any], weight: Tensor, before: Tensor | None, subject: str
    ) -> Tensor | None:
        """Put the metrics of weight - before into the row; None where the earlier weight does not fit."""
        if before is None or before.shape != weight.shape:
            return None
        before = before.to(weight.device).double()
        update = weight.detach().double() - before
        row[f"spectral/{subject}/relative_norm"] = relative_norm(update, before)
        row[f"spectral/{subject}/norm"] = update.norm().item()
        row[f"spectral/{subject}/norm_before"] = before.norm().item()
        # the difference of two float32 matrices carries float32 noise: no need for a float64 SVD
        metrics = spectral_metrics(update.float()).to_dict()
        row.update({f"spectral/{subject}/{key}": float(metrics[key]) for key in UPDATE_METRICS})
        return update

    def _average(self, rows: list[dict[str, Any]], step: int, space: str) -> list[Record]:
        """Plain means over the matrices; relative_norm is that of all matrices together, as H11 is defined."""
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
            if subject.startswith("update"):
                settings["since"] = self._initial_step if subject == "update_from_init" else self._previous_step
            if metric == "relative_norm":
                records.append(Record(f"spectral/{subject}/relative_norm_mean", mean, None, step, settings, space))
                squares = [
                    sum(row.get(f"spectral/{subject}/{key}", 0.0) ** 2 for row in rows)
                    for key in ("norm", "norm_before")
                ]
                mean = finite(math.sqrt(squares[0] / squares[1])) if squares[1] > 0 else None
                settings = {**settings, "average": "all matrices together"}
            records.append(Record(name, mean, None, step, settings, space))
        return records
