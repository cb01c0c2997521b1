"""How alike two models' hidden states are on the same tokens (H14 to H16).

Shapes: x, y: (N, p) and (N, q), one row a position; y is the baseline. Sums are in float64.
"""

import math

import torch
from torch import Tensor

__all__ = ["StreamingCKA", "cosine_similarity", "linear_cka", "relative_l2"]


def _rows(x: Tensor, y: Tensor, same_width: bool) -> tuple[Tensor, Tensor]:
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) == 0 or (same_width and x.shape != y.shape):
        raise ValueError(
            f"activations of shapes {tuple(x.shape)} and {tuple(y.shape)}: give (positions, features) with the same "
            "positions" + (" and features" if same_width else "")
        )
    return x.detach().double(), y.detach().double()


def relative_l2(x: Tensor, y: Tensor) -> float:
    """Mean over positions of ||x_i - y_i||, over the baseline's mean ||y_i|| (H14)."""
    x, y = _rows(x, y, same_width=True)
    return ((x - y).norm(dim=1).mean() / y.norm(dim=1).mean()).item()


def cosine_similarity(x: Tensor, y: Tensor) -> float:
    """Mean over positions of the cosine between x_i and y_i (H15)."""
    x, y = _rows(x, y, same_width=True)
    return torch.nn.functional.cosine_similarity(x, y, dim=1).mean().item()


def linear_cka(x: Tensor, y: Tensor, debiased: bool = False) -> float:
    """Linear CKA of two representations of the same positions (H16; Kornblith et al. 2019, arXiv 1905.00414).

    Args:
        x, y: (N, p) and (N, q).
        debiased: with the unbiased estimate of HSIC (Nguyen et al. 2021, arXiv 2010.15327, Eq. 3): plain CKA is near
            1 whatever the features are when N is not much larger than p and q.

    Raises:
        ValueError: positions differ, or there are fewer than 4 of them for `debiased`.
    """
    sums = StreamingCKA()
    sums.update(x, y)
    return sums.value(debiased)


class StreamingCKA:
    """Linear CKA over batches of positions: it keeps cross-products of features, p x p, q x q and p x q, alone."""

    def __init__(self) -> None:
        self._count = 0
        self._sums: dict[str, Tensor] = {}

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add positions; `ValueError` when x and y have different numbers of them."""
        x, y = _rows(x, y, same_width=False)
        a, b = x.square().sum(1), y.square().sum(1)
        # HSIC's sums over pairs of positions come down to these sums over positions
        added = {
            "xx": x.T @ x, "yy": y.T @ y, "xy": x.T @ y, "x": x.sum(0), "y": y.sum(0), "a": a.sum(), "b": b.sum(),
            "ax": a @ x, "bx": b @ x, "ay": a @ y, "by": b @ y, "aa": a @ a, "bb": b @ b, "ab": a @ b,
        }  # fmt: skip
        self._sums = {key: value + self._sums[key] if self._sums else value for key, value in added.items()}
        self._count += len(x)

    def value(self, debiased: bool = False) -> float:
        """CKA of all positions so far; NaN where a representation is constant."""
        n, least = self._count, 4 if debiased else 2
        if n < least:
            raise ValueError(f"{n} positions: CKA{' without bias' if debiased else ''} needs {least} or more")
        hsic = self._unbiased if debiased else self._biased
        both, first, second = hsic("x", "y"), hsic("x", "x"), hsic("y", "y")
        return both / math.sqrt(first * second) if first > 0 and second > 0 else math.nan

    def _products(self, u: str, v: str) -> Tensor:
        return self._sums[u + v]

    def _biased(self, u: str, v: str) -> float:
        """Squared Frobenius norm of the centred cross-product."""
        s = self._sums
        return (self._products(u, v) - torch.outer(s[u], s[v]) / self._count).square().sum().item()

    def _unbiased(self, u: str, v: str) -> float:
        """n (n - 3) HSIC_1, from Gram matrices K = U U^T and L = V V^T with their diagonals set to zero."""
        s, n = self._sums, self._count
        squares = {"x": "a", "y": "b"}
        k, m = squares[u], squares[v]
        diagonals = s["".join(sorted(k + m))]
        trace = self._products(u, v).square().sum() - diagonals
        sums = (s[u].square().sum() - s[k]) * (s[v].square().sum() - s[m])
        # 1^T K L 1, where (K 1)_i = u_i . sum(u) - |u_i|^2
        middle = s[u] @ self._products(u, v) @ s[v] - s[m + u] @ s[u] - s[k + v] @ s[v] + diagonals
        return (trace + sums / ((n - 1) * (n - 2)) - 2 * middle / (n - 2)).item()
