"""LORO against its definition on whole matrices, its pairs of factors, and its place in a Trainer."""

import pytest
import torch
from tiny_runs import arguments, llama, make_trainer
from torch import nn

import hf_lowrank as lr
from hf_lowrank.methods.loro import LoroAdamW, riemannian_step

OPTIONS = {"exact_every": 3, "lr_scale": None, "refresh": True}
SHAPES = [(12, 20, 4), (20, 12, 4), (9, 9, 6), (6, 5, 5)]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def retracted(A, B, dA, dB, lr):
    """The rank-r matrix nearest to W - lr T, by an SVD of that matrix; dA and dB are the factors' gradients."""
    U, V = torch.linalg.svd(B, full_matrices=False)[0], torch.linalg.svd(A, full_matrices=False)[2].T
    # G V and U^T G of a G with B^T G = dA and G A^T = dB
    GV, UG = dB @ torch.linalg.pinv(A.T) @ V, U.T @ torch.linalg.pinv(B).T @ dA
    T = U @ UG + (GV - U @ (U.T @ GV)) @ V.T
    left, values, right = torch.linalg.svd(B @ A - lr * T)
    r = len(A)
    return left[:, :r] * values[:r] @ right[:r]


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_an_exact_step_is_the_nearest_matrix_of_rank_r(m, n, r):
    A, B, G = normal(r, n), normal(m, r, seed=1), normal(m, n, seed=2)
    new_A, new_B = riemannian_step(A, B, B.T @ G, G @ A.T, 0.1)
    expected = retracted(A, B, B.T @ G, G @ A.T, 0.1)
    torch.testing.assert_close(new_B @ new_A, expected, rtol=1e-10, atol=1e-10)
    # the factors share the singular values evenly
    values = torch.diag(torch.linalg.svdvals(expected)[:r])
    for gram in (new_B.T @ new_B, new_A @ new_A.T):
        torch.testing.assert_close(gram, values, rtol=1e-9, atol=1e-9)


def test_the_step_is_that_of_the_projected_gradient():
    # of first order the matrix moves by -lr times the tangent part of G
    A, B, G = normal(4, 20), normal(12, 4, seed=1), normal(12, 20, seed=2)
    new_A, new_B = riemannian_step(A, B, B.T @ G, G @ A.T, 1e-6)
    P, Q = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
    tangent = P @ G + G @ Q - P @ G @ Q
    torch.testing.assert_close((B @ A - new_B @ new_A) / 1e-6, tangent, rtol=1e-4, atol=1e-4)


def test_factors_without_full_rank_have_no_exact_step():
    A = torch.zeros(4, 20, dtype=torch.float64)
    assert riemannian_step(A, normal(12, 4), normal(4, 20), normal(12, 4), 0.1) is None


class Reference:
    """The official code's steps of one pair, from its definition."""

    def __init__(self, A, B, lr, weight_decay, every, refresh=True, scale=None):
        self.factors, self.lr, self.decay, self.every, self.refresh = [A, B], lr, weight_decay, every, refresh
        self.scale = len(A) / min(A.shape[1], len(B)) if scale is None else scale
        self.t, self.M, self.V = 0, [torch.zeros_like(x) for x in (A, B)], [torch.zeros_like(x) for x in (A, B)]

    def step(self, gradients):
        self.t += 1
        self.M = [0.9 * M + 0.1 * g for M, g in zip(self.M, gradients, strict=True)]
        self.V = [0.999 * V + 0.001 * g**2 for V, g in zip(self.V, gradients, strict=True)]
        N = [M / (V.sqrt() + 1e-6) for M, V in zip(self.M, self.V, strict=True)]
        lr = self.lr * (1 - 0.999**self.t) ** 0.5 / (1 - 0.9**self.t)
        if self.t % self.every == 0:
            W = retracted(*self.factors, *N, lr)
            left, values, right = torch.linalg.svd(W)
            r = len(self.factors[0])
            left, right, root = left[:, :r], right[:r], values[:r].sqrt()
            sign = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()[0]
            self.factors = [(root * sign)[:, None] * right, left * root * sign]
            if self.refresh:
                self.t, self.M, self.V = 0, [0 * M for M in self.M], [0 * V for V in self.V]
        else:
            moved = [x - lr * self.scale * n for x, n in zip(self.factors, N, strict=True)]
            self.factors = [x - lr * self.decay * x for x in moved]


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
@pytest.mark.parametrize("changed", [{}, {"refresh": False}, {"lr_scale": 0.5}])
def test_steps_are_those_of_the_definition(m, n, r, changed):
    options = {**OPTIONS, **changed}
    A, B = nn.Parameter(normal(r, n)), nn.Parameter(normal(m, r, seed=1))
    reference = Reference(A.detach(), B.detach(), 0.01, 0.1, 3, options["refresh"], options["lr_scale"])
    optimizer = LoroAdamW([{"params": [A, B], **options}], lr=0.01, weight_decay=0.1)
    for step in range(8):
        A.grad, B.grad = normal(r, n, seed=10 + step), normal(m, r, seed=30 + step)
        reference.step([A.grad, B.grad])
        optimizer.step()
        for ours, theirs in zip((A, B), reference.factors, strict=True):
            torch.testing.assert_close(ours.detach(), theirs, rtol=1e-10, atol=1e-10)


