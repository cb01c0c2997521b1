"""The subspaces that projected optimizers choose from, and when they choose anew."""

import math

import pytest
import torch
from optim_matrices import gradients, parameters, relative_error, take_steps

from hf_lowrank.methods import FiraConfig, GaLoreConfig
from hf_lowrank.optim import FiraAdamW, GaLoreAdamW
from hf_lowrank.optim.projector import PROJ_TYPES, new_projector, project, projector_shapes, refresh_projector, side

KINDS = ["random", "sampled", "dct", "coordinates"]
SHAPES = [(24, 40), (32, 32), (40, 24)]


def columns(projector, where):
    return [P if where == "left" or (where == "full" and i == 0) else P.T for i, P in enumerate(projector)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("projection", KINDS)
def test_bases_are_orthonormal_and_follow_from_the_seed(projection, proj_type, shape):
    where = side(shape, proj_type)
    for method in ("gram", "svd") if projection == "sampled" else ("gram",):
        for r in (6, min(shape)):
            G = torch.randn(shape, generator=torch.Generator().manual_seed(1))
            P, again, other = (new_projector(G, r, where, projection, method, None, seed) for seed in (3, 3, 4))
            assert [tuple(matrix.shape) for matrix in P] == projector_shapes(shape, r, proj_type)
            for matrix, same, vectors in zip(P, again, columns(P, where), strict=True):
                assert torch.equal(matrix, same)
                torch.testing.assert_close(vectors.T @ vectors, torch.eye(r), atol=1e-5, rtol=0)
            if r == 6 and projection != "dct":
                assert not torch.equal(P[0], other[0])


@pytest.mark.parametrize("projection", KINDS)
def test_a_gradient_of_zeros_or_of_low_rank_has_a_basis_as_well(projection):
    for G in (torch.zeros(12, 20), torch.randn(12, 2) @ torch.randn(2, 20) * 1e-20):
        (P,) = new_projector(G, 6, "left", projection, "gram", None, 1)
        torch.testing.assert_close(P.T @ P, torch.eye(6), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["gram", "svd"])
def test_singular_vectors_are_sampled_by_their_values(method):
    # two of three: P(i, then j) = s_i / S * s_j / (S - s_i)
    sigma = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(5, 3, dtype=torch.float64)).Q
    G = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q @ torch.diag(sigma) @ basis.T
    total = sigma.sum().item()
    expected = torch.zeros(3)
    for i, first in enumerate(sigma.tolist()):
        for j, second in enumerate(sigma.tolist()):
            if i != j:
                probability = first / total * second / (total - first)
                expected[[i, j]] += probability
    found = torch.zeros(3)
    trials = 2000
    for seed in range(trials):
        (P,) = new_projector(G, 2, "right", "sampled", method, None, seed)
        found += (P @ basis).square().sum(0).float() / trials
    # three standard errors of a share
    torch.testing.assert_close(found, expected, atol=3 * math.sqrt(0.25 / trials), rtol=0)


def test_cosine_vectors_are_those_with_the_largest_l1_norms():
    n, chosen = 16, [0, 3, 7]
    j = torch.arange(n, dtype=torch.float64)
    waves = torch.stack([torch.cos(math.pi * k * (2 * j + 1) / (2 * n)) for k in chosen])
    waves /= waves.norm(dim=1, keepdim=True)
    G = torch.randn(30, 3, dtype=torch.float64) @ waves
    (P,) = new_projector(G, 3, "right", "dct", "gram", None, 0)
    torch.testing.assert_close(P, waves)
    (Q,) = new_projector(G.T, 3, "left", "dct", "gram", None, 0)
    torch.testing.assert_close(Q, waves.T)


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_the_first_moment_is_rotated_into_the_new_subspace(shape, proj_type):
    def optimizer(params, rotate):
        options = {"r": 6, "update_proj_gap": 3, "proj_type": proj_type, "rotate_moments": rotate}
        return GaLoreAdamW([{"params": params, **options}], lr=1e-2)

    grads, where = gradients([shape], 4, dtype=torch.float64), side(shape, proj_type)
    (p,), (q,) = params, others = parameters([shape], torch.float64), parameters([shape], torch.float64)
    rotated, kept = optimizer(params, True), optimizer(others, False)
    take_steps(rotated, params, grads[:3])
    take_steps(kept, others, grads[:3])
    before = {key: value.clone() for key, value in rotated.state[p].items()}
    take_steps(rotated, params, grads[3:])
    take_steps(kept, others, grads[3:])
    state = rotated.state[p]
    M, old, new = (
        before["exp_avg"],
        [s["projector"] if i == 0 else s["projector_right"] for s in (before,) for i in range(1 + (where == "full"))],
        [s["projector"] if i == 0 else s["projector_right"] for s in (state,) for i in range(1 + (where == "full"))],
    )
    if where != "right":
        M = new[0].T @ old[0] @ M
    if where != "left":
        M = M @ old[-1] @ new[-1].T
    R = project(grads[3][0], new, where)
    assert relative_error(state["exp_avg"], 0.9 * M + 0.1 * R) < 1e-12
    assert relative_error(kept.state[q]["exp_avg"], 0.9 * before["exp_avg"] + 0.1 * R) < 1e-12
    assert torch.equal(state["exp_avg_sq"], kept.state[q]["exp_avg_sq"])


