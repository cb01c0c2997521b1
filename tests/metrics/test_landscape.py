"""Landscapes of a loss that is known, and parameters that come back bit for bit."""

import numpy as np
import pytest
import torch
from quadratic import Quadratic
from tiny_runs import gpt2, llama, weights
from toy_models import toy_model

from hf_lowrank.methods.targets import find_targets
from hf_lowrank.metrics.landscape import (
    NORMALIZATIONS,
    LossCurve,
    expected_sharpness,
    loss_curve,
    mean_curve,
    random_direction,
    svd_direction,
    variance_over_directions,
)

GRID = np.linspace(-0.5, 0.5, 11)


def value(model):
    return model.loss().item()


def flat(direction):
    return torch.cat([tensor.double().flatten() for tensor in direction.values()])


def test_a_quadratic_loss_along_a_direction():
    model = Quadratic()
    d = flat(random_direction(model, 0))
    curve = loss_curve(model, value, random_direction(model, 0), GRID)
    expected = [
        (model.loss() + x * d @ (model.H @ model.theta() + model.g) + x**2 * d @ model.H @ d / 2) for x in GRID
    ]
    np.testing.assert_allclose(curve.loss, [float(e) for e in expected], rtol=1e-5)
    positive = GRID[GRID > 0]
    assert expected_sharpness(curve) == pytest.approx((d @ model.H @ d).item() / 2 * (positive**2).mean(), rel=1e-5)


def test_sharpness_over_gaussian_directions_has_the_mean_and_variance_of_the_trace_formula():
    model, count = Quadratic(), 400
    curves = [loss_curve(model, value, random_direction(model, seed), [-0.1, 0.0, 0.1]) for seed in range(count)]
    sharpness = np.array([expected_sharpness(curve) for curve in curves])
    mean, variance = 0.1**2 * model.H.trace().item() / 2, 0.1**4 * model.H.square().sum().item() / 2
    # mean and variance of 400 draws, four standard errors
    assert abs(sharpness.mean() - mean) < 4 * (variance / count) ** 0.5
    assert abs(sharpness.var() - variance) < 4 * variance * (2 / count) ** 0.5 * 2
    assert expected_sharpness(mean_curve(curves)) == pytest.approx(sharpness.mean())
    assert variance_over_directions(curves) == pytest.approx(np.stack([c.loss for c in curves]).var(0).mean())


