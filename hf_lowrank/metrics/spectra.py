"""Spectra of weight matrices and of their updates (the study's H8 to H13 and the scalars beside them).

Notation: W: (m, n), q = min(m, n), singular values s_1 >= ... >= s_q, p = s / sum s.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass
from typing import TypeVar

import torch
from torch import Tensor

from hf_lowrank.metrics.threads import single_threads

__all__ = [
    "SpectralMetrics", "measure_each", "power_law_alpha", "relative_norm", "singular_values", "singular_vectors",
    "spectra", "spectral_metrics", "subspace_overlap", "top_singular_triplets",
]  # fmt: skip

K = TypeVar("K")
R = TypeVar("R")

# values at or below this are dropped, as in the study
TOLERANCE = 1e-12
# num_gt and ratio_gt count the values above this, as in the study
THRESHOLD = 0.1
# columns of a Gram matrix, or candidates of a power law, that are computed at once
BLOCK = 128
# below this share of s_1 the Gram matrix's eigenvectors are too far from the singular vectors
SMALLEST_RATIO = 1e-4


def _matrix(weight: Tensor) -> Tensor:
    """The weight in its own dtype, on the device that decomposes it."""
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"a weight of shape {tuple(weight.shape)}: singular values are of non-empty matrices")
    if not weight.dtype.is_floating_point:
        raise ValueError(f"a weight of {weight.dtype}, the codes of quantised numbers perhaps: give floating numbers")
    # what has 8 bits has no arithmetic, and float32 holds it exactly
    weight = weight.float() if weight.dtype.itemsize == 1 else weight
    # NaN and infinity show in minimum and maximum, which take a fraction of the time of a look at every entry
    if not torch.stack(torch.aminmax(weight.detach())).isfinite().all():
        raise ValueError(f"a weight of shape {tuple(weight.shape)} holds NaN or infinity: nothing to decompose")
    return _with_float64(weight.detach())


def _with_float64(weight: Tensor) -> Tensor:
    return weight.cpu() if weight.device.type == "mps" else weight


def _gram(W: Tensor) -> Tensor:
    """Lower triangle of W Wᵀ: (q, q) for a wide W: (q, n), in float64; eigh reads no more, at half the products."""
    # contiguous rows: with a transposed W the products take one and a half times as long
    W = W.contiguous().double()
    gram = W.new_zeros(len(W), len(W))
    for i in range(0, len(W), BLOCK):
        torch.mm(W[i:], W[i : i + BLOCK].T, out=gram[i:, i : i + BLOCK])
    return gram


def singular_values(weight: Tensor) -> Tensor:
    """Singular values of a matrix, descending, float64.

    A float64 matrix goes through LAPACK's SVD. For other dtypes the values are the roots of the eigenvalues of the
    smaller Gram matrix in float64, which takes a half to a quarter of the time. The relative error of s is then about
    1e-16 (s_1 / s)^2: values above 1e-5 s_1 are right to 1e-6, and values below about 1e-8 s_1 are noise, as they are
    in float32 data anyway.

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
    gram = _gram(W if W.shape[0] <= W.shape[1] else W.T)
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt()


