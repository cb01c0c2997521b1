"""Paired differences: closed forms, simulated nulls that give p below 0.05 in 5 of 100, and what pairing gains."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_1samp, ttest_rel

from hf_lowrank.report.pairing import Evidence, Items, mcnemar, paired, paired_seeds, two_sided
from hf_lowrank.report.samples import Samples

Draw = tuple[Evidence, Evidence]


def samples(
    kind: str, sums: np.ndarray, weights: np.ndarray | None = None, units: np.ndarray | None = None
) -> Samples:
    count = sums.shape[-1]
    names = tuple(f"u{i}" for i in range(count)) if units is None else tuple(map(str, units))
    return Samples(kind, names, sums, np.ones(count) if weights is None else weights)


def items(values: np.ndarray, groups: np.ndarray | None = None) -> Items:
    names = [f"i{i}" for i in range(len(values))]
    return Items(names, values.astype(float), np.ones(len(values)), None if groups is None else groups.tolist())


# ---- closed forms ----


def test_equal_weights_are_the_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(4, 1, (2, 12))
    found, known = paired(samples("sequence", a), samples("sequence", b)), ttest_rel(a, b)
    assert found is not None
    assert (found.value, found.dof, found.test) == (pytest.approx((a - b).mean()), 11, "paired over 12 sequences")
    assert found.stderr == pytest.approx((a - b).std(ddof=1) / math.sqrt(12))
    assert found.p == pytest.approx(known.pvalue)
    seeds = paired_seeds(a[:3], b[:3])
    assert seeds is not None
    assert (seeds.p, seeds.test) == (pytest.approx(ttest_rel(a[:3], b[:3]).pvalue), "paired over 3 seeds")


def test_tokens_weigh_the_difference_of_losses() -> None:
    tokens = np.array([10.0, 30.0, 20.0])
    a, b = np.array([45.0, 120.0, 70.0]), np.array([40.0, 118.0, 60.0])
    found = paired(samples("sequence", a, tokens), samples("sequence", b, tokens))
    assert found is not None
    assert found.value == pytest.approx(17 / 60)
    residual = np.array([5 - 170 / 60, 2 - 510 / 60, 10 - 340 / 60])
    assert found.stderr == pytest.approx(math.sqrt(3 / 2 * (residual**2).sum()) / 60)


def test_two_ways_without_one_of_them_is_the_other_alone() -> None:
    rng = np.random.default_rng(1)
    by_row, by_column = rng.normal(size=(5, 1)), rng.normal(size=30)
    zero = samples("direction x sequence", np.zeros((5, 30)))
    for effect, dof in ((by_row + np.zeros(30), 4), (np.zeros((5, 1)) + by_column, 29)):
        found = paired(samples("direction x sequence", effect), zero)
        known = ttest_1samp(effect[:, 0] if dof == 4 else effect[0], 0)
        assert found is not None
        assert (found.dof, found.p) == (pytest.approx(dof), pytest.approx(known.pvalue))
        assert found.test == "paired over 5 directions × 30 sequences"


@pytest.mark.parametrize(("wins", "losses"), [(0, 1), (5, 15), (12, 12), (9, 16)])
def test_mcnemar_is_exact_where_few_differ(wins: int, losses: int) -> None:
    exact = binomtest(wins, wins + losses).pvalue
    known = exact if wins + losses < 25 else math.erfc(abs(wins - losses) / math.sqrt(2 * (wins + losses)))
    assert mcnemar(wins, losses) == pytest.approx(known)
    a = np.r_[np.ones(wins), np.zeros(losses), np.ones(100)]
    b = np.r_[np.zeros(wins), np.ones(losses), np.ones(100)]
    found = paired(items(a), items(b))
    assert found is not None
    assert (found.value, found.p) == (pytest.approx((wins - losses) / len(a)), pytest.approx(known))
    assert found.stderr == pytest.approx((a - b).std(ddof=1) / math.sqrt(len(a)))
    assert (found.dof, found.test) == (None, f"McNemar over {len(a)} items")


def test_grouped_items_are_tested_over_groups() -> None:
    groups = np.repeat(np.array(["x", "y", "z"]), (1, 2, 3))
    a, b = np.array([1.0, 1, 0, 1, 1, 1]), np.array([0.0, 1, 1, 0, 0, 0])
    found = paired(items(a, groups), items(b, groups))
    by_group = np.array([1.0, -1.0, 3.0]) - 0.5 * np.array([1, 2, 3])
    assert found is not None
    assert (found.value, found.dof, found.test) == (0.5, 2, "paired over 3 groups of 6 items")
    assert found.stderr == pytest.approx(math.sqrt(3 / 2 * (by_group**2).sum()) / 6)


def test_of_other_sets_the_common_units_count() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 10))
    names, shuffled = np.array(list("abcdefghij")), rng.permutation(10)
    ours = samples("sequence", a[:8], units=names[:8])
    found = paired(ours, samples("sequence", b[shuffled], units=names[shuffled]))
    assert found is not None
    assert found.p == pytest.approx(ttest_rel(a[:8], b[:8]).pvalue)
    assert (found.value, found.test) == (pytest.approx((a - b)[:8].mean()), "paired over 8 of 10 sequences")


def test_what_cannot_be_paired() -> None:
    a = np.arange(4.0)
    whole = samples("sequence", a)
    for other in (
        samples("group", a),
        samples("sequence", a, np.array([1.0, 1, 1, 2])),
        samples("sequence", a, units=np.array(list("wxyz"))),
        samples("sequence", a, units=np.array(["u0", "u0", "u1", "u2"])),
        samples("sequence", np.array([1, 2, 3, np.nan])),
        samples("sequence", np.stack([a, a])),
        items(a),
        None,
    ):
        assert paired(whole, other) is None
    assert paired(items(a), items(a, a)) is None
    assert paired(items(a, a), items(a, a[::-1])) is None
    assert paired_seeds([1.0], [2.0]) is None
    same = paired(whole, samples("sequence", a + 0.1))
    assert same is not None
    assert (same.stderr, same.p) == (0, None)


# ---- simulated ----

RUNS = 1500


def sequences(rng: np.random.Generator, effect: float) -> Draw:
    """Row losses that correlate at 0.97, with sequences of any length."""
    tokens = rng.integers(20, 256, 32).astype(float)
    text = rng.normal(4, 0.5, 32)
    a, b = (text + rng.normal(0, 0.09, 32) for _ in range(2))
    return samples("sequence", (a + effect) * tokens, tokens), samples("sequence", b * tokens, tokens)


def crossed(rng: np.random.Generator, effect: float) -> Draw:
    """Rises of a loss along 8 directions on 32 sequences."""
    shared = rng.normal(0, 0.5, (8, 1)) + rng.normal(0, 0.5, 32)
    a, b = (
        shared + rng.normal(0, 0.1, (8, 1)) + rng.normal(0, 0.3, 32) + rng.normal(0, 0.5, (8, 32)) for _ in range(2)
    )
    return samples("direction x sequence", a + effect), samples("direction x sequence", b)


def answers(rng: np.random.Generator, effect: float) -> Draw:
    """Right and wrong answers to 200 items that are easy or hard for both models."""
    ease, (one, other) = rng.normal(0, 2, 200), rng.normal(0, 0.7, (2, 200))
    return items(ease + one + effect > 0), items(ease + other > 0)


def clusters(rng: np.random.Generator, effect: float) -> Draw:
    """Answers to items of 60 texts, those to the items of one text much alike."""
    of_text = np.repeat(np.arange(60), rng.integers(2, 6, 60))
    ease, one, other = (rng.normal(0, spread, 60)[of_text] for spread in (2, 0.3, 0.3))
    noise = rng.normal(0, 0.3, (2, len(of_text)))
    return items(ease + one + noise[0] + effect > 0, of_text), items(ease + other + noise[1] > 0, of_text)


def groups_of_pseudo_values(rng: np.random.Generator, effect: float) -> Draw:
    shared = rng.normal(0, 1, 16)
    return samples("group", shared + effect + rng.normal(0, 0.2, 16)), samples(
        "group", shared + rng.normal(0, 0.2, 16)
    )


def unpaired_p(one: Evidence, other: Evidence) -> float:
    """The p-value as if the two were independent."""
    errors = [alone.error() for alone in (samples_of(one), samples_of(other))]
    variance = sum(stderr**2 for stderr, _ in errors)
    dof = variance**2 / sum(stderr**4 / dof for stderr, dof in errors)
    found = paired(one, other)
    assert found is not None
    return two_sided(found.value, math.sqrt(variance), dof)


def samples_of(side: Evidence) -> Samples:
    if isinstance(side, Samples):
        return side
    of_group = np.arange(len(side.values)) if side.groups is None else np.array(side.groups)
    sums, weights = np.bincount(of_group, side.shares()), np.bincount(of_group, side.weights)
    return samples("group", sums, weights)


@pytest.mark.parametrize(
    ("draw", "effect"),
    [(sequences, 0.06), (crossed, 0.25), (answers, 0.35), (clusters, 0.8), (groups_of_pseudo_values, 0.2)],
)
def test_nulls_are_found_in_5_of_100_and_an_effect_sooner_than_unpaired(
    draw: Callable[[np.random.Generator, float], Draw], effect: float
) -> None:
    rng = np.random.default_rng(3)
    found = [paired(*draw(rng, 0.0)) for _ in range(RUNS)]
    false = sum(each is not None and each.p is not None and each.p < 0.05 for each in found)
    low, high = binomtest(false, RUNS).proportion_ci(0.999)
    assert low <= 0.05 <= high, false / RUNS
    planted = [draw(rng, effect) for _ in range(300)]
    power = np.mean([(each.p or 1) < 0.05 for pair in planted if (each := paired(*pair)) is not None])
    unpaired = np.mean([unpaired_p(*pair) < 0.05 for pair in planted])
    assert power > 0.6
    assert power > unpaired + 0.3, (power, unpaired)


def test_seeds_that_share_their_data_are_found_by_pairs() -> None:
    rng = np.random.default_rng(4)
    shared = rng.normal(0, 0.1, (RUNS, 3))
    one, other = shared + rng.normal(0, 0.02, (2, RUNS, 3))
    nulls = [paired_seeds(a, b) for a, b in zip(one, other, strict=True)]
    false = sum(each is not None and each.p is not None and each.p < 0.05 for each in nulls)
    low, high = binomtest(false, RUNS).proportion_ci(0.999)
    assert low <= 0.05 <= high
    planted = [paired_seeds(a + 0.15, b) for a, b in zip(one, other, strict=True)]
    assert np.mean([each is not None and (each.p or 1) < 0.05 for each in planted]) > 0.8