@pytest.mark.parametrize(("radius", "points"), [(0.3, 7), (0.7, 21), (0.1, 41), (1e-5, 7)])
def test_grids_of_linspace_have_their_zero_whatever_it_rounds_to(radius, points):
    model, grid = Quadratic(), np.linspace(-radius, radius, points)
    curve = loss_curve(model, value, random_direction(model, 0), grid)
    assert curve.x[points // 2] == 0
    assert curve.center_loss == value(model)
    rounded = LossCurve(np.where(curve.x == 0, radius * 1e-16, curve.x), curve.loss)
    assert expected_sharpness(rounded) == expected_sharpness(curve)
    d = flat(random_direction(model, 0))
    wanted = (d @ model.H @ d).item() / 2 * (grid[points // 2 + 1 :] ** 2).mean()
    assert expected_sharpness(curve) == pytest.approx(wanted, rel=1e-4)
    with pytest.raises(ValueError, match="0 points at 0 and needs one"):
        expected_sharpness(LossCurve(grid + radius / points, curve.loss))


def test_directions_are_the_same_for_models_of_one_shape_and_differ_by_seed():
    one, two = random_direction(llama(seed=0), 5), random_direction(llama(seed=1), 5)
    assert one.keys() == dict(llama().named_parameters()).keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(flat(one), flat(random_direction(llama(), 6)))
    # tied parameters are there once
    assert "lm_head.weight" not in random_direction(gpt2(), 0)
    entries = flat(one)
    assert abs(entries.mean()) < 4 / len(entries) ** 0.5
    assert entries.std().item() == pytest.approx(1, abs=4 / (2 * len(entries)) ** 0.5)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_filters_are_the_weights_of_an_output(make):
    model = make()
    direction = random_direction(model, 3, "filter")
    for name, p in model.named_parameters():
        # GPT-2's Conv1D stores (in, out)
        stored_transposed = make is gpt2 and p.ndim == 2 and ".h." in name
        axis = 0 if p.ndim == 1 or stored_transposed else 1
        torch.testing.assert_close(direction[name].norm(dim=axis), p.norm(dim=axis))
    assert make is llama or any(
        len(p) != p.shape[-1] for n, p in model.named_parameters() if ".h." in n and p.ndim == 2
    )


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_normalisations(normalize):
    model = llama()
    direction = random_direction(model, 3, normalize)
    name = "model.layers.0.mlp.up_proj.weight"
    p, d = model.get_parameter(name), direction[name]
    if normalize == "filter":
        torch.testing.assert_close(d.norm(dim=1), p.norm(dim=1))
    elif normalize == "layer":
        torch.testing.assert_close(d.norm(), p.norm())
    elif normalize == "unit":
        assert flat(direction).norm().item() == pytest.approx(1)
    else:
        assert d.std().item() == pytest.approx(1, abs=0.2)
    with pytest.raises(ValueError, match="normalize='rows'"):
        random_direction(model, 0, "rows")


def test_svd_directions():
    model = Quadratic()
    U, S, Vh = torch.linalg.svd(model.matrix.detach())
    for k in (1, 3):
        one = torch.outer(U[:, k - 1], Vh[k - 1])
        torch.testing.assert_close(svd_direction(model, k)["matrix"], one)
        torch.testing.assert_close(svd_direction(model, k, sigma_weighted=True)["matrix"], S[k - 1] * one)
    assert torch.equal(svd_direction(model, 1)["vector"], model.vector)
    assert not svd_direction(model, 1, vectors="zero")["vector"].any()
    assert not svd_direction(model, 4)["matrix"].any()
    with pytest.raises(ValueError, match="k counts from 1"):
        svd_direction(model, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_are_bit_identical_afterwards_and_after_an_exception(dtype):
    model = llama().to(dtype).eval()
    before, direction = weights(model), random_direction(model, 0)
    seen = []

    def loss_fn(m):
        seen.append(m.lm_head.weight.detach().clone())
        return m(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.item()

    curve = loss_curve(model, loss_fn, direction, [-0.5, 0.0, 0.5])
    assert torch.equal(seen[1], before["lm_head.weight"])
    assert not torch.equal(seen[0], seen[1])
    assert curve.center_loss == pytest.approx(loss_fn(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())

    def fails(m):
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        loss_curve(model, fails, direction, [0.5])
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())


def test_a_direction_of_another_model_is_named():
    direction = random_direction(llama(), 0)
    with pytest.raises(ValueError, match=r"the direction has another shape for lm_head\.weight \(21 in all\)"):
        loss_curve(llama(hidden_size=32), lambda m: 0.0, direction, [0.0])
    del direction["lm_head.weight"]
    with pytest.raises(ValueError, match=r"the direction lacks lm_head\.weight"):
        loss_curve(llama(), lambda m: 0.0, direction, [0.0])


@pytest.mark.parametrize("x", [[-1.0, 1.0], [-1.0, 0.0, 2.0], [0.0, 1.0], [0.0]])
def test_sharpness_needs_a_symmetric_grid_with_zero(x):
    with pytest.raises(ValueError, match="the grid"):
        expected_sharpness(LossCurve(np.array(x), np.zeros(len(x))))


def test_scalars_of_a_curve_whatever_its_order():
    curve = LossCurve(np.array([1.0, -1.0, 0.0]), np.array([4.0, 1.0, 2.0]))
    assert (curve.center_loss, curve.min_loss, curve.center_to_min) == (2.0, 1.0, 1.0)
    assert expected_sharpness(curve) == pytest.approx(0.5)


def test_curves_on_different_grids_have_no_mean():
    curves = [LossCurve(np.array([0.0, 1.0]), np.zeros(2)), LossCurve(np.array([0.0, 2.0]), np.zeros(2))]
    with pytest.raises(ValueError, match="all on the same grid"):
        mean_curve(curves)
    with pytest.raises(ValueError, match="0 curves"):
        variance_over_directions([])


def test_a_direction_may_be_the_parameters_themselves():
    model = Quadratic()
    own, copies = dict(model.named_parameters()), {n: p.detach().clone() for n, p in model.named_parameters()}
    np.testing.assert_array_equal(
        loss_curve(model, value, own, GRID).loss, loss_curve(model, value, copies, GRID).loss
    )


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_each_matrix_of_a_stack_of_experts_is_a_tensor_for_itself(model_type):
    model = toy_model(model_type)
    by_filter, by_layer = (random_direction(model, 0, normalize) for normalize in ("filter", "layer"))
    directions = svd_direction(model, 2), svd_direction(model, 2, sigma_weighted=True)
    stacks = [target for target in find_targets(model) if target.stack is not None]
    assert len(stacks) == 8
    for target in stacks:
        name = target.weight_name
        for i, stored in enumerate(model.get_parameter(name).detach()):
            weight, *along = (
                t.T if target.stack.transposed else t for t in (stored, by_filter[name][i], by_layer[name][i])
            )
            torch.testing.assert_close(along[0].norm(dim=1), weight.norm(dim=1))
            torch.testing.assert_close(along[1].norm(), weight.norm())
            U, S, Vh = torch.linalg.svd(stored.double())
            for direction, factor in zip(directions, (1.0, S[1]), strict=True):
                expected = factor * torch.outer(U[:, 1], Vh[1])
                found = direction[name][i].double()
                assert min((found - expected).norm(), (found + expected).norm()) < 1e-5 * factor