def top_singular_triplets(weight: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Top-k singular triplets, float64: W V = U diag(S) and Wᵀ U = V diag(S).

    For k <= q / 2 the subspace comes from the eigenvectors of the smaller float64 Gram matrix and the triplets from
    the SVD of W inside it, 1.5 to 5 times as fast as the full SVD. The subspace is off by an angle of at most about
    1e-14 s_1^2 / (s_k^2 - s_(k+1)^2), where the full SVD's is 1e-14 s_1 / (s_k - s_(k+1)); the columns of U and of V
    are orthonormal to 1e-14, S is right to 1e-14 s_1, and the equations hold to 1e-14 s_1^2 / s_k. Where
    s_k < 1e-4 s_1, and for larger k, it is the full SVD. Signs are arbitrary, and so are the vectors of equal values.

    Args:
        weight: (m, n), any floating dtype; on a device without float64 it is moved to the CPU.
        k: how many; cut to min(m, n).

    Returns:
        U: (m, k), S: (k,) descending, V: (n, k), on the device of the computation.

    Raises:
        ValueError: as for `singular_values`, or k below 1.
    """
    if k < 1:
        raise ValueError(f"k={k}: ask for at least one singular triplet")
    W = _matrix(weight).double()
    # float64's squares must not overflow or vanish
    scale = W.abs().max()
    if 2 * k <= min(W.shape) and scale > 0:
        tall = W.shape[0] > W.shape[1]
        A = (W.T if tall else W) / scale
        squares, vectors = torch.linalg.eigh(_gram(A))
        if squares[-k] > SMALLEST_RATIO**2 * squares[-1]:
            left = vectors[:, -k:]
            # undoes rotation and rounding inside the subspace
            right, S, mix = torch.linalg.svd(A.T @ left, full_matrices=False)
            left = left @ mix.T
            return (right, S * scale, left) if tall else (left, S * scale, right)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :k], S[:k], Vh[:k].T


def singular_vectors(weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Top-k left (m, k) and right (n, k) singular vectors from `top_singular_triplets`."""
    U, _, V = top_singular_triplets(weight, k)
    return U, V


@dataclass(frozen=True)
class SpectralMetrics:
    """Scalars of one matrix's spectrum; an all-zero matrix has rank 0 and NaN if a ratio has no meaning.

    Attributes:
        rank: values above 1e-12 (of a float32 matrix this counts noise: see numerical_rank).
        rank_ratio: rank / q.
        numerical_rank: values above s_1 max(m, n) eps, as `numpy.linalg.matrix_rank`, with float32's eps for half
            precision as well, whose own would leave nothing of a side of 128.
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
    eps = torch.finfo(torch.float64 if weight.dtype == torch.float64 else torch.float32).eps
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


def spectra(
    weights: Mapping[K, Tensor] | Iterable[tuple[K, Tensor]], threads: int | None = None
) -> Iterator[tuple[K, SpectralMetrics | Exception]]:
    """`spectral_metrics` of many matrices, in order, on several threads: see `measure_each`.

    Args:
        weights: matrices (m, n) by name, or pairs of a key and a matrix.
        threads: default: torch's intra-op threads.

    Yields:
        Each key with its metrics, or with the error that a bad matrix raised.

    Raises:
        ValueError: threads below 1.
    """
    pairs = weights.items() if isinstance(weights, Mapping) else weights
    return measure_each(lambda _, weight: spectral_metrics(weight), pairs, threads)


def measure_each(
    measure: Callable[[K, Tensor], R], weights: Iterable[tuple[K, Tensor]], threads: int | None = None
) -> Iterator[tuple[K, R | Exception]]:
    """`measure(key, weight)` of many matrices, in order.

    On a CPU each matrix gets one thread, since LAPACK's eigenvalues gain little from a second one. Results are
    therefore bit-identical for every number of threads; a direct call of `measure` uses all intra-op threads and may
    differ by rounding. The caller's thread measures matrices on an accelerator one after another. Matrices on a device
    without float64 are moved to the CPU. The caller's number of intra-op threads does not change.

    Args:
        measure: called without gradients, from several threads at once.
        weights: pairs of a key and a matrix. The caller's thread takes the next pair when a thread is about to be
            free, so that at most threads + 1 matrices are held, beside what `measure` allocates in each thread. A
            matrix must not change until its result is there.
        threads: default: torch's intra-op threads.

    Yields:
        Each key with what `measure` returned or the exception that it raised, which does not stop the others.

    Raises:
        ValueError: threads below 1.
    """
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 1:
        raise ValueError(f"threads={threads}: give 1 or more")
    return _measure_each(measure, weights, threads)


def _measure_each(
    measure: Callable[[K, Tensor], R], weights: Iterable[tuple[K, Tensor]], threads: int
) -> Iterator[tuple[K, R | Exception]]:
    def attempt(key: K, weight: Tensor) -> R | Exception:
        try:
            with torch.no_grad():
                return measure(key, weight)
        # one bad matrix must not cost the others: its error takes the result's place
        except Exception as error:
            # the traceback's frames would keep the matrix in memory
            return error.with_traceback(None)

    waiting: deque[tuple[K, Future[R | Exception]]] = deque()
    with single_threads(threads) as pool:
        for key, weight in weights:
            weight = _with_float64(weight)
            if weight.device.type == "cpu":
                future = pool.submit(attempt, key, weight)
            else:
                future = Future()
                future.set_result(attempt(key, weight))
            waiting.append((key, future))
            del weight
            while len(running := [future for _, future in waiting if not future.done()]) > threads:
                wait(running, return_when=FIRST_COMPLETED)
            while waiting and waiting[0][1].done():
                key, future = waiting.popleft()
                yield key, future.result()
        for key, future in waiting:
            yield key, future.result()


def power_law_alpha(values: Tensor) -> float:
    """Exponent alpha of the power law x^-alpha that best fits the eigenvalues x = s^2, as WeightWatcher defines it.

    For every candidate x_min among the eigenvalues the maximum-likelihood exponent of the tail x >= x_min is
    alpha = 1 + N / sum log(x / x_min) (Clauset et al. 2009, eq. 3.1); the x_min with the smallest
    Kolmogorov-Smirnov distance is taken. WeightWatcher 0.7.7 gives the same up to rounding from 20 eigenvalues on,
    except that it takes no x_min at or below 1e-5. With fewer than 20 it estimates differently.

    Args:
        values: (q,) singular values, any order.

    Returns:
        alpha, or NaN with fewer than two distinct positive values.
    """
    x = (values[values > 0].double() ** 2).sort().values
    logs = x.log()
    position = torch.arange(len(x), dtype=torch.float64, device=x.device)
    count = len(x) - position
    # sum over the tail of log(x / x_min), for every x_min at once
    excess = logs.flip(0).cumsum(0).flip(0) - count * logs
    alphas = 1 + count / excess
    distances = torch.full_like(logs, math.inf)
    for start in range(0, len(x) - 1, BLOCK):
        rows = slice(start, min(start + BLOCK, len(x) - 1))
        theoretical = 1 - ((logs[rows, None] - logs[start:]) * (alphas[rows, None] - 1)).exp()
        empirical = (position[start:] - position[rows, None]) / count[rows, None]
        # entries left of the diagonal are below x_min
        distances[rows] = (theoretical - empirical).triu().abs().amax(1)
    distances[excess <= 0] = math.inf
    best = int(distances.argmin()) if len(x) else 0
    return alphas[best].item() if len(x) and math.isfinite(distances[best]) else math.nan


def relative_norm(update: Tensor, before: Tensor) -> float:
    """Frobenius norm of an update over that of the weights before it; NaN if those are all zero."""
    norm = before.double().norm().item()
    return update.double().norm().item() / norm if norm > 0 else math.nan


def subspace_overlap(a: Tensor, b: Tensor) -> float:
    """Mean squared cosine of the principal angles between two subspaces.

    Args:
        a, b: (d, k) and (d, l), orthonormal columns.

    Returns:
        ||aᵀ b||_F² / min(k, l): 1 if one subspace contains the other, about max(k, l) / d for independent ones.
    """
    return (a.T @ b).square().sum().item() / min(a.shape[1], b.shape[1])
