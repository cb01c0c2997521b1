"""FrugalAdamW against a plain reference."""

import math

import pytest
import torch
from optim_matrices import SHAPES, gradients, parameters, relative_error, take_steps

from hf_lowrank.optim import FrugalAdamW
from hf_lowrank.optim.projector import PROJ_TYPES, new_projector, side

LR, BETAS, EPS, DECAY, SCALE, GAP, R = 1e-3, (0.9, 0.999), 1e-3, 0.1, 0.5, 7, 8


def reference(W, grads, projection, proj_type, seeds):
    """One matrix as the official code steps it: decay, Adam with eps after the bias correction, sign of the rest."""
    where = side(W.shape, proj_type)
    W, seeds = W.clone(), iter(seeds)
    for step, G in enumerate(grads):
        if step % GAP == 0:
            P = new_projector(G, R, where, projection, "svd" if projection == "svd" else "gram", None, next(seeds))
            left = P[0] if where != "right" else torch.eye(len(W), dtype=W.dtype)
            right = P[-1] if where != "left" else torch.eye(W.shape[1], dtype=W.dtype)
            M = V = torch.zeros((), dtype=W.dtype)
            t = 0
        t += 1
        down = left.T @ G @ right.T
        M = BETAS[0] * M + (1 - BETAS[0]) * down
        V = BETAS[1] * V + (1 - BETAS[1]) * down**2
        adam = M / (1 - BETAS[0] ** t) / ((V / (1 - BETAS[1] ** t)).sqrt() + EPS)
        W = (1 - LR * DECAY) * W - LR * (left @ adam @ right) - LR * SCALE * (G - left @ down @ right).sign()
    return W


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("projection", ["svd", "random", "coordinates"])
def test_equals_the_reference(projection, proj_type):
    params = parameters(SHAPES, torch.float64)
    expected, grads = [p.detach().clone() for p in params], gradients(SHAPES, 20, dtype=torch.float64)
    group = {"params": params, "r": R, "update_proj_gap": GAP, "sign_lr_scale": SCALE, "proj_type": proj_type}
    group |= {"projection": projection, "refresh": "svd" if projection == "svd" else "gram"}
    optimizer = FrugalAdamW([group], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    optimizer.init_state()
    seeds = [[] for _ in params]
    for step in grads:
        for p, its in zip(params, seeds, strict=True):
            seed = optimizer.state[p].get("seed", 0)
            its += [seed] if not its or its[-1] != seed or projection == "svd" else []
        take_steps(optimizer, params, [step])
    for i, p in enumerate(params):
        found = reference(expected[i], [step[i] for step in grads], projection, proj_type, seeds[i])
        assert relative_error(p.detach(), found) < 1e-10


def test_what_is_not_projected_is_trained_by_adamw():
    mine, theirs = parameters([(8, 8), (5,)], torch.float64), parameters([(8, 8), (5,)], torch.float64)
    grads = gradients([(8, 8), (5,)], 20, dtype=torch.float64)
    take_steps(FrugalAdamW(mine, lr=1e-2, eps=1e-3, weight_decay=0.1), mine, grads)
    take_steps(torch.optim.AdamW(theirs, lr=1e-2, eps=1e-3, weight_decay=0.1), theirs, grads)
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rotate", [False, True])
def test_the_sign_of_rounding_moves_nothing(rotate):
    # a projection of full rank drops nothing: Adam alone, whose entries are near 1 in the rotated basis
    (p,) = params = parameters([(12, 20)])
    before = p.detach().clone()
    group = {"params": params, "r": 12, "rotate_moments": rotate}
    take_steps(FrugalAdamW([group], lr=1.0), params, gradients([(12, 20)], 1, scale=10.0))
    assert (p.detach() - before).norm().item() == pytest.approx(math.sqrt(12 * 20), rel=1e-3)
