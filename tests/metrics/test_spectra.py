"""Spectral metrics against closed forms, scipy in float64, and simulation."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from hf_lowrank.metrics.spectra import (
    power_law_alpha,
    relative_norm,
    singular_values,
    singular_vectors,
    spectral_metrics,
    subspace_overlap,
)


def matrix(values, m, n, seed=0):
    """(m, n) matrix with these singular values and Haar singular vectors, float64."""
    generator = torch.Generator().manual_seed(seed)
    q = len(values)
    U = torch.linalg.qr(torch.randn(m, q, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, q, generator=generator, dtype=torch.float64)).Q
    return U @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ V.T


@pytest.mark.parametrize("shape", [(30, 70), (70, 30), (50, 50), (1, 9), (9, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_singular_values_equal_scipys(shape, dtype):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    expected = scipy.linalg.svdvals(W.double().numpy())
    np.testing.assert_allclose(singular_values(W).numpy(), expected, rtol=1e-7)


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
def test_ill_conditioned_float32_is_right_above_1e_5_of_the_largest(shape):
    W = matrix(np.logspace(0, -7, 60), *shape).float()
    expected = scipy.linalg.svdvals(W.double().numpy())
    found = singular_values(W).numpy()
    above = expected > 1e-5 * expected[0]
    assert above.sum() > 30
    np.testing.assert_allclose(found[above], expected[above], rtol=1e-4)
    assert (np.diff(found) <= 0).all()


def test_equal_values():
    metrics = spectral_metrics(matrix([3.0] * 20, 20, 35))
    assert metrics.effective_rank_score == pytest.approx(1, abs=1e-12)
    assert metrics.stable_rank == pytest.approx(20, abs=1e-9)
    assert metrics.spectral_gap == pytest.approx(0, abs=1e-12)
    assert metrics.singular_value_ratio == pytest.approx(1, abs=1e-12)
    assert (metrics.rank, metrics.numerical_rank, metrics.num_gt, metrics.ratio_gt) == (20, 20, 20, 1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rank_one(dtype):
    metrics = spectral_metrics(torch.outer(torch.arange(1.0, 21), torch.arange(1.0, 36)).to(dtype))
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert metrics.effective_rank_score == pytest.approx(1 / 20, rel=tolerance)
    assert metrics.stable_rank == pytest.approx(1, rel=tolerance)
    assert metrics.spectral_gap == pytest.approx(1, rel=tolerance)
    assert metrics.numerical_rank == 1


def test_chosen_values():
    values = [4.0, 2.0, 1.0, 0.05]
    metrics = spectral_metrics(matrix(values, 6, 4))
    p = np.array(values) / sum(values)
    assert metrics.effective_rank == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    assert metrics.stable_rank == pytest.approx(sum(v * v for v in values) / 16)
    assert metrics.spectral_gap == pytest.approx(0.5)
    assert metrics.singular_value_ratio == pytest.approx(0.5)
    assert (metrics.rank, metrics.rank_ratio, metrics.num_gt, metrics.ratio_gt) == (4, 1.0, 3, 0.75)
    assert metrics.spectral_norm == pytest.approx(4)
    assert metrics.frobenius_norm == pytest.approx(math.sqrt(sum(v * v for v in values)))


def test_numerical_rank_is_numpys():
    W = matrix([1.0, 0.5, 1e-3, 1e-9, 1e-10], 40, 60).float()
    assert spectral_metrics(W).numerical_rank == np.linalg.matrix_rank(W.numpy()) == 3


def test_zero_matrix_has_no_ratios_and_no_rank():
    metrics = spectral_metrics(torch.zeros(4, 5))
    assert (metrics.rank, metrics.numerical_rank, metrics.num_gt, metrics.frobenius_norm) == (0, 0, 0, 0.0)
    assert math.isnan(metrics.effective_rank_score)
    assert math.isnan(metrics.spectral_gap)


@pytest.mark.parametrize(
    ("weight", "word"),
    [(torch.zeros(3), "matrices"), (torch.zeros(0, 3), "matrices"), (torch.full((3, 3), torch.nan), "NaN")],
)
def test_what_is_no_matrix_is_refused(weight, word):
    with pytest.raises(ValueError, match=word):
        singular_values(weight)


def test_alpha_finds_a_known_exponent():
    # eigenvalues x of a Pareto law with density ~ x^-alpha: the estimate's standard error is (alpha - 1) / sqrt(N)
    generator = np.random.default_rng(0)
    for alpha in (2.0, 3.5):
        estimates = []
        for _ in range(20):
            x = (1 - generator.random(2000)) ** (-1 / (alpha - 1))
            estimates.append(power_law_alpha(torch.tensor(np.sqrt(x))))
        stderr = np.std(estimates, ddof=1) / math.sqrt(len(estimates))
        # picking x_min by the smallest distance costs some bias beside the sampling error
        assert abs(np.mean(estimates) - alpha) < 4 * stderr + 0.03 * alpha


def test_alpha_of_too_few_values_is_nan():
    assert math.isnan(power_law_alpha(torch.tensor([1.0])))
    assert math.isnan(power_law_alpha(torch.tensor([2.0, 2.0])))


def test_alpha_does_not_depend_on_scale():
    values = torch.rand(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert power_law_alpha(values) == pytest.approx(power_law_alpha(17 * values), rel=1e-9)


def test_relative_norm():
    W = torch.ones(3, 4)
    assert relative_norm(0.5 * W, W) == pytest.approx(0.5)
    assert math.isnan(relative_norm(W, torch.zeros(3, 4)))


def test_subspace_overlap():
    eye = torch.eye(10, dtype=torch.float64)
    assert subspace_overlap(eye[:, :3], eye[:, :3]) == 1
    assert subspace_overlap(eye[:, :3], eye[:, 3:6]) == 0
    assert subspace_overlap(eye[:, :2], eye[:, :5]) == 1
    # independent random subspaces: k / d on average, here over 200 draws
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(200):
        a, b = (torch.linalg.qr(torch.randn(40, 8, generator=generator, dtype=torch.float64)).Q for _ in range(2))
        found.append(subspace_overlap(a, b))
    stderr = np.std(found, ddof=1) / math.sqrt(len(found))
    assert abs(np.mean(found) - 8 / 40) < 4 * stderr


def test_singular_vectors_span_what_was_put_in():
    W = matrix([5.0, 4.0, 3.0, 0.1, 0.1], 12, 20)
    U, V = singular_vectors(W, 3)
    assert U.shape == (12, 3)
    assert V.shape == (20, 3)
    torch.testing.assert_close((U.T @ W @ V).abs(), torch.diag(torch.tensor([5.0, 4, 3], dtype=torch.float64)))