def refreshed_in(optimizer, params, grads):
    """The steps, from 1, before which the first parameter got a new projector."""
    steps = []
    for t, step in enumerate(grads, 1):
        state = optimizer.state[params[0]]
        before = state["projector"].clone() if state else None
        take_steps(optimizer, params, [step])
        if before is None or not torch.equal(before, state["projector"]):
            steps.append(t)
    return steps


def test_the_gap_doubles_while_the_first_vector_stays():
    shape = (12, 20)
    noise = gradients([shape], 90, dtype=torch.float64)
    u, v = torch.randn(12, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    # five cosines are there at step 10 from 0; then the gap is 4, at 12 it is 8, at 16 it is 16 and so on
    for strength, expected in ((1.0, [*range(1, 14, 2), 17, 33, 65]), (0.0, list(range(1, 90, 2)))):
        params = parameters([shape], torch.float64)
        group = {"params": params, "r": 4, "update_proj_gap": 2, "adaptive_gap": True}
        grads = [[strength * u[:, None] * v + G] for (G,) in noise]
        assert refreshed_in(GaLoreAdamW([group], lr=1e-2), params, grads) == expected, strength


def test_refreshes_are_spread_over_the_gap():
    shapes = [(12, 20)] * 4
    params = parameters(shapes)
    optimizer = GaLoreAdamW([{"params": params, "r": 4, "update_proj_gap": 8, "stagger_refreshes": True}], lr=1e-2)
    grads = gradients(shapes, 20)
    found = []
    for step in grads:
        before = [optimizer.state[p]["projector"].clone() if optimizer.state[p] else None for p in params]
        take_steps(optimizer, params, [step])
        after = [optimizer.state[p]["projector"] for p in params]
        found.append([i for i in range(4) if before[i] is None or not torch.equal(before[i], after[i])])
    expected = [[0, 1, 2, 3]] + [[(t // 2) % 4] if t % 2 == 0 else [] for t in range(1, 20)]
    assert found == expected


@pytest.mark.parametrize("optimizer_cls", [GaLoreAdamW, FiraAdamW])
def test_projections_are_random_after_a_share_of_training(optimizer_cls):
    params = parameters([(12, 20)])
    group = {"params": params, "r": 4, "update_proj_gap": 5, "random_after": 0.5, "refresh": "svd"}
    optimizer = optimizer_cls([group], lr=1e-2, seed=2, total_steps=20)
    for t, step in enumerate(gradients([(12, 20)], 20)):
        take_steps(optimizer, params, [step])
        if t % 5 == 0:
            (top,) = refresh_projector(step[0], 4, "left", "svd", None)
            overlap = (top.T @ optimizer.state[params[0]]["projector"]).square().sum().item()
            assert (overlap > 3.99) == (t < 10), t
    with pytest.raises(ValueError, match=r"random_after=0.5 is a share of training: give max_steps"):
        take_steps(optimizer_cls([group], lr=1e-2), params, gradients([(12, 20)], 1))


@pytest.mark.parametrize("config_cls", [GaLoreConfig, FiraConfig])
@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"projection": "magic"}, "projection='magic'"),
        ({"projection": "random", "refresh": "svd"}, "refresh='svd' and projection='random'"),
        ({"projection": "dct", "refresh": "subspace"}, "refresh='subspace' and projection='dct'"),
        ({"projection": "sampled", "refresh": "subspace"}, "refresh='subspace' and projection='sampled'"),
        ({"projection": "random", "adaptive_gap": True}, "adaptive_gap and projection='random'"),
        ({"adaptive_gap": True, "random_after": 0.5}, "adaptive_gap and random_after=0.5"),
        ({"projection": "random", "random_after": 0.5}, "random_after=0.5 and projection='random'"),
        ({"random_after": 1.5}, "random_after=1.5"),
        ({"random_after": True}, "random_after=True"),
    ],
)
def test_options_that_make_no_sense_together_are_named(config_cls, options, word):
    with pytest.raises(ValueError, match=word):
        config_cls(**options)
