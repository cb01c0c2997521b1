"""Hessians that are known."""

import math

import pytest
import torch
from quadratic import Quadratic, loss
from tiny_runs import METHODS, arguments, gpt2, llama, weights

import hf_lowrank as lr
from hf_lowrank.metrics.curvature import hessian_trace, quadratic_forms, top_eigenpair, top_eigenvalue


def test_the_trace_of_a_quadratic_loss():
    model = Quadratic()
    estimates = [hessian_trace(model, loss, samples=50, seed=seed) for seed in range(40)]
    truth = model.H.trace().item()
    errors = [(e.value - truth) / e.stderr for e in estimates]
    # 40 draws of about a standard normal: their mean square has the standard error sqrt(2 / 40)
    assert sum(error**2 for error in errors) / 40 == pytest.approx(1, abs=4 * (2 / 40) ** 0.5)
    diagonal = Quadratic()
    diagonal.H = diagonal.H.diag().diag()
    exact = hessian_trace(diagonal, loss, samples=4)
    assert exact.value == pytest.approx(diagonal.H.trace().item())
    assert exact.stderr == pytest.approx(0, abs=1e-10)
    assert math.isnan(hessian_trace(model, loss, samples=1).stderr)


def test_the_largest_eigenvalue_of_a_quadratic_loss():
    model = Quadratic()
    found = top_eigenvalue(model, loss, iterations=40)
    assert found.value == pytest.approx(torch.linalg.eigvalsh(model.H)[-1].item(), rel=1e-8)
    assert found.stderr < 1e-4
    few = top_eigenvalue(model, loss, iterations=4)
    values = torch.linalg.eigvalsh(model.H)
    assert (values - few.value).abs().min() <= few.stderr * (1 + 1e-9)
    assert few.stderr > 0


def test_a_negative_definite_hessian_has_a_negative_largest_eigenvalue():
    model = Quadratic()
    model.H = -torch.eye(model.size, dtype=torch.float64)
    assert top_eigenvalue(model, loss).value == pytest.approx(-1)


def test_the_shares_of_a_loss_make_up_its_curvature():
    model, theta = Quadratic(), Quadratic().size
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(theta, theta, generator=generator, dtype=torch.float64) for _ in range(3)]
    parts = [part + part.T for part in parts]

    def shares(model):
        return [model.theta() @ part @ model.theta() / 2 for part in parts] + [torch.zeros(())]

    H = sum(parts)
    forms = quadratic_forms(model, shares, samples=400)
    assert forms.shape == (400, 4)
    expected = torch.tensor([part.trace().item() for part in parts] + [0.0])
    noise = 4 * torch.from_numpy(forms.std(0)) / 20
    assert (torch.from_numpy(forms.mean(0)) - expected).abs().le(noise).all()
    pair = top_eigenpair(model, shares, iterations=40)
    values, vectors = torch.linalg.eigh(H)
    y = vectors[:, -1]
    assert pair.value == pytest.approx(values[-1].item(), rel=1e-8)
    # the eigenvector is kept in bfloat16
    assert pair.shares == pytest.approx([*[(y @ part @ y).item() for part in parts], 0.0], abs=0.02 * pair.value)
    assert pair.shares.sum() == pytest.approx(pair.value)
    assert top_eigenvalue(model, shares, iterations=40).value == pair.value


def language_loss(model):
    ids = torch.arange(12)[None] % 7
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_language_models_trace_is_that_of_its_full_hessian(make):
    model = make().double().eval()
    for name, p in model.named_parameters():
        p.requires_grad_("layernorm" in name or "ln_" in name or "norm" in name)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before, implementation = weights(model), model.config._attn_implementation

    def of(values):
        ids = torch.arange(12)[None] % 7
        return torch.func.functional_call(model, values, (), {"input_ids": ids, "labels": ids}).loss

    model.set_attn_implementation("eager")
    blocks = torch.autograd.functional.hessian(
        lambda *tensors: of(dict(zip(trained, tensors, strict=True))), tuple(p.detach() for p in trained.values())
    )
    model.set_attn_implementation(implementation)
    sizes = [p.numel() for p in trained.values()]
    rows = [[b.reshape(m, n) for b, n in zip(row, sizes, strict=True)] for row, m in zip(blocks, sizes, strict=True)]
    H = torch.cat([torch.cat(row, 1) for row in rows])
    found = hessian_trace(model, language_loss, samples=60)
    assert abs(found.value - H.trace().item()) < 4 * found.stderr
    top = top_eigenvalue(model, language_loss, iterations=40)
    assert top.value == pytest.approx(torch.linalg.eigvalsh(H)[-1].item(), rel=1e-5)
    # nothing is left behind
    assert model.config._attn_implementation == implementation
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())


@pytest.mark.parametrize("method", ["sltrain", "cola", "cola-m", "lora"])
def test_every_layer_has_second_derivatives(method, tmp_path):
    model, _ = lr.prepare(llama(attention_dropout=0.0), METHODS[method], arguments(tmp_path))
    model.eval()
    assert math.isfinite(hessian_trace(model, language_loss, samples=2).value)
    checkpointing = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    assert checkpointing == (method == "cola-m")


def test_what_has_no_curvature_is_named():
    model = Quadratic().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        hessian_trace(model, loss)
    with pytest.raises(ValueError, match="scalar tensor"):
        top_eigenvalue(Quadratic(), lambda m: m.matrix)
    with pytest.raises(ValueError, match="samples=0"):
        hessian_trace(Quadratic(), loss, samples=0)


def test_a_loss_without_curvature_has_none():
    assert hessian_trace(Quadratic(), lambda m: m.theta().sum(), samples=2).value == 0
    assert top_eigenvalue(Quadratic(), lambda m: m.theta().sum()).value == 0
