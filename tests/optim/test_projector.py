"""Projector refreshes against singular vectors that are known."""

import pytest
import torch

from hf_lowrank.optim import projector
from hf_lowrank.optim.projector import moment_shape, project, projector_shapes, refresh_projector, side
from hf_lowrank.optim.refresh import deal

SHAPES = [(24, 40), (32, 32), (40, 24)]


def known_matrix(m: int, n: int, seed: int = 0, decay: float = 0.8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """G with Haar singular vectors and singular values decay^i, and its vectors U: (m, q), V: (n, q)."""
    generator = torch.Generator().manual_seed(seed)
    q = min(m, n)
    U = torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64)).Q[:, :q]
    V = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q[:, :q]
    G = U @ torch.diag(decay ** torch.arange(q, dtype=torch.float64)) @ V.T
    return G.float(), U.float(), V.float()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("proj_type", projector.PROJ_TYPES)
@pytest.mark.parametrize("method", ["svd", "gram"])
def test_finds_the_top_singular_vectors(shape, proj_type, method):
    G, U, V = known_matrix(*shape)
    r = 6
    where = side(shape, proj_type)
    found = refresh_projector(G, r, where, method, None)
    assert [tuple(matrix.shape) for matrix in found] == projector_shapes(shape, r, proj_type)
    expected = {"left": [U[:, :r]], "right": [V[:, :r].T], "full": [U[:, :r], V[:, :r].T]}[where]
    for matrix, vectors in zip(found, expected, strict=True):
        gram = matrix.T @ matrix if matrix.shape[0] in (shape[0],) and matrix.shape[1] == r else matrix @ matrix.T
        torch.testing.assert_close(gram, torch.eye(r), atol=1e-5, rtol=0)
        # each vector up to its sign
        overlap = (matrix * vectors).sum(1 if matrix.shape[0] == r else 0).abs()
        torch.testing.assert_close(overlap, torch.ones(r), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("proj_type", projector.PROJ_TYPES)
def test_subspace_iterations_follow_a_gradient_that_turns_slowly(shape, proj_type):
    G, _, _ = known_matrix(*shape)
    turned = G + 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(1)) * G.std()
    where = side(shape, proj_type)
    exact = refresh_projector(turned, 6, where, "svd", None)
    found = refresh_projector(turned, 6, where, "subspace", refresh_projector(G, 6, where, "svd", None))
    best = project(turned, exact, where).norm()
    assert project(turned, found, where).norm() > 0.999 * best


@pytest.mark.parametrize("method", projector.REFRESHES)
def test_full_rank_and_rank_deficient_gradients_give_orthonormal_bases(method):
    G = torch.zeros(12, 20)
    G[0, 0] = 1e-20
    for r in (3, 12):
        previous = refresh_projector(torch.randn(12, 20), r, "left", "svd", None)
        (P,) = refresh_projector(G, r, "left", method, previous)
        torch.testing.assert_close(P.T @ P, torch.eye(r), atol=1e-5, rtol=0)


def test_signs_stay_with_the_previous_projector():
    G, _, _ = known_matrix(24, 40)
    (before,) = refresh_projector(G, 6, "left", "svd", None)
    (after,) = refresh_projector(G, 6, "left", "gram", [-before])
    assert ((after * -before).sum(0) > 0.99).all()


def test_when_decompositions_fail_the_sketch_still_finds_the_subspace(monkeypatch):
    def fails(*args, **kwargs):
        raise torch.linalg.LinAlgError("did not converge")

    G, U, _ = known_matrix(24, 40, decay=0.3)
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    monkeypatch.setattr(torch.linalg, "svd", fails)
    (P,) = refresh_projector(G, 4, "left", "gram", None)
    torch.testing.assert_close(P.T @ P, torch.eye(4), atol=1e-5, rtol=0)
    # the space is found up to its weakest direction, whose singular value is 3 times the next
    assert (U[:, :3].T @ P).square().sum() > 2.99


@pytest.mark.parametrize("proj_type", projector.PROJ_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_agree_with_what_is_computed(shape, proj_type):
    G, _, _ = known_matrix(*shape)
    where = side(shape, proj_type)
    R = project(G, refresh_projector(G, 5, where, "gram", None), where)
    assert tuple(R.shape) == moment_shape(shape, 5, proj_type)


@pytest.mark.parametrize(
    ("costs", "world", "expected"),
    [
        ([], 2, []),
        ([1, 1, 1], 1, [0, 0, 0]),
        ([1, 5, 2, 2], 2, [1, 0, 1, 1]),
        ([3, 3, 2, 2, 2], 2, [0, 1, 0, 1, 0]),
        ([1, 2], 4, [1, 0]),
    ],
)
def test_work_is_dealt_by_its_cost(costs, world, expected):
    assert deal(costs, world) == expected
