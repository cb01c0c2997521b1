"""The subspace that a gradient is projected onto, computed without a full SVD.

Shapes: G: (m, n) gradient, r rank. A projector is one or two matrices with orthonormal rows or columns:

    right   P: (r, n)             R = G Pᵀ      (m, r)    back(N) = N P
    left    P: (m, r)             R = Pᵀ G      (r, n)    back(N) = P N
    full    P: (m, r), Q: (r, n)  R = Pᵀ G Qᵀ   (r, r)    back(N) = P N Q

`std` projects the shorter side (right when m >= n), `reverse_std` the longer one.
"""

import logging
import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

__all__ = [
    "PROJECTIONS", "PROJ_TYPES", "REFRESHES", "moment_shape", "new_projector", "project", "projector_shapes",
    "refresh_projector", "side",
]  # fmt: skip

PROJ_TYPES = ("std", "reverse_std", "right", "left", "full")
REFRESHES = ("gram", "subspace", "svd")
PROJECTIONS = ("svd", "random", "sampled", "dct")
SUBSPACE_ITERATIONS = 2

# places of the singular vectors to keep, from all singular values in descending order
Pick = Callable[[Tensor], Tensor]

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


def new_projector(
    G: Tensor, r: int, where: str, projection: str, method: str, previous: list[Tensor] | None, seed: int
) -> list[Tensor]:
    """A projector with orthonormal vectors.

    Args:
        G, r, where, method, previous: as for `refresh_projector`.
        projection: `svd` the top-r singular subspace; `random` a uniformly random one (GoLore, arXiv 2410.11289);
            `sampled` r singular vectors, drawn without replacement with probabilities proportional to their singular
            values (SARA, I3S); `dct` the r vectors of the cosine transform of type II in whose
            direction G has the largest l1 norms (Trion, arXiv 2505.17967); `coordinates` r random unit vectors.
        seed: of what is drawn.

    Returns:
        The projector's matrices, in G's dtype.
    """
    if projection == "svd":
        return refresh_projector(G, r, where, method, previous)
    generator = torch.Generator().manual_seed(seed)
    scaled = _scaled(G)
    sides = {"left": [0], "right": [1], "full": [0, 1]}[where]
    if projection == "sampled":
        pick = partial(_draw, r=r, generator=generator)
        both = _svd(scaled, r, pick) if method == "svd" else _gram(scaled, r, where, pick)
        columns = [both[i] for i in sides]
    elif projection == "dct":
        columns = [_cosine_vectors(scaled.T if i == 0 else scaled, r) for i in sides]
    elif projection == "random":
        columns = [_orthonormal(_normal(G.shape[i], r, generator, scaled)) for i in sides]
    else:
        columns = [_unit_vectors(G.shape[i], r, generator, scaled) for i in sides]
    turned = [vectors.T if i == 1 else vectors for vectors, i in zip(columns, sides, strict=True)]
    return [vectors.to(G.dtype).contiguous() for vectors in turned]


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
    scaled = _scaled(G)
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


def _scaled(G: Tensor) -> Tensor:
    """G over its largest entry, which keeps the Gram matrix of a tiny gradient away from underflow."""
    scaled = G.to(torch.promote_types(G.dtype, torch.float32))
    return scaled / scaled.abs().max().clamp_min(torch.finfo(torch.float32).tiny)


def _svd(G: Tensor, r: int, pick: Pick | None = None) -> tuple[Tensor, Tensor]:
    """Top-r or picked left (m, r) and right (n, r) singular vectors by a full SVD."""
    try:
        U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    except torch.linalg.LinAlgError as error:
        logger.warning("SVD of a %s gradient did not converge (%s): using a randomised sketch", tuple(G.shape), error)
        return _sketch(G, r)
    if pick is not None:
        index = pick(S)
        return U[:, index], Vh[index].T
    return U[:, :r], Vh[:r].T


def _gram(G: Tensor, r: int, where: str, pick: Pick | None = None) -> tuple[Tensor, Tensor]:
    """Top-r or picked left (m, r) and right (n, r) singular subspaces from the smaller Gram matrix.

    If `where` asks for the Gram matrix's own side alone, the other side is not computed but empty: (n, 0), (m, 0).
    """
    if G.shape[0] > G.shape[1] or (G.shape[0] == G.shape[1] and where == "right"):
        right, left = _gram(G.T, r, {"left": "right", "right": "left"}.get(where, where), pick)
        return left, right
    try:
        # eigh returns ascending eigenvalues
        values, vectors = torch.linalg.eigh(torch.mm(G, G.T))
        if pick is None:
            left = vectors[:, -r:].flip(1)
        else:
            left = vectors.flip(1)[:, pick(values.flip(0).clamp_min(0).sqrt())]
    except torch.linalg.LinAlgError as error:
        logger.warning("eigh of a %s Gram matrix did not converge (%s): using the SVD", (len(G), len(G)), error)
        return _svd(G, r, pick)
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


def _draw(values: Tensor, r: int, generator: torch.Generator) -> Tensor:
    """Places of r values, in order, drawn one after the other with probabilities proportional to them."""
    # of exponential clocks with these rates, the first to ring is a draw, and the first r are draws one by one
    clocks = torch.empty(len(values), dtype=torch.float64).exponential_(generator=generator)
    return (clocks / values.cpu().double()).argsort(stable=True)[:r].sort().values.to(values.device)


def _normal(d: int, r: int, generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.randn(d, r, generator=generator, dtype=like.dtype).to(like.device)


def _unit_vectors(d: int, r: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """r different columns of the identity (d, d)."""
    vectors = like.new_zeros(d, r)
    vectors[torch.randperm(d, generator=generator)[:r].to(like.device), torch.arange(r, device=like.device)] = 1
    return vectors


def _cosine_vectors(G: Tensor, r: int) -> Tensor:
    """The r columns (n, r) of the cosine transform Q for which G Q has the largest l1 norms, from low to high."""
    Q = _cosine_transform(G.shape[1], G.dtype, G.device)
    return Q[:, torch.mm(G, Q).abs().sum(0).topk(r).indices.sort().values]


@lru_cache(maxsize=8)
def _cosine_transform(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Orthogonal matrix (n, n) whose k-th column is cos(pi k (2 j + 1) / 2n) over j, normalised."""
    places = torch.arange(n, dtype=torch.float64)
    Q = math.sqrt(2 / n) * torch.cos(math.pi * (2 * places[:, None] + 1) * places / (2 * n))
    Q[:, 0] /= math.sqrt(2)
    return Q.to(dtype).to(device)
