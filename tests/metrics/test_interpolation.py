"""Paths and barriers that are known."""

import numpy as np
import pytest
import torch
from quadratic import Quadratic
from tiny_runs import METHODS, arguments, dataset, llama, weights

import hf_lowrank as lr
from hf_lowrank.metrics.interpolation import barrier, loss_path
from hf_lowrank.metrics.sequences import EvaluationSet


def value(model):
    return model.loss().item()


def test_a_quadratic_loss_between_two_points():
    a, b, model = Quadratic(seed=0), Quadratic(seed=0), Quadratic(seed=0)
    with torch.no_grad():
        b.matrix.add_(1.0)
    alphas = np.linspace(-0.25, 1.25, 7)
    found = loss_path(model, a.state_dict(), b.state_dict(), value, alphas)
    for alpha, loss in zip(alphas, found, strict=True):
        theta = (1 - alpha) * a.theta() + alpha * b.theta()
        assert loss == pytest.approx((theta @ model.H @ theta / 2 + model.g @ theta).item())


def test_barriers_of_known_paths():
    x = np.linspace(0, 1, 21)
    hill = barrier(x, 1 + x + 4 * x * (1 - x))
    # the highest point is where 1 + 4 (1 - 2x) = 0, x = 0.625 between two grid points
    assert hill.value == pytest.approx((1 + x + 4 * x * (1 - x))[1:-1].max() - 1.5)
    assert hill.chord == pytest.approx(1.0)
    assert hill.alpha == pytest.approx(0.6)
    valley = barrier(x, 4 * x * (x - 1))
    assert valley.value == valley.chord == pytest.approx(-0.19)
    wide = np.linspace(-0.25, 1.25, 31)
    # what lies beyond the ends does not count
    assert barrier(wide, np.where((wide < -1e-9) | (wide > 1 + 1e-9), 100.0, 2.0)).value == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_barrier_that_is_not_finite_has_no_place(bad):
    x = np.linspace(-0.25, 1.25, 31)
    losses = 1 + x * (1 - x)
    inside = barrier(x, np.where(np.arange(31) == 12, bad, losses))
    assert not np.isfinite(inside.value)
    assert not np.isfinite(inside.chord)
    assert np.isnan(inside.alpha)
    end = barrier(x, np.where(np.arange(31) == 5, bad, losses))
    assert not np.isfinite(end.value)
    assert np.isnan(end.alpha)
    # beyond the ends it does not count
    beyond = barrier(x, np.where(np.arange(31) == 0, bad, losses))
    assert (beyond.value, beyond.alpha) == (pytest.approx(0.25), pytest.approx(0.5))


def test_ends_on_a_grid_of_linspace_are_the_given_weights():
    model, seen = Quadratic(), []
    ends = [Quadratic(seed=s).state_dict() for s in (1, 2)]
    alphas = np.linspace(-0.1, 1.1, 13)
    assert 0 not in alphas or 1 not in alphas
    loss_path(model, *ends, lambda m: seen.append(weights(m)) or 0.0, alphas)
    for index, state in ((1, ends[0]), (11, ends[1])):
        assert all(torch.equal(tensor, state[name]) for name, tensor in seen[index].items())


def test_a_model_and_itself_have_no_barrier():
    model = llama().eval()
    state, ids = weights(model), torch.arange(8)[None]
    losses = loss_path(model, state, state, lambda m: m(input_ids=ids, labels=ids).loss.item(), np.linspace(0, 1, 5))
    assert barrier(np.linspace(0, 1, 5), losses).value == pytest.approx(0, abs=1e-6)


def test_ends_are_the_given_weights_and_the_model_ends_as_it_was():
    model, a, b = llama(seed=0).to(torch.bfloat16), llama(seed=1), llama(seed=2)
    before, seen = weights(model), []
    loss_path(model, weights(a), weights(b), lambda m: seen.append(weights(m)) or 0.0, [0.0, 0.5, 1.0])
    for index, end in ((0, a), (2, b)):
        for name, tensor in weights(end).items():
            assert torch.equal(seen[index][name], tensor.to(torch.bfloat16)), name
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())
    with pytest.raises(ZeroDivisionError):
        loss_path(model, weights(a), weights(b), lambda m: 1 / 0, [0.5])
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())


def test_other_architectures_and_other_supports_are_named(tmp_path):
    with pytest.raises(ValueError, match="state_b has another shape for"):
        loss_path(llama(), weights(llama()), weights(llama(hidden_size=32)), lambda m: 0.0, [0.5])
    models = [lr.prepare(llama(), METHODS["sltrain"], arguments(tmp_path, seed=s))[0] for s in (1, 2)]
    with pytest.raises(ValueError, match="sparse_support differs .* take dense forms"):
        loss_path(models[0], *map(weights, models), lambda m: 0.0, [0.5])
    dense = [weights(lr.to_dense(model)) for model in models]
    assert len(loss_path(llama(), *dense, lambda m: 0.0, [0.0, 0.5])) == 2


@pytest.mark.parametrize("alphas", [[0.0, 1.0], [0.0, 0.5], [0.1, 0.5, 1.0], [0.0, 0.0, 0.5, 1.0]])
def test_a_grid_without_its_ends_or_interior_is_refused(alphas):
    with pytest.raises(ValueError, match="the grid needs 0 and 1 once and a point between"):
        barrier(alphas, [0.0] * len(alphas))
    with pytest.raises(ValueError, match="one loss a position"):
        barrier([0.0, 0.5, 1.0], [1.0, 2.0])


def test_an_end_may_be_the_models_own_state_dict():
    one, two = llama(seed=0).eval(), llama(seed=1).eval()
    batch = EvaluationSet.from_dataset(dataset(4))
    copies = [weights(one), weights(two)]
    expected = loss_path(llama().eval(), *copies, batch, [0, 0.5, 1])
    for model in (one, two):
        np.testing.assert_array_equal(
            loss_path(model, one.state_dict(), two.state_dict(), batch, [0, 0.5, 1]), expected
        )
