"""Spectra of weight matrices and of their updates (metrics.md's H8 to H13 and the scalars beside them).

Notation: W: (m, n), q = min(m, n), singular values s_1 >= ... >= s_q, p = s / sum s.
"""

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

__all__ = [
    "SpectralMetrics",
    "power_law_alpha",
    "relative_norm",
    "singular_values",
    "singular_vectors",
    "spectral_metrics",
    "subspace_overlap",
]

# values at or below this are dropped, as in the study
TOLERANCE = 1e-12
# num_gt and ratio_gt count the values above this, as in the study
THRESHOLD = 0.1


def _matrix(weight: Tensor) -> Tensor:
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"a weight of shape {tuple(weight.shape)}: singular values are of non-empty matrices")
    if not torch.isfinite(weight).all():
        raise ValueError(f"a weight of shape {tuple(weight.shape)} holds NaN or infinity: nothing to decompose")
    if weight.device.type == "mps":
        return weight.detach().cpu().double()
    return weight.detach().double()


def singular_values(weight: Tensor) -> Tensor:
    """Singular values of a matrix, descending, float64.

    A float64 matrix goes through LAPACK's SVD. Any other is squared in float64 and the eigenvalues of the smaller
    Gram matrix taken, which is several times faster: the relative error of s is about 1e-16 (s_1 / s)^2, so values
    above 1e-5 s_1 are right to 1e-6, and everything below about 1e-8 s_1 is noise, as it is in float32 data anyway.

    Args:
        weight: (m, n), any floating dtype; on a device without float64 it is moved to the CPU.

    Returns:
        (q,) float64 tensor on the device of the computation.

    Raises:
        ValueError: not a matrix, empty, or with NaN or infinity in it.
    """
    W = _matrix(weight)
    if weight.dtype == torch.float64:
        return torch.linalg.svdvals(W)
    gram = W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt()


def singular_vectors(weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Top-k left (m, k) and right (n, k) singular vectors in float64; k is cut to min(m, n)."""
    U, _, Vh = torch.linalg.svd(_matrix(weight), full_matrices=False)
    return U[:, :k], Vh[:k].T


@dataclass(frozen=True)
class SpectralMetrics:
    """Scalars of one matrix's spectrum; an all-zero matrix has rank 0 and NaN where a ratio has no meaning.

    Attributes:
        rank: values above 1e-12 (of a float32 matrix this counts noise: see numerical_rank).
        rank_ratio: rank / q.
        numerical_rank: values above s_1 max(m, n) eps of the weight's dtype, as `numpy.linalg.matrix_rank`.
        effective_rank: exp of the entropy of p (Roy and Vetterli 2007).
        effective_rank_score: effective_rank / q.
        stable_rank: sum s^2 / s_1^2.
        spectral_gap: (s_1 - s_2) / s_1.
        singular_value_ratio: s_2 / s_1.
        num_gt, ratio_gt: values above 0.1, and their share of q.
        alpha: exponent of the power law fitted to s^2 (see `power_law_alpha`).
        spectral_norm: s_1.
        frobenius_norm: root of sum s^2.
    """

    rank: int
    rank_ratio: float
    numerical_rank: int
    effective_rank: float
    effective_rank_score: float
    stable_rank: float
    spectral_gap: float
    singular_value_ratio: float
    num_gt: int
    ratio_gt: float
    alpha: float
    spectral_norm: float
    frobenius_norm: float

    def to_dict(self) -> dict[str, float]:
        """Field name -> value."""
        return asdict(self)


def spectral_metrics(weight: Tensor) -> SpectralMetrics:
    """All scalars of a matrix's spectrum, exact for the given weights (precision: see `singular_values`).

    Args:
        weight: (m, n), any floating dtype.

    Raises:
        ValueError: as for `singular_values`.
    """
    values = singular_values(weight).cpu()
    q = len(values)
    top = values[0].item()
    kept = values[values > TOLERANCE]
    if len(kept) == 0:
        nan = math.nan
        return SpectralMetrics(0, 0.0, 0, nan, nan, nan, nan, nan, 0, 0.0, nan, top, 0.0)
    eps = torch.finfo(weight.dtype).eps
    second = values[1].item() if q > 1 else 0.0
    p = kept / kept.sum()
    effective_rank = math.exp(-(p * p.log()).sum().item())
    above = int((values > THRESHOLD).sum())
    return SpectralMetrics(
        rank=len(kept),
        rank_ratio=len(kept) / q,
        numerical_rank=int((values > top * max(weight.shape) * eps).sum()),
        effective_rank=effective_rank,
        effective_rank_score=effective_rank / q,
        stable_rank=(kept**2).sum().item() / top**2,
        spectral_gap=(top - second) / top,
        singular_value_ratio=second / top,
        num_gt=above,
        ratio_gt=above / q,
        alpha=power_law_alpha(kept),
        spectral_norm=top,
        frobenius_norm=(kept**2).sum().sqrt().item(),
    )


def power_law_alpha(values: Tensor) -> float:
    """Exponent alpha of the power law x^-alpha that fits the eigenvalues x = s^2 best, as WeightWatcher defines it.

    For every candidate x_min among the eigenvalues the maximum-likelihood exponent of the tail x >= x_min is
    alpha = 1 + N / sum log(x / x_min) (Clauset et al. 2009, eq. 3.1); the x_min with the smallest
    Kolmogorov-Smirnov distance is taken.

    Args:
        values: (q,) singular values, any order.

    Returns:
        alpha, or NaN with fewer than two distinct positive values.
    """
    x = (values[values > 0].double() ** 2).sort().values
    logs = x.log()
    count = torch.arange(len(x), 0, -1, dtype=torch.float64, device=x.device)
    # sum over the tail of log(x / x_min), for every x_min at once
    excess = logs.flip(0).cumsum(0).flip(0) - count * logs
    best, best_distance = math.nan, math.inf
    for i in range(len(x) - 1):
        if excess[i] <= 0:
            continue
        alpha = 1 + (count[i] / excess[i]).item()
        theoretical = 1 - ((logs[i] - logs[i:]) * (alpha - 1)).exp()
        empirical = torch.arange(len(x) - i, dtype=torch.float64, device=x.device) / count[i]
        distance = (theoretical - empirical).abs().max().item()
        if distance < best_distance:
            best, best_distance = alpha, distance
    return best


def relative_norm(update: Tensor, before: Tensor) -> float:
    """Frobenius norm of an update over that of the weights before it; NaN where those are all zero."""
    norm = before.double().norm().item()
    return update.double().norm().item() / norm if norm > 0 else math.nan


def subspace_overlap(a: Tensor, b: Tensor) -> float:
    """Mean squared cosine of the principal angles between two subspaces.

    Args:
        a, b: (d, k) and (d, l), orthonormal columns.

    Returns:
        ||aᵀ b||_F² / min(k, l): 1 where one subspace holds the other, about max(k, l) / d for independent ones.
    """
    return (a.T @ b).square().sum().item() / min(a.shape[1], b.shape[1])
