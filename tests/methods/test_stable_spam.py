"""Stable-SPAM against its definition, and what trains by which of its two optimizers."""

import pytest
import torch
from tiny_runs import arguments, llama, make_trainer
from torch import nn

import hf_lowrank as lr
from hf_lowrank.methods.stable_spam import StableSpamAdamW

OPTIONS = {"gamma1": 0.7, "gamma2": 0.9, "gamma3": 0.9, "reset_every": 4}


def gradients(shape, steps=10):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)]
    # spikes
    made[2].view(-1)[3] = 50.0
    made[7].view(-1)[0] = -20.0
    return made


def reference(W, made, options, lr, decay, betas=(0.9, 0.999), eps=1e-8):
    """The official code's steps without its options, from its definition."""
    t = total = 0
    top = first = second = 0.0
    M = V = torch.zeros_like(W)
    for G in made:
        t, total = t + 1, total + 1
        largest = G.abs().max()
        top = options["gamma3"] * top + (1 - options["gamma3"]) * largest
        bound = top / (1 - options["gamma3"] ** t)
        G = torch.where(G.abs() > bound, G / largest * bound, G)
        norm = G.norm()
        first = options["gamma1"] * first + (1 - options["gamma1"]) * norm
        second = options["gamma2"] * second + (1 - options["gamma2"]) * norm**2
        length = first / (1 - options["gamma1"] ** t) / ((second / (1 - options["gamma2"] ** t)).sqrt() + eps)
        G = G / norm * length
        if options["reset_every"] and total % options["reset_every"] == 0:
            t, M, V = 1, torch.zeros_like(W), torch.zeros_like(W)
        M, V = betas[0] * M + (1 - betas[0]) * G, betas[1] * V + (1 - betas[1]) * G**2
        root = (V / (1 - betas[1] ** t)).sqrt() + eps
        W = (1 - lr * decay) * W - lr / (1 - betas[0] ** t) * M / root
    return W


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (1, 7)])
@pytest.mark.parametrize("changed", [{}, {"reset_every": 0}, {"gamma1": 0.0}])
def test_steps_are_those_of_the_definition(shape, changed):
    options, made = {**OPTIONS, **changed}, gradients(shape)
    weight = nn.Parameter(torch.ones(shape, dtype=torch.float64))
    optimizer = StableSpamAdamW([{"params": [weight], **options}], lr=0.01, weight_decay=0.1)
    for G in made:
        weight.grad = G.clone()
        optimizer.step()
        assert torch.equal(weight.grad, G)
    expected = reference(torch.ones(shape, dtype=torch.float64), made, options, 0.01, 0.1)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-10, atol=1e-10)


def test_a_gradient_of_zero_and_one_that_is_not_finite_change_no_average_for_the_worse():
    weight = nn.Parameter(torch.ones(4, 6))
    optimizer = StableSpamAdamW([{"params": [weight], **OPTIONS}], lr=0.01)
    for value in (0.0, float("inf"), 1.0):
        weight.grad = torch.full((4, 6), value)
        optimizer.step()
    assert weight.isfinite().all()
    assert int(optimizer.state[weight]["total"]) == 2


def test_targets_are_stable_spams_and_everything_else_adamws(tmp_path):
    trainer = make_trainer(lr.StableSpamConfig(), arguments(tmp_path, max_steps=2), model=llama())
    trainer.train()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    ours = {names[id(p)] for p, held in trainer.optimizer.optimizer.state.items() if "max_entry" in held}
    assert ours == {name for name in names.values() if "_proj.weight" in name}


@pytest.mark.parametrize(
    ("fields", "word"), [({"gamma1": 1}, "gamma1=1"), ({"gamma3": -0.1}, "gamma3=-0.1"),
                         ({"reset_every": -1}, "reset_every=-1")],
)  # fmt: skip
def test_values_out_of_range_are_named(fields, word):
    with pytest.raises(ValueError, match=word):
        lr.StableSpamConfig(**fields)
