"""FiraAdamW against a plain reference and the official package."""

import math

import pytest
import torch
from optim_matrices import ALL_SHAPES, SHAPES, gradients, parameters, relative_error, take_steps

from hf_lowrank.optim import FiraAdamW
from hf_lowrank.optim.projector import PROJ_TYPES


class ReferenceFira:
    """Algorithm 1 of arXiv 2410.01623 with the official package's order of operations: one matrix, the full SVD."""

    def __init__(self, W, r, gap, alpha, proj_type, lr=1e-2, betas=(0.9, 0.999), eps=1e-6, wd=0.0):
        self.W, self.r, self.gap, self.alpha, self.proj_type = W.clone(), r, gap, alpha, proj_type
        self.lr, self.betas, self.eps, self.wd = lr, betas, eps, wd
        self.t, self.M, self.V, self.norm = 0, 0.0, 0.0, None

    def step(self, G):
        m, n = G.shape
        left, right = torch.eye(m, dtype=G.dtype), torch.eye(n, dtype=G.dtype)
        if self.t % self.gap == 0:
            self.U, _, self.Vh = torch.linalg.svd(G, full_matrices=False)
        sides = {"std": "right" if m >= n else "left", "reverse_std": "left" if m >= n else "right"}
        where = sides.get(self.proj_type, self.proj_type)
        if where in ("left", "full"):
            left = self.U[:, : self.r]
        if where in ("right", "full"):
            right = self.Vh[: self.r].T
        R = left.T @ G @ right
        self.t += 1
        b1, b2 = self.betas
        self.M = b1 * self.M + (1 - b1) * R
        self.V = b2 * self.V + (1 - b2) * R**2
        N = self.M / (self.V.sqrt() + self.eps)
        if where == "full":
            phi = N.norm() / (R.norm() + 1e-8)
        else:
            axis = 0 if where == "left" else 1
            phi = N.norm(dim=axis, keepdim=True) / (R.norm(dim=axis, keepdim=True) + 1e-8)
        S = (G - self.alpha * left @ R @ right.T) * phi
        if self.norm is None:
            self.norm = S.norm()
        else:
            limiter = max(S.norm() / (self.norm + 1e-8), 1.01) / 1.01
            S, self.norm = S / limiter, S.norm() / limiter
        step = self.lr * math.sqrt(1 - b2**self.t) / (1 - b1**self.t)
        self.W = self.W - step * (self.alpha * left @ N @ right.T + S)
        self.W = self.W - self.lr * self.wd * self.W


@pytest.mark.parametrize("alpha", [0.25, 0.95, 1.0])
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_equals_the_reference(proj_type, alpha):
    params, grads = parameters(SHAPES, torch.float64), gradients(SHAPES, dtype=torch.float64)
    references = [ReferenceFira(p.data, 8, 7, alpha, proj_type, wd=0.1) for p in params]
    group = {"params": params, "r": 8, "update_proj_gap": 7, "alpha": alpha, "proj_type": proj_type, "refresh": "svd"}
    take_steps(FiraAdamW([group], lr=1e-2, weight_decay=0.1), params, grads)
    for step in grads:
        for reference, g in zip(references, step, strict=True):
            reference.step(g)
    for p, reference in zip(params, references, strict=True):
        assert relative_error(p.data, reference.W) < 1e-9


def both(shapes, r, **options):
    """Parameters after 20 steps with our optimizer and with the official one; the last two are not projected."""
    official = pytest.importorskip("fira", reason="the official package is in the test extra")
    shapes = [*shapes, *ALL_SHAPES[3:]]
    mine, theirs, grads = parameters(shapes), parameters(shapes), gradients(shapes)
    ours = FiraAdamW(
        [{"params": mine[:-2], "r": r, "refresh": "svd", **options}, {"params": mine[-2:]}], lr=1e-2, weight_decay=0.1
    )
    reference = official.FiraAdamW(
        [{"params": theirs[:-2], "rank": r, **options}, {"params": theirs[-2:]}],
        lr=1e-2,
        weight_decay=0.1,
        no_deprecation_warning=True,
    )
    take_steps(ours, mine, grads)
    take_steps(reference, theirs, grads)
    return mine, theirs


@pytest.mark.parametrize("alpha", [0.25, 1.0])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "right", "left"])
def test_equals_fira(proj_type, alpha):
    for p, q in zip(*both(SHAPES, 8, update_proj_gap=7, alpha=alpha, proj_type=proj_type), strict=True):
        assert relative_error(p, q) < 1e-5


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "right", "left"])
def test_equals_fira_at_full_rank_of_a_square_matrix(proj_type):
    # one refresh: the last singular vectors of a square matrix are not as well determined as the others
    for p, q in zip(*both([(16, 16)], 16, update_proj_gap=200, alpha=0.25, proj_type=proj_type), strict=True):
        assert relative_error(p, q) < 1e-5


def test_the_residual_may_grow_by_one_percent_a_step():
    (p,) = params = parameters([(24, 40)])
    optimizer = FiraAdamW([{"params": params, "r": 4}], lr=1e-2)
    norms = []
    for scale in (1e-3, 1.0, 1.0, 0.0):
        take_steps(optimizer, params, gradients([(24, 40)], 1, scale=scale))
        norms.append(optimizer.state[p]["residual_norm"].item())
    assert norms[1] == pytest.approx(1.01 * norms[0], rel=1e-4)
    assert norms[2] == pytest.approx(1.01 * norms[1], rel=1e-4)
    # a step without a residual is no measure for the next one
    assert norms[3] == norms[2]


def test_a_first_step_moves_what_the_projection_drops():
    (p,) = params = parameters([(24, 40)], torch.float64)
    before, ((G,),) = p.detach().clone(), gradients([(24, 40)], 1, dtype=torch.float64)
    take_steps(FiraAdamW([{"params": params, "r": 4, "alpha": 0.25, "refresh": "svd"}], lr=1e-2), params, [[G]])
    U = torch.linalg.svd(G).U[:, 4:]
    outside = U @ U.T @ (p.detach() - before)
    # there the update is the gradient, scaled by columns
    ratio = outside / (U @ U.T @ G)
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-6, atol=0)
    assert (ratio < 0).all()
