"""Low-rank factors: the layer against its dense form, refactorisation, and the reset of moments."""

import logging

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from tiny_runs import arguments, dataset, gpt2, llama
from torch import nn
from transformers import Trainer
from transformers.pytorch_utils import Conv1D

import hf_lowrank as lr
from hf_lowrank.methods import LowRankLinear
from hf_lowrank.methods.lowrank import balanced


def layer(n=12, m=20, r=3, alpha=8, bias=True, dtype=torch.float64):
    return LowRankLinear(n, m, r, alpha, bias, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_forward_and_gradients_are_those_of_the_dense_product():
    made, x = layer(), torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    nn.init.normal_(made.bias)
    upstream, inputs = torch.randn(2, 5, 20, dtype=torch.float64), [x, *made.parameters()]
    plain = F.linear(x, 8 / 3 * made.B @ made.A, made.bias)
    torch.testing.assert_close(made(x), plain)
    torch.testing.assert_close(made.dense_weight(), (8 / 3 * made.B @ made.A).detach())
    for ours, dense in zip(
        torch.autograd.grad((made(x) * upstream).sum(), inputs),
        torch.autograd.grad((plain * upstream).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, dense)


def test_initial_values_are_kaiming_uniform():
    made = layer(n=400, m=300, r=100)
    for factor, fan_in in ((made.A, 400), (made.B, 100)):
        assert factor.abs().max() <= fan_in**-0.5
        # a uniform law in (-b, b) has the standard deviation b / sqrt 3
        assert factor.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.02)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_either_kind_of_linear_layer_is_replaced_and_given_back(kind):
    linear = nn.Linear(12, 20) if kind is nn.Linear else Conv1D(20, 12)
    nn.init.normal_(linear.bias)
    made = lr.LowRankFactorsConfig(r=3).replace_layer(linear, 3, torch.Generator().manual_seed(0))
    linear.load_state_dict(made.dense_state())
    x = torch.randn(5, 12)
    torch.testing.assert_close(linear(x), made(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [4, 2])
def test_refactorisation_balances_the_factors_and_keeps_the_product(rank):
    generator = torch.Generator().manual_seed(0)
    B, A = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((9, rank), (rank, 7)))
    # rank 2 in factors of rank 4: a product without full rank
    B, A = torch.cat([B, B[:, : 4 - rank]], 1), torch.cat([A, A[: 4 - rank]])
    new_A, new_B = balanced(A, B)
    torch.testing.assert_close(new_B @ new_A, B @ A)
    values = torch.linalg.svdvals(B @ A)[:4]
    for gram in (new_B.T @ new_B, new_A @ new_A.T):
        torch.testing.assert_close(gram, torch.diag(values), atol=1e-7, rtol=0)


def test_signs_of_the_factors_do_not_depend_on_those_of_the_old_ones():
    generator = torch.Generator().manual_seed(0)
    B, A = torch.randn(9, 3, generator=generator), torch.randn(3, 7, generator=generator)
    for first, second in zip(balanced(A, B), balanced(-A, -B), strict=True):
        torch.testing.assert_close(first, second)


def trained(tmp_path, steps, model=None, **settings):
    args = arguments(tmp_path, max_steps=steps, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0)
    config = lr.LowRankFactorsConfig(r=4, **settings)
    model, kwargs = lr.prepare(llama(attention_dropout=0.0) if model is None else model, config, args)
    trainer = Trainer(model=model, args=args, train_dataset=dataset(), **kwargs)
    trainer.train()
    return trainer


def test_a_reset_starts_adam_anew_and_a_refactorisation_leaves_the_function(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="hf_lowrank"):
        reset = trained(tmp_path / "a", 4, refactorize_every=3, reset_moments_every=3)
    assert "14 layers after step 3: refactorised, moments reset" in caplog.text
    plain = trained(tmp_path / "b", 3)
    name = "model.layers.0.mlp.up_proj"
    ours, before = (trainer.model.get_submodule(name) for trainer in (reset, plain))
    # at step 4, the first after the reset, Adam moves every entry by the rate alone; eps is seen where a gradient is
    # near 1e-5
    A, _ = balanced(before.A.detach(), before.B.detach())
    moved = (ours.A.detach() - A.float()).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-2), rtol=1e-2, atol=0)
    states = [reset.optimizer.state[p] for p in (ours.A, reset.model.get_parameter("model.norm.weight"))]
    assert [int(state["step"]) for state in states] == [1, 4]


def test_without_the_options_no_callback_is_needed(tmp_path):
    _, kwargs = lr.prepare(gpt2(), lr.LowRankFactorsConfig(r=4), arguments(tmp_path))
    assert "callbacks" not in kwargs


@pytest.mark.parametrize(
    ("fields", "word"),
    [({"alpha": 0}, "alpha=0"), ({"refactorize_every": -1}, "refactorize_every=-1"), ({"reset_moments_every": 0.5},
     "reset_moments_every=0.5")],
)  # fmt: skip
def test_values_out_of_range_are_named(fields, word):
    with pytest.raises(ValueError, match=word):
        lr.LowRankFactorsConfig(**fields)


def test_moments_of_another_optimizer_are_refused_before_training(tmp_path):
    args = arguments(tmp_path, optim="adafactor")
    with pytest.raises(ValueError, match="optim='adafactor' and reset_moments_every=5"):
        lr.prepare(llama(), lr.LowRankFactorsConfig(r=4, reset_moments_every=5), args)
