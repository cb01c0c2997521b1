"""Activations against a baseline's on the same tokens (H14 to H16)."""

from collections.abc import Callable
from typing import Any

from torch import nn

from hf_lowrank.measurements.base import Measurement, record
from hf_lowrank.metrics.activations import SIMILARITIES, compare_activations
from hf_lowrank.metrics.perturb import evaluating
from hf_lowrank.metrics.sequences import EvaluationSet

__all__ = ["measure_activations"]


def measure_activations(
    model: nn.Module,
    baseline: nn.Module,
    evaluation: EvaluationSet,
    step: int,
    baseline_name: str,
    baseline_step: int | None,
    progress: Callable[[], Any] = lambda: None,
) -> Measurement:
    """Relative L2, cosine and CKA, plain and debiased, layer by layer and averaged over layers.

    Raises:
        ValueError: the baseline is of another size, or one of the models gives no hidden states.
    """
    with evaluating(model), evaluating(baseline):
        mean, layers = compare_activations(model, baseline, evaluation, progress=progress)
    noted = {
        "baseline": baseline_name,
        "baseline_step": baseline_step,
        "average": "mean over layers, embeddings included",
        "layers": len(layers),
        **evaluation.settings(),
        "stderr": "jackknife over groups of sequences",
    }
    records = [record(f"activation/{name}", getattr(mean, name), step, noted) for name in SIMILARITIES]
    rows: list[dict[str, Any]] = []
    for layer, similarity in enumerate(layers):
        row: dict[str, Any] = {"step": step, "layer": layer, "baseline": baseline_name}
        row["baseline_step"] = -1 if baseline_step is None else baseline_step
        for name in SIMILARITIES:
            estimate = getattr(similarity, name)
            row |= {f"activation/{name}": estimate.value, f"activation/{name}_stderr": estimate.stderr}
        rows.append(row)
    return Measurement(records, rows)
