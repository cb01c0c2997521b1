"""The subspace that a gradient is projected onto, computed without a full SVD.

Shapes: G: (m, n) gradient, r rank. A projector is one or two matrices with orthonormal rows or columns:

    right   P: (r, n)             R = G Pᵀ      (m, r)    back(N) = N P
    left    P: (m, r)             R = Pᵀ G      (r, n)    back(N) = P N
    full    P: (m, r), Q: (r, n)  R = Pᵀ G Qᵀ   (r, r)    back(N) = P N Q

`std` projects the shorter side (right when m >= n), `reverse_std` the longer one.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["PROJ_TYPES", "REFRESHES", "moment_shape", "project", "projector_shapes", "refresh_projector", "side"]

PROJ_TYPES = ("std", "reverse_std", "right", "left", "full")
REFRESHES = ("gram", "subspace", "svd")
SUBSPACE_ITERATIONS = 2

logger = logging.getLogger(__name__)


def side(shape: Sequence[int], proj_type: str) -> str:
    """`left`, `right` or `full`: what `proj_type` means for a matrix of this shape."""
    m, n = shape
    if proj_type == "std":
        return "right" if m >= n else "left"
    if proj_type == "reverse_std":
        return "left" if m >= n else "right"
    return proj_type


def projector_shapes(shape: Sequence[int], r: int, proj_type: str) -> list[tuple[int, int]]:
    """Shapes of the projector's one or two matrices."""
    m, n = shape
    return {"right": [(r, n)], "left": [(m, r)], "full": [(m, r), (r, n)]}[side(shape, proj_type)]


def moment_shape(shape: Sequence[int], r: int, proj_type: str) -> tuple[int, int]:
    """Shape of the projected gradient R, which is the shape of both moments."""
    m, n = shape
    return {"right": (m, r), "left": (r, n), "full": (r, r)}[side(shape, proj_type)]


def project(G: Tensor, projector: list[Tensor], where: str) -> Tensor:
    """R, the gradient in the projector's coordinates; shapes as in the module's legend."""
    if where == "right":
        return torch.mm(G, projector[0].T)
    R = torch.mm(projector[0].T, G)
    return R if where == "left" else torch.mm(R, projector[1].T)


def refresh_projector(G: Tensor, r: int, where: str, method: str, previous: list[Tensor] | None) -> list[Tensor]:
    """Orthonormal bases of G's top-r singular subspace.

    Args:
        G: (m, n) gradient, finite.
        r: rank, at most min(m, n).
        where: `left`, `right` or `full`.
        method: `svd` gives the singular vectors as `torch.linalg.svd` does; `gram` the same vectors from the
            eigenvectors of the smaller Gram matrix: for a float32 gradient, directions whose singular value is below
            about 3e-4 of the largest are noise; `subspace` a few power iterations from the previous projector.
            The last two keep the signs of the previous projector's vectors if they can, since the moments stay.
        previous: the projector to be replaced, or None at the first refresh (`subspace` is then `gram`).

    Returns:
        The projector's matrices, in G's dtype.
    """
    # scaling by the largest entry keeps the Gram matrix of a tiny gradient away from underflow
    scaled = G.to(torch.promote_types(G.dtype, torch.float32))
    scaled = scaled / scaled.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    if method == "svd":
        left, right = _svd(scaled, r)
    elif method == "subspace" and previous is not None:
        left, right = _subspace_iterations(scaled, where, previous)
    else:
        left, right = _gram(scaled, r, where)
    projector = {"left": [left], "right": [right.T], "full": [left, right.T]}[where]
    if method == "gram" and previous is not None:
        projector = _keep_signs(projector, previous, where)
    return [matrix.to(G.dtype).contiguous() for matrix in projector]


def _svd(G: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Top-r left (m, r) and right (n, r) singular vectors by a full SVD."""
    try:
        U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    except torch.linalg.LinAlgError as error:
        logger.warning("SVD of a %s gradient did not converge (%s): using a randomised sketch", tuple(G.shape), error)
        return _sketch(G, r)
    return U[:, :r], Vh[:r].T


def _gram(G: Tensor, r: int, where: str) -> tuple[Tensor, Tensor]:
    """Top-r left (m, r) and right (n, r) singular subspaces from the smaller Gram matrix.

    If `where` asks for the Gram matrix's own side alone, the other side is not computed but empty: (n, 0), (m, 0).
    """
    if G.shape[0] > G.shape[1] or (G.shape[0] == G.shape[1] and where == "right"):
        right, left = _gram(G.T, r, {"left": "right", "right": "left"}.get(where, where))
        return left, right
    try:
        # eigh returns ascending eigenvalues
        left = torch.linalg.eigh(torch.mm(G, G.T)).eigenvectors[:, -r:].flip(1)
    except torch.linalg.LinAlgError as error:
        logger.warning("eigh of a %s Gram matrix did not converge (%s): using the SVD", (len(G), len(G)), error)
        return _svd(G, r)
    return left, G.new_empty(G.shape[1], 0) if where == "left" else _orthonormal(torch.mm(G.T, left))


def _subspace_iterations(G: Tensor, where: str, previous: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Block power iterations on G Gᵀ (or Gᵀ G) from the previous basis; Rayleigh-Ritz is not needed for a subspace."""
    if where == "right":
        right = previous[0].T.to(G.dtype)
        for _ in range(SUBSPACE_ITERATIONS):
            left = _orthonormal(torch.mm(G, right))
            right = _orthonormal(torch.mm(G.T, left))
        return left, right
    left = previous[0].to(G.dtype)
    for _ in range(SUBSPACE_ITERATIONS):
        right = _orthonormal(torch.mm(G.T, left))
        left = _orthonormal(torch.mm(G, right))
    return left, right


def _sketch(G: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Subspace from Gaussian vectors and QR alone; it does not iterate to convergence, so it cannot fail to."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(r, G.shape[1], generator=generator).to(G)
    return _subspace_iterations(G, "right", [_orthonormal(start.T).T])


def _orthonormal(Y: Tensor) -> Tensor:
    """Orthonormal basis (d, r) of Y's columns, completed arbitrarily if they are dependent (Householder QR)."""
    Q, R = torch.linalg.qr(Y)
    # without this, QR turns half of the vectors around at every refresh
    return Q * torch.where(R.diagonal() < 0, -1.0, 1.0)


def _keep_signs(projector: list[Tensor], previous: list[Tensor], where: str) -> list[Tensor]:
    """Turn each basis vector to the side of the one it replaces."""
    columns = {"left": [True], "right": [False], "full": [True, False]}[where]
    kept = []
    for new, old, in_columns in zip(projector, previous, columns, strict=True):
        agreement = (new * old).sum(0 if in_columns else 1, keepdim=True)
        kept.append(torch.where(agreement < 0, -new, new))
    return kept
