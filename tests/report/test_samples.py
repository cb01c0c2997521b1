"""Samples: the errors they give, and their way to disk and back."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats

from hf_lowrank.metrics.landscape import variance_pseudo_values
from hf_lowrank.metrics.perplexity import mean_loss
from hf_lowrank.report.samples import Sampled, Samples, pseudo_values, read_samples, sample_key, write_samples

RNG = np.random.default_rng(0)


def over_sequences(sums, weights):
    return Samples("sequence", tuple(map(str, range(len(weights)))), sums, weights)


def test_the_error_of_one_row_is_that_of_a_ratio_of_means():
    losses, tokens = RNG.gamma(5, size=12), RNG.integers(3, 9, size=12).astype(float)
    expected = mean_loss(torch.from_numpy(losses), torch.from_numpy(tokens))
    samples = over_sequences(losses, tokens)
    assert samples.value == pytest.approx(expected.value)
    assert samples.error() == (pytest.approx(expected.stderr), pytest.approx(11))
    assert all(math.isnan(part) for part in over_sequences([1.0], [2.0]).error())
    assert over_sequences([2.0, 4.0], [1.0, 2.0]).error() == (0.0, 1.0)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0.2, 2, 0.5)])
def test_two_way_errors_cover_what_both_draws_vary(sizes):
    trials, inside, R, n = 800, 0, 8, 32
    for _ in range(trials):
        rows, units, both = (
            s * RNG.normal(size=shape) for s, shape in zip(sizes, [(R, 1), (1, n), (R, n)], strict=True)
        )
        samples = Samples("direction x sequence", tuple(map(str, range(n))), rows + units + both, np.ones(n))
        stderr, dof = samples.error()
        inside += abs(samples.value) < stats.t.ppf(0.975, dof) * stderr
    # the binomial's four standard errors; components that are not there make it a little wide
    noise = 4 * math.sqrt(0.05 * 0.95 / trials)
    assert 0.95 - noise < inside / trials < 0.98 + noise


def test_two_way_pseudo_values_of_a_variance_leave_out_what_they_say():
    losses, tokens = RNG.normal(5, 1, size=(4, 3, 6)), np.array([3.0, 4, 5, 6, 7, 8])

    def variance(rows, columns):
        means = losses[np.ix_(rows, range(3), columns)].sum(-1) / tokens[columns].sum()
        return means.var(0).mean()

    every, all_six = list(range(4)), list(range(6))
    found = variance_pseudo_values(losses, tokens)
    for i, j in np.ndindex(4, 6):
        rows, columns = [r for r in every if r != i], [c for c in all_six if c != j]
        expected = 24 * variance(every, all_six) - 18 * variance(rows, all_six)
        expected += 15 * variance(rows, columns) - 20 * variance(every, columns)
        assert found[i, j] == pytest.approx(expected)
    # a variance with ddof 0 has no bias left, in either number
    exact = np.repeat(RNG.normal(size=(4, 3, 1)), 6, axis=2) * tokens
    assert variance_pseudo_values(exact, tokens).mean() == pytest.approx(
        (exact / tokens)[..., 0].var(0, ddof=1).mean()
    )


def test_a_variance_has_fewer_degrees_of_freedom():
    shares = RNG.chisquare(1, size=32)
    samples = Samples.equal("sequence", range(32), shares)
    stderr, dof = samples.error()
    assert dof == pytest.approx(31)
    # 31 * 33 / (4 * 34), where the variance is much larger than its error; else V^2 / (2 s^2), and no fewer than 4
    assert samples.error(100.0) == (stderr, pytest.approx(7.522, abs=1e-3))
    assert samples.error(stderr * 12**0.5) == (stderr, pytest.approx(6))
    assert samples.error(stderr) == (stderr, 4)
    assert Sampled(stderr, samples, of_variance=True).error() == (stderr, 4)


def test_pseudo_values_of_a_mean_are_the_values():
    x = RNG.normal(size=9)
    assert pseudo_values(x.mean(), [np.delete(x, i).mean() for i in range(9)]) == pytest.approx(x)


def test_what_is_written_is_read_by_what_defines_the_record(tmp_path):
    settings, path = {"points": 3, "evaluation_hash": "ab", "radius": 0.1}, tmp_path / "x.samples.parquet"
    one = over_sequences(RNG.normal(size=5), np.arange(1.0, 6))
    several = Samples("direction x sequence", one.units, RNG.normal(size=(3, 5)), one.weights)
    keys = [sample_key("landscape/svd_1/sharpness", space, 7, settings, {"other": "b"}) for space in ("dense", None)]
    write_samples(path, dict(zip(keys, (one, several), strict=True)))
    found = read_samples(path)
    assert list(found) == keys
    # in the order of another writer
    assert sample_key("landscape/svd_1/sharpness", None, 7, dict(reversed(settings.items())), {"other": "b"}) in found
    assert np.array_equal(found[keys[0]].sums, one.sums)
    assert np.array_equal(found[keys[1]].sums, several.sums.astype(np.float32))
    for samples, kept in zip(found.values(), (one, several), strict=True):
        assert (samples.kind, samples.units, *samples.weights) == (kept.kind, kept.units, *kept.weights)
    write_samples(path, {})
    assert not path.exists()
    assert read_samples(path) == {}


@pytest.mark.parametrize(
    "damage",
    [
        b"PAR1 broken",
        {"name": ["a"]},
        {"rows": [2]},
        {"kind": ["guess"]},
        {"sums": [[1.0]]},
        {"units": [["a"]]},
        {"weights": [["a", "b"]]},
        {"sums": [[0.0] * 2**26]},
    ],
)
def test_a_damaged_file_is_an_error_that_names_it(damage, tmp_path):
    path = tmp_path / "x.samples.parquet"
    write_samples(path, {sample_key("a", None, 1, {}, {}): over_sequences([1.0, 2.0], [1.0, 1.0])})
    columns = pq.read_table(path).to_pydict()
    if isinstance(damage, bytes):
        path.write_bytes(damage)
    elif "name" in damage:
        pq.write_table(pa.table(damage), path)
    else:
        pq.write_table(pa.table(columns | damage), path)
    with pytest.raises(ValueError, match=r"x\.samples\.parquet is no readable file of samples"):
        read_samples(path)


def test_samples_that_do_not_fit_are_refused():
    for sums, weights in ([[1.0], [1.0, 2.0]], [[], []], [np.zeros((2, 3)), np.zeros(2)]):
        with pytest.raises(ValueError, match="samples over 'sequence'"):
            over_sequences(sums, weights)