def test_a_gradient_that_is_not_finite_leaves_its_pair_out_and_the_next_exact_step_waits():
    A, B, other = nn.Parameter(normal(4, 20)), nn.Parameter(normal(12, 4)), nn.Parameter(normal(3))
    optimizer = LoroAdamW([{"params": [A, B], **OPTIONS}, {"params": [other]}], lr=0.01, refresh_every=3)
    for step in range(3):
        before = [p.detach().clone() for p in (A, B, other)]
        for i, p in enumerate((A, B, other)):
            p.grad = normal(*p.shape, seed=10 * step + i)
        if step == 1:
            B.grad[0, 0] = float("nan")
        optimizer.step()
        moved = [not torch.equal(p, q) for p, q in zip((A, B, other), before, strict=True)]
        assert moved == [step != 1, step != 1, True]
    # the pair has made two steps of three; everything else has made three and started anew
    assert [int(optimizer.state[p]["step"]) for p in (A, B, other)] == [2, 2, 0]


def test_the_layer_starts_xavier_normal_and_unscaled():
    layer = lr.LoroConfig().new_layer(400, 300, 100, generator=torch.Generator().manual_seed(0))
    assert layer.scaling == 1
    assert layer.A.std().item() == pytest.approx((2 / 500) ** 0.5, rel=0.02)
    assert layer.B.std().item() == pytest.approx((2 / 400) ** 0.5, rel=0.02)


def test_a_trainer_restarts_rate_and_state_at_the_same_steps(tmp_path):
    config = lr.LoroConfig(r=4, exact_every=4, restart_warmup_steps=2)
    args = arguments(tmp_path, max_steps=8, lr_scheduler_type="constant", warmup_steps=0)
    trainer = make_trainer(config, args, model=llama())
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    # what is logged is the rate of the step that was made; the fifth step is the first after an exact one
    assert rates == [pytest.approx(rate) for rate in (1e-2, 1e-2, 1e-2, 1e-2, 0, 5e-3, 1e-2, 1e-2)]
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {0}
    assert sum("exact_every" in group for group in trainer.optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("fields", "word"),
    [({"exact_every": 0}, "exact_every=0"), ({"lr_scale": 0}, "lr_scale=0"), ({"refresh": "some"}, "refresh='some'"),
     ({"exact_every": 5, "restart_warmup_steps": 5}, "restart_warmup_steps=5")],
)  # fmt: skip
def test_values_out_of_range_are_named(fields, word):
    with pytest.raises(ValueError, match=word):
        lr.LoroConfig(**fields)


def test_a_group_without_pairs_and_a_schedule_without_restarts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not followed by its other factor"):
        LoroAdamW([{"params": [nn.Parameter(normal(4, 20))], **OPTIONS}])
    with pytest.raises(ValueError, match="'reduce_lr_on_plateau' takes no restarts: LORO"):
        lr.prepare(llama(), lr.LoroConfig(r=4), arguments(tmp_path, lr_scheduler_type="reduce_lr_on_plateau",
                                                          eval_strategy="steps"))  # fmt: skip
