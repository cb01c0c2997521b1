"""Spectral metrics against closed forms, scipy in float64, and simulation."""

import gc
import math
import threading
import weakref

import numpy as np
import pytest
import scipy.linalg
import torch

from hf_lowrank.metrics.spectra import (
    measure_each,
    power_law_alpha,
    relative_norm,
    singular_values,
    singular_vectors,
    spectra,
    spectral_metrics,
    subspace_overlap,
    top_singular_triplets,
)


def matrix(values, m, n, seed=0):
    """(m, n) matrix with these singular values and Haar singular vectors, float64."""
    generator = torch.Generator().manual_seed(seed)
    q = len(values)
    U = torch.linalg.qr(torch.randn(m, q, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, q, generator=generator, dtype=torch.float64)).Q
    return U @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ V.T


@pytest.mark.parametrize("shape", [(30, 70), (70, 30), (50, 50), (1, 9), (9, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_singular_values_equal_scipys(shape, dtype):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    expected = scipy.linalg.svdvals(W.double().numpy())
    np.testing.assert_allclose(singular_values(W).numpy(), expected, rtol=1e-7)


# the larger ones take several blocks of the Gram matrix; the last ones are of rank 30 and 40
@pytest.mark.parametrize(
    ("values", "shape"),
    [
        (np.logspace(0, -7, 60), (60, 90)),
        (np.logspace(0, -7, 60), (90, 60)),
        (np.logspace(0, -7, 300), (300, 400)),
        (np.logspace(2, -5, 300), (400, 300)),
        (np.linspace(1, 2, 30), (70, 80)),
        (np.logspace(0, -4, 40), (300, 200)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threaded", [False, True])
def test_ill_conditioned_matrices_are_right_above_1e_5_of_the_largest(values, shape, dtype, threaded):
    W = matrix(values, *shape).to(dtype)
    expected = scipy.linalg.svdvals(W.double().numpy())
    if threaded:
        ((_, found),) = measure_each(lambda _, weight: singular_values(weight), [("W", W)], threads=2)
    else:
        found = singular_values(W)
    found = found.numpy()
    above = expected > 1e-5 * expected[0]
    assert above.sum() >= 30
    np.testing.assert_allclose(found[above], expected[above], rtol=1e-6)
    np.testing.assert_allclose(found, expected, atol=1e-7 * expected[0])
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


@pytest.mark.parametrize("side", [64, 128, 1024])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numerical_rank_of_half_precision_has_float32s_tolerance(dtype, side):
    W = torch.randn(side, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert spectral_metrics(W).numerical_rank == np.linalg.matrix_rank(W.float().numpy()) == 32
    assert spectral_metrics(torch.ones(side, 32, dtype=dtype)).numerical_rank == 1


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


def alpha_by_loop(values):
    """One candidate x_min after another."""
    x = np.sort(values.numpy() ** 2)
    best = (math.inf, math.nan)
    for i in range(len(x) - 1):
        tail = x[i:]
        spread = np.log(tail / x[i]).sum()
        if spread > 0:
            alpha = 1 + len(tail) / spread
            distance = np.abs(1 - (tail / x[i]) ** (1 - alpha) - np.arange(len(tail)) / len(tail)).max()
            best = min(best, (distance, alpha))
    return best[1]


@pytest.mark.parametrize("q", [2, 3, 128, 129, 300])
@pytest.mark.parametrize("exponent", [-0.4, 1.0])
def test_alpha_tries_every_candidate(q, exponent):
    values = torch.rand(q, generator=torch.Generator().manual_seed(q), dtype=torch.float64) ** exponent
    assert power_law_alpha(values) == pytest.approx(alpha_by_loop(values), rel=1e-9)


def heavy_tailed(seed):
    """Matrix whose eigenvalues s^2 are of a Pareto law, of weights' usual scale."""
    generator = np.random.default_rng(seed)
    q, exponent = int(generator.integers(20, 250)), generator.uniform(1.6, 5)
    values = 0.02 * np.sqrt((1 - generator.random(q)) ** (-1 / (exponent - 1)))
    return matrix(np.sort(values)[::-1].copy(), q + int(generator.integers(0, 90)), q, seed).float()


def test_alpha_is_weightwatchers():
    # imported here: it tells Python to ignore warnings
    from weightwatcher.WW_powerlaw import WWFit

    for seed in range(20):
        W = heavy_tailed(seed)
        eigenvalues = scipy.linalg.svdvals(W.double().numpy()) ** 2
        assert spectral_metrics(W).alpha == pytest.approx(WWFit(eigenvalues).alpha, rel=1e-9)
    # with fewer eigenvalues WeightWatcher corrects for bias and picks x_min otherwise
    values = torch.linspace(1, 2, 19, dtype=torch.float64)
    assert power_law_alpha(values) != pytest.approx(WWFit((values**2).numpy()).alpha, rel=1e-3)


@pytest.mark.parametrize("scale", [1, 0.15])
def test_alpha_is_that_of_weightwatchers_analysis(scale):
    from weightwatcher import WeightWatcher

    model = torch.nn.Sequential(*(torch.nn.Linear(*heavy_tailed(s).T.shape, bias=False) for s in range(3)))
    for seed, layer in enumerate(model):
        layer.weight.data = scale * heavy_tailed(seed)
    found = WeightWatcher(model=model).analyze().alpha
    for alpha, layer in zip(found, model, strict=True):
        values = singular_values(layer.weight)
        # its cut is absolute: scaled down, small eigenvalues are no candidates for x_min
        assert (values**2 > 1e-5).all() == (scale == 1)
        assert alpha == pytest.approx(power_law_alpha(values[values**2 > 1e-5]), rel=1e-9)


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


TRIPLETS = {
    "plain": (np.linspace(3, 1, 40), 8),
    "large k": (np.linspace(3, 1, 40), 30),
    "float64 that would overflow squared": (1e200 * np.linspace(3, 1, 40), 8),
    "float64 that would vanish squared": (1e-200 * np.linspace(3, 1, 40), 8),
    "small s_k": (np.logspace(0, -3.9, 12).tolist() + [1e-5] * 28, 12),
    "ill-conditioned": (np.logspace(0, -12, 40), 12),
    "too small s_k for the Gram matrix": (np.logspace(0, -12, 40), 25),
    "less than k of rank": (np.linspace(3, 1, 5), 8),
    "tiny gap behind k": ([3.0, 2.5, 2.0, 2.0 - 1e-6, 1.0], 3),
    "tiny gaps inside k": ([3.0, 3.0 - 1e-9, 3.0 - 2e-9, 1.0, 0.5], 3),
    "equal values": ([3.0, 3.0, 3.0, 1.0, 0.5], 3),
}


@pytest.mark.parametrize(("values", "k"), TRIPLETS.values(), ids=TRIPLETS)
@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (70, 70), (150, 160)])
def test_triplets_equal_the_full_svds(values, k, shape):
    W = matrix(np.asarray(values), *shape)
    U, S, V = top_singular_triplets(W, k)
    assert (U.shape, S.shape, V.shape) == ((shape[0], k), (k,), (shape[1], k))
    assert U.dtype == S.dtype == V.dtype == torch.float64
    left, expected, right = scipy.linalg.svd(W.numpy(), full_matrices=False)
    np.testing.assert_allclose(S, expected[:k], rtol=0, atol=1e-14 * expected[0])
    eye = torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(U.T @ U, eye, rtol=0, atol=1e-14)
    torch.testing.assert_close(V.T @ V, eye, rtol=0, atol=1e-14)
    # the docstring's residuals and angles; from the rank on vectors are arbitrary
    rank = min(k, len(values))
    shares = expected / expected[0]
    through_gram = 2 * k <= min(shape) and shares[k - 1] > 1e-4
    residual = 1e-14 / (shares[k - 1] if through_gram else 1)
    torch.testing.assert_close(W @ V / S[0], U * S / S[0], rtol=0, atol=residual)
    torch.testing.assert_close(W.T @ U / S[0], V * S / S[0], rtol=0, atol=residual)
    gap = np.diff(-(shares**2 if through_gram else shares))[rank - 1]
    for found, full in ((U, left), (V, right.T)):
        outside = torch.from_numpy(full[:, rank:]).T @ found[:, :rank]
        assert torch.linalg.matrix_norm(outside, 2) < 2e-14 / gap


def test_triplets_of_all_k_and_of_none():
    W = matrix([5.0, 4.0, 3.0], 12, 20).bfloat16()
    U, S, V = top_singular_triplets(W, 50)
    assert (U.shape, S.shape, V.shape) == ((12, 12), (12,), (20, 12))
    torch.testing.assert_close(U @ torch.diag(S) @ V.T, W.double())
    assert top_singular_triplets(torch.zeros(6, 4), 2)[1].tolist() == [0, 0]
    with pytest.raises(ValueError, match="k=0: ask for at least one"):
        top_singular_triplets(W, 0)
    with pytest.raises(ValueError, match="NaN"):
        top_singular_triplets(torch.full((3, 3), torch.nan), 1)


def weights(count=6):
    shapes = [(150, 200), (200, 150), (160, 160)]
    generator = torch.Generator().manual_seed(0)
    return {f"layer {i}": torch.randn(shapes[i % 3], generator=generator) for i in range(count)}


@pytest.mark.parametrize("threads", [None, 1, 2, 5])
def test_spectra_are_each_matrixs_in_order(threads):
    given = weights()
    for found in (dict(spectra(given, threads)), dict(spectra(given.items(), threads))):
        assert list(found) == list(given)
        for name, metrics in found.items():
            expected = spectral_metrics(given[name]).to_dict()
            assert metrics.to_dict() == pytest.approx(expected, rel=1e-9)


def test_spectra_are_bit_identical_on_any_number_of_threads():
    given = weights(9)
    found = [dict(spectra(given, threads)) for threads in (1, 2, 2, 4, 9)]
    assert all(other == found[0] for other in found[1:])
    triplets = [dict(measure_each(lambda _, w: top_singular_triplets(w, 4), given.items(), n)) for n in (1, 3)]
    for name in given:
        assert all(map(torch.equal, *(of[name] for of in triplets)))


def test_bad_matrices_have_their_error_and_the_others_their_metrics():
    given = {"nan": torch.full((3, 3), torch.nan), "empty": torch.zeros(0, 3), **weights(2), "vector": torch.ones(3)}
    found = dict(spectra(given, threads=2))
    assert list(found) == list(given)
    for name, word in (("nan", "NaN"), ("empty", "non-empty"), ("vector", r"shape \(3,\)")):
        with pytest.raises(ValueError, match=word):
            raise found[name]
    assert found["layer 1"].stable_rank == pytest.approx(spectral_metrics(given["layer 1"]).stable_rank)
    assert list(spectra({})) == []
    with pytest.raises(ValueError, match="threads=0"):
        spectra(given, threads=0)


def test_threads_have_one_intra_op_thread_and_the_callers_number_stays():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = measure_each(lambda *_: (threading.get_ident(), torch.get_num_threads()), weights().items(), 2)
        first = next(found)[1]
        assert torch.get_num_threads() == 3
        results = [first, *(result for _, result in found)]
        assert {number for _, number in results} == {1}
        assert threading.get_ident() not in {ident for ident, _ in results}
        next(stopped := spectra(weights()))
        stopped.close()
        elsewhere = []
        new = threading.Thread(target=lambda: elsewhere.append(torch.get_num_threads()))
        new.start()
        new.join()
        assert (torch.get_num_threads(), elsewhere) == (3, [3])
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("spectra")]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("slow", [0, 3])
def test_matrices_are_pulled_when_a_thread_is_about_to_be_free(slow):
    alive, most, gate = weakref.WeakSet(), [], threading.Event()

    def produced():
        for i in range(12):
            weight = torch.randn(20, 30)
            alive.add(weight)
            most.append(len(alive))
            yield i, weight
            del weight

    def measure(i, weight):
        # one matrix that takes long stops neither the others nor the memory's return
        if i == slow:
            assert gate.wait(60)
        elif i == 11:
            gate.set()
        if i == 5:
            raise RuntimeError("an error holds no matrix")
        return weight.requires_grad, torch.is_grad_enabled()

    found = list(measure_each(measure, produced(), threads=2))
    assert [i for i, _ in found] == list(range(12))
    assert str(found[5][1]) == "an error holds no matrix"
    assert {result for i, result in found if i != 5} == {(False, False)}
    gc.collect()
    # two that are measured, the next one, and the one that is being made
    assert max(most) <= 4
    assert not alive


def test_an_accelerators_matrices_are_measured_by_the_callers_thread():
    given = [("cpu", torch.ones(2, 2)), ("accelerator", torch.empty(2, 2, device="meta")), ("cpu", torch.ones(3, 3))]
    found = [
        (name, ident == threading.get_ident()) for name, ident in measure_each(lambda *_: threading.get_ident(), given)
    ]
    assert found == [("cpu", False), ("accelerator", True), ("cpu", False)]


def test_errors_of_the_iterable_are_the_callers():
    def broken():
        yield from weights(1).items()
        raise KeyError("no more")

    found = spectra(broken(), threads=1)
    with pytest.raises(KeyError, match="no more"):
        list(found)


class WithoutFloat64(torch.Tensor):
    """Tensor as of a device without float64: it can be moved to the CPU, and no other way is open."""

    device = torch.device("mps")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.cpu:
            return args[0].as_subclass(torch.Tensor)
        if function is torch.Tensor.double:
            raise TypeError("MPS does not support float64")
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_device_without_float64_falls_back_to_the_cpu():
    W = weights(1)["layer 0"]
    there = W.as_subclass(WithoutFloat64)
    assert there.device.type == "mps"
    with pytest.raises(TypeError, match="float64"):
        there.double()
    assert torch.equal(singular_values(there), singular_values(W))
    assert type(singular_values(there)) is torch.Tensor
    assert spectral_metrics(there) == spectral_metrics(W)
    assert torch.equal(top_singular_triplets(there, 3)[0], top_singular_triplets(W, 3)[0])
    assert dict(spectra({"W": there})) == dict(spectra({"W": W}))
