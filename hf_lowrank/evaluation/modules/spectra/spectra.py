"""Singular-value metrics of weight matrices: rank, effective rank, stable rank, spectral gap, power-law exponent,
norms.
With the matrices of an earlier step also the relative norm and the spectrum of the update. They show what a low-rank
method does to weights that perplexity does not.
"""

import math
from typing import Any

import datasets
import numpy as np
import torch

from hf_lowrank.evaluation import measurement
from hf_lowrank.families.spectral import averages, update_metrics, weight_metrics
from hf_lowrank.metrics.spectra import measure_each


class Spectra(measurement.Measurement):
    """Spectra of weight matrices and of their updates.

    Args:
        data: list of matrices (m, n): nested lists, numpy arrays or tensors, of any shapes. A single one is
            `[matrix]`.
            They are handed on as float64, which changes no number.
        previous: the same matrices at an earlier step, in the same order; None (default) leaves the updates out.
        dtype: precision that the weights are kept in, "float32" for example, which sets the tolerance of
            `numerical_rank` (half precision has float32's). Default: float32 for a matrix whose entries all are
            float32 numbers, otherwise float64.
        per_matrix: also return every matrix's own numbers.

    Returns:
        dict of float, plain means over the matrices (those whose value is finite; nan if none is):
        spectral/weight/rank, rank_ratio, numerical_rank, effective_rank, effective_rank_score, stable_rank,
        spectral_gap,
        singular_value_ratio, num_gt, ratio_gt, alpha, spectral_norm and frobenius_norm, each with that prefix.
        They are
        exact for the given weights and have no standard error.
        With `previous` also spectral/update/relative_norm (of all matrices together), relative_norm_mean,
        effective_rank_score, stable_rank, effective_rank, spectral_gap and spectral_norm.
        With `per_matrix` also `matrices`: a list of such dicts, one a matrix.

    Raises:
        ValueError: no matrix, an empty one, NaN or infinity in one, or an earlier matrix of another shape.

    Examples:

        >>> import evaluate
        >>> from hf_lowrank.evaluation.modules import path
        >>> spectra = evaluate.load(path("spectra"), module_type="measurement")
        >>> before = [[[2.0, 0.0], [0.0, 2.0]]]
        >>> after = [[[3.0, 0.0], [0.0, 1.0]]]
        >>> results = spectra.compute(data=after, previous=before)
        >>> print(round(results["spectral/weight/stable_rank"], 4))
        1.1111
        >>> print(round(results["spectral/weight/spectral_gap"], 4))
        0.6667
        >>> print(round(results["spectral/update/relative_norm"], 4))
        0.5
    """

    features = datasets.Features({"data": datasets.Sequence(datasets.Sequence(datasets.Value("float64")))})
    citations = ("beyondperplexity2026", "roy2007effective", "martin2021predicting")
    reference_urls = ("https://arxiv.org/abs/2605.13652",)

    def _compute(
        self, data: list[Any], previous: Any = None, dtype: str | None = None, per_matrix: bool = False
    ) -> dict[str, Any]:
        if not data:
            raise ValueError("there is no matrix to measure: data=[matrix, ...] takes one or more")
        if previous is not None and len(previous) != len(data):
            raise ValueError(
                f"{len(data)} matrices and {len(previous)} earlier ones: give the same ones of both steps"
            )

        def row(i: int, weight: torch.Tensor) -> dict[str, float]:
            found = weight_metrics(weight)
            if previous is not None:
                found |= update_metrics(weight, _float64(previous[i]))[0]
            return found

        rows: list[dict[str, float]] = []
        for i, found in measure_each(row, ((i, _as_kept(rows, dtype)) for i, rows in enumerate(data))):
            if isinstance(found, Exception):
                raise ValueError(f"matrix {i}: {found}") from found
            rows.append(found)
        means = {mean.name: math.nan if mean.value is None else mean.value for mean in averages(rows, 0, "dense", {})}
        return {**means, "matrices": rows} if per_matrix else means


def _float64(rows: Any) -> torch.Tensor:
    if isinstance(rows, torch.Tensor):
        return rows.detach().cpu().double()
    try:
        return torch.from_numpy(np.array(rows, dtype=np.float64))
    except (ValueError, TypeError) as error:
        raise ValueError(f"a matrix needs numbers in rows of one length: {error}") from error


def _as_kept(rows: Any, dtype: str | None) -> torch.Tensor:
    """The matrix in the precision that its weights are kept in, which the features do not remember."""
    matrix = _float64(rows)
    if dtype is None:
        narrow = matrix.float()
        return narrow if torch.equal(narrow.double(), matrix) else matrix
    kept = getattr(torch, dtype, None)
    if not isinstance(kept, torch.dtype) or not kept.is_floating_point:
        raise ValueError(f"dtype={dtype!r}: give float64, float32, bfloat16 or float16")
    return matrix.to(kept)
