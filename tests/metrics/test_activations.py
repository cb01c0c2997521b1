"""CKA, cosine and L2 of representations whose likeness is known."""

import math

import pytest
import torch

from hf_lowrank.metrics.activations import StreamingCKA, cosine_similarity, linear_cka, relative_l2


def features(n, width, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("debiased", [False, True])
def test_rotations_scales_and_shifts_do_not_matter(debiased):
    x = features(50, 8) + 3
    Q = torch.linalg.qr(features(8, 8, 1)).Q
    assert linear_cka(x, x @ Q, debiased) == pytest.approx(1)
    assert linear_cka(x, -2.5 * x, debiased) == pytest.approx(1)
    assert linear_cka(x, x + 7, debiased) == pytest.approx(1)


def test_independent_gaussians():
    n, width = 60, 30
    pairs = [(features(n, width, 2 * s), features(n, width, 2 * s + 1)) for s in range(40)]
    plain = torch.tensor([linear_cka(x, y) for x, y in pairs])
    unbiased = torch.tensor([linear_cka(x, y, debiased=True) for x, y in pairs])
    # plain CKA of independent Gaussians is about H / (N + H); the unbiased one is about 0
    assert plain.mean().item() == pytest.approx(width / (n + width), rel=0.1)
    assert abs(unbiased.mean()) < 4 * unbiased.std() / math.sqrt(40)


def gram_cka(x, y, debiased):
    """By the definitions, over pairs of positions."""
    n = len(x)

    def hsic(K, L):
        if not debiased:
            C = torch.eye(n, dtype=K.dtype) - 1 / n
            return (K @ C @ L @ C).trace()
        K, L = K - K.diag().diag(), L - L.diag().diag()
        one = torch.ones(n, dtype=K.dtype)
        pairs = (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2))
        return (K @ L).trace() + pairs - 2 / (n - 2) * (one @ K @ L @ one)

    K, L = x @ x.T, y @ y.T
    return (hsic(K, L) / (hsic(K, K) * hsic(L, L)).sqrt()).item()


@pytest.mark.parametrize("debiased", [False, True])
def test_equals_the_definition_on_gram_matrices_also_by_batches(debiased):
    x = features(40, 6) + 1
    y = x @ features(6, 9, 1) + 0.5 * features(40, 9, 2)
    expected = gram_cka(x, y, debiased)
    assert linear_cka(x, y, debiased) == pytest.approx(expected, rel=1e-9)
    streamed = StreamingCKA()
    for start in range(0, 40, 7):
        streamed.update(x[start : start + 7], y[start : start + 7])
    assert streamed.value(debiased) == pytest.approx(expected, rel=1e-9)


def test_debiased_cka_is_pytorch_ckas():
    # imported here: it brings matplotlib's pyplot along
    from cka import cka_from_features

    for seed in range(10):
        x = features(20 + seed, 6, seed) + 1
        y = x @ features(6, 9, seed + 100) + seed * features(20 + seed, 9, seed + 200)
        expected = cka_from_features(x, y).item()
        assert 0 < expected < 1
        assert linear_cka(x, y, debiased=True) == pytest.approx(expected, rel=1e-9)
    # an estimate below zero is cut there, and stays as it is here
    x, y = features(12, 40), features(12, 40, 3)
    assert linear_cka(x, y, debiased=True) < 0
    assert cka_from_features(x, y).item() == 0


def test_float32_features_far_from_zero_keep_their_precision():
    x = features(200, 5)
    y = x @ features(5, 5, 1)
    shifted = linear_cka((x + 1000).float(), (y + 1000).float())
    assert shifted == pytest.approx(linear_cka(x, y), rel=1e-3)


def test_distances():
    y = features(30, 4)
    assert relative_l2(y, y) == 0
    assert relative_l2(2 * y, y) == pytest.approx(1)
    assert cosine_similarity(3 * y, y) == pytest.approx(1)
    assert cosine_similarity(-y, y) == pytest.approx(-1)
    x = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    zero = torch.tensor([[3.0, 0.0], [1.0, 0.0]])
    assert relative_l2(x, zero) == pytest.approx((4 + 2**0.5) / 2 / 2)
    assert cosine_similarity(x, zero) == pytest.approx(0.3)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("mean", [1.0, 1e4, 1e8])
def test_a_large_mean_changes_nothing(mean, debiased):
    x = features(400, 6)
    y = x @ features(6, 5, 1) + 2 * features(400, 5, 2)
    expected = linear_cka(x, y, debiased)
    assert 0.2 < expected < 0.9
    # one feature of each, as in a transformer's residual stream, then all
    for shift in (mean * torch.eye(6, dtype=torch.float64)[2], mean):
        assert linear_cka(x + shift, y - mean, debiased) == pytest.approx(expected, rel=1e-6)
    batches = [StreamingCKA() for _ in range(3)]
    for i, start in enumerate(range(0, 400, 50)):
        batches[i % 3].update(x[start : start + 50] + mean, y[start : start + 50] - mean)
    assert sum(batches, StreamingCKA()).value(debiased) == pytest.approx(expected, rel=1e-6)
    without = batches[0] + batches[1] + batches[2] - batches[1]
    assert without.value(debiased) == pytest.approx((batches[0] + batches[2]).value(debiased), rel=1e-6)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1, 1234.567, 1e8 / 3])
def test_a_constant_representation_has_no_cka(constant, dtype, debiased):
    x, y = torch.full((90, 3), constant, dtype=dtype) * torch.tensor([1.0, -0.3, 7.7], dtype=dtype), features(90, 3)
    for first, second in ((x, y), (y, x), (x, x)):
        streamed = StreamingCKA()
        for start in range(0, 90, 40):
            streamed.update(first[start : start + 40], second[start : start + 40])
        assert math.isnan(streamed.value(debiased))
        assert math.isnan(linear_cka(first, second, debiased))
    # one feature that moves is enough
    moving = x.double() + torch.tensor([0.0, 1e-3 * (1 + abs(constant)), 0.0]) * features(90, 1)
    assert math.isfinite(linear_cka(moving, y, debiased))


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"shapes \(5, 3\) and \(6, 3\)"):
        linear_cka(features(5, 3), features(6, 3))
    with pytest.raises(ValueError, match="the same positions and features"):
        relative_l2(features(5, 3), features(5, 4))
    with pytest.raises(ValueError, match="3 positions: CKA without bias needs 4"):
        linear_cka(features(3, 2), features(3, 2), debiased=True)
