"""Muon against torch.optim.Muon, and what trains by which of its two optimizers."""

import pytest
import torch
from tiny_runs import arguments, llama, make_trainer
from torch import nn

import hf_lowrank as lr
from hf_lowrank.methods.muon import MuonAdamW, orthogonalized

OPTIONS = {"momentum": 0.9, "nesterov": True, "ns_steps": 5, "adjust_lr_fn": "match_rms_adamw"}


def gradients(shape, steps=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon to compare with")
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("changed", [{}, {"nesterov": False}, {"adjust_lr_fn": "original"}, {"ns_steps": 3}])
def test_a_matrix_is_updated_as_by_torchs_muon_to_the_bit(shape, changed):
    options = {**OPTIONS, **changed}
    ours, reference = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape))
    optimizer = MuonAdamW([{"params": [ours], **options}], lr=0.01, weight_decay=0.1)
    official = torch.optim.Muon([reference], lr=0.01, weight_decay=0.1, **options)
    for gradient in gradients(shape):
        ours.grad, reference.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        official.step()
        assert torch.equal(ours, reference)


def test_a_stack_is_updated_matrix_by_matrix():
    stack = nn.Parameter(torch.ones(3, 12, 20))
    matrices = [nn.Parameter(torch.ones(12, 20)) for _ in range(3)]
    optimizers = [MuonAdamW([{"params": part, **OPTIONS}], lr=0.01) for part in ([stack], matrices)]
    for gradient in gradients((3, 12, 20)):
        stack.grad = gradient.clone()
        for p, part in zip(matrices, gradient, strict=True):
            p.grad = part.clone()
        for optimizer in optimizers:
            optimizer.step()
    # the iteration runs in bf16, where products of stacks may be summed in another order
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in matrices]), rtol=0, atol=1e-3)


def test_singular_values_come_near_one_and_vectors_stay():
    generator = torch.Generator().manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(30, 10, generator=generator))
    V, _ = torch.linalg.qr(torch.randn(10, 10, generator=generator))
    result = orthogonalized(U @ torch.diag(torch.linspace(1, 0.2, 10)) @ V.T, 5).float()
    inside = U.T @ result @ V
    assert 0.6 < inside.diagonal().min() < inside.diagonal().max() < 1.3
    assert (inside - torch.diag(inside.diagonal())).abs().max() < 0.05
    assert (result - U @ inside @ V.T).abs().max() < 0.02
    assert torch.equal(orthogonalized(torch.zeros(4, 6), 5), torch.zeros(4, 6, dtype=torch.bfloat16))


def test_targets_are_muons_and_everything_else_adamws(tmp_path):
    trainer = make_trainer(lr.MuonConfig(other_lr_scale=3), arguments(tmp_path, max_steps=2), model=llama())
    trainer.train()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    inner = trainer.optimizer.optimizer
    state = {names[id(p)]: set(held) for p, held in inner.state.items()}
    muon = {name for name, keys in state.items() if keys == {"step", "momentum_buffer"}}
    assert muon == {name for name in names.values() if "_proj.weight" in name}
    assert len(muon) == 14
    assert all("exp_avg_sq" in state[name] for name in names.values() if name not in muon)
    rates = {"ns_steps" in group: group["initial_lr"] for group in inner.param_groups}
    assert rates == {True: 1e-2, False: 3e-2}


@pytest.mark.parametrize(
    ("fields", "word"), [({"momentum": 1}, "momentum=1"), ({"ns_steps": 0}, "ns_steps=0"),
                         ({"adjust_lr_fn": "none"}, "adjust_lr_fn='none'")],
)  # fmt: skip
def test_values_out_of_range_are_named(fields, word):
    with pytest.raises(ValueError, match=word):
        lr.MuonConfig(**fields)


def test_an_optimizer_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="optim='adafactor': Muon trains what is no target by torch's AdamW"):
        lr.prepare(llama(), lr.MuonConfig(), arguments(tmp_path, optim="adafactor"))


@pytest.mark.parametrize("broken", [0, 1])
def test_a_gradient_that_is_not_finite_leaves_its_parameter_out(broken, caplog):
    weight, other = nn.Parameter(torch.ones(12, 20)), nn.Parameter(torch.ones(5))
    optimizer = MuonAdamW([{"params": [weight], **OPTIONS}, {"params": [other]}], lr=0.01)
    params = (weight, other)
    for p in params:
        p.grad = torch.ones_like(p)
    params[broken].grad[0] = float("nan")
    optimizer.step()
    assert [not torch.equal(p, torch.ones_like(p)) for p in params] == [broken != 0, broken != 1]
    assert all(p.grad is not None for p in params)
    assert params[broken] not in optimizer.state
    assert "parameter 0 of group" in caplog.text
