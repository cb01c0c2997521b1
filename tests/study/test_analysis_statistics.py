"""The tests of a study's analyses, each on simulated data: nominal false positives, and the power that is stated."""

import math

import numpy as np
import pytest
from scipy.stats import binom
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import StandardScaler

from hf_lowrank.study.analysis.prediction import PENALTIES, partial_ranks, permuted, predicted, prediction_rows
from hf_lowrank.study.analysis.statistics import (
    Value,
    additive_contrast,
    delta_columns,
    over_seeds,
    seed_jackknife,
    verdict,
    with_q,
)

SIMULATIONS = 200
LEVEL = 0.05
# of 200 simulations in which nothing differs, more false positives than this come up once in a thousand
MOST = int(binom.ppf(0.999, SIMULATIONS, LEVEL))


def two_groups(rng, effect, seeds=4, paired=True):
    """Losses of two groups; seeds move both alike where they share their data."""
    shared = rng.normal(0, 1.0, seeds)
    mine = shared if paired else rng.normal(0, 1.0, seeds)
    orders = [str(seed) if paired else None for seed in range(seeds)]
    ours, base = mine + effect + rng.normal(0, 0.1, seeds), shared + rng.normal(0, 0.1, seeds)
    return [[Value(v, o) for v, o in zip(side, orders, strict=True)] for side in (ours, base)]


def barrier_pairs(rng, effect, seeds, all_pairs):
    """Pairs of runs 0..n-1 and n..2n-1, each the sum of two run effects and its own noise."""
    runs = rng.normal(0, 0.5, 2 * seeds)
    pairs = [(i, j) for i in range(2 * seeds) for j in range(i) if (i < seeds) == (j < seeds)]
    between = [(i, seeds + j) for i in range(seeds) for j in range(seeds) if all_pairs or i == j]
    sets = [("within a" if i < seeds else "within b") for i, _ in pairs] + ["between"] * len(between)
    ends = pairs + between
    values = [runs[i] + runs[j] + effect * (s == "between") for (i, j), s in zip(ends, sets, strict=True)]
    return np.array(values) + rng.normal(0, 0.1, len(ends)), sets, ends


def barrier(rng, effect, seeds=4, all_pairs=False):
    weights = {"between": 1.0, "within a": -0.5, "within b": -0.5}
    return additive_contrast(*barrier_pairs(rng, effect, seeds, all_pairs), weights)


def similarity(rng, effect, seeds=4, common=False):
    """Similarities to full-rank: of a method's runs to those of their seed or to one run, and of full-rank's seeds."""
    full, mine = rng.normal(0, 0.3, seeds), rng.normal(0, 0.3, seeds)
    starts = range(1, seeds) if common else range(seeds)
    ours = [(mine[i] + full[0 if common else i] + effect, i, 0 if common else i) for i in starts]
    null = [(full[i] + full[j], i, j) for i in range(seeds) for j in range(i) if not common or j == 0]
    return seed_jackknife(*([(v + rng.normal(0, 0.1), *ends) for v, *ends in side] for side in (ours, null)))


def runs_with_scores(rng, effect, groups=9, seeds=3, metrics=6):
    """Losses, metrics and scores that all vary between groups and within; the first metric moves the score."""
    blocks = np.repeat(np.arange(groups), seeds)
    columns = rng.normal(size=(groups, metrics + 2))[blocks] + 0.3 * rng.normal(size=(groups * seeds, metrics + 2))
    loss, noise, features = columns[:, 0], columns[:, 1], columns[:, 2:]
    return loss, features, -loss + 0.5 * noise + effect * features[:, 0], blocks


def gain(rng, effect):
    loss, features, scores, blocks = runs_with_scores(rng, effect, groups=12)
    return prediction_rows(loss, features, scores, blocks % 3, blocks, seed=1, permutations=19, bootstraps=0)["p"]


def partial(rng, effect):
    loss, features, scores, blocks = runs_with_scores(rng, effect)
    return partial_ranks(loss, features, scores, blocks, seed=1, permutations=99)[1][0]


# test -> p-value of one simulation, a planted effect, and the share of simulations in which it must be found
CASES = {
    "paired seeds": (lambda rng, e: over_seeds(*two_groups(rng, e)).p, 0.5, 0.9),
    "unpaired seeds": (lambda rng, e: over_seeds(*two_groups(rng, e, paired=False)).p, 4.0, 0.9),
    "barriers, pairs of one seed": (lambda rng, e: barrier(rng, e).p, 0.5, 0.9),
    "barriers, all pairs": (lambda rng, e: barrier(rng, e, 3, all_pairs=True).p, 0.5, 0.9),
    "activations, baselines by seed": (lambda rng, e: similarity(rng, e).p, 2.0, 0.9),
    "activations, one baseline": (lambda rng, e: similarity(rng, e, 5, common=True).p, 2.0, 0.9),
    "gain of the metrics": (gain, 2.0, 0.8),
    "partial rank correlation": (partial, 1.5, 0.9),
}


@pytest.mark.parametrize("case", CASES)
def test_false_positives_are_nominal_and_a_planted_effect_is_found(case):
    p_value, effect, power = CASES[case]
    rng = np.random.default_rng(0)
    false = sum(p_value(rng, 0.0) < LEVEL + 1e-9 for _ in range(SIMULATIONS))
    found = [p_value(rng, effect) < LEVEL + 1e-9 for _ in range(30)]
    assert false <= MOST, f"{false} of {SIMULATIONS}"
    assert np.mean(found) >= power, f"{np.mean(found):.2f}"


def test_a_family_of_true_nulls_yields_a_finding_in_one_of_twenty_studies():
    rng = np.random.default_rng(1)
    studies = [with_q([over_seeds(*two_groups(rng, 0.0)) for _ in range(10)]) for _ in range(SIMULATIONS)]
    assert sum(any(verdict(delta) for delta in deltas) for deltas in studies) <= MOST


def test_seeds_are_paired_over_those_that_both_have():
    ours = [Value(1.0, "a"), Value(2.1, "b"), Value(9.0, "c")]
    base = [Value(0.0, "a"), Value(1.0, "b")]
    delta = over_seeds(ours, base)
    assert (delta.test, delta.value) == ("paired over 2 seeds", pytest.approx(1.05))
    assert over_seeds(ours[:1], base).p is None
    assert over_seeds([Value(1.0), Value(2.0)], base).test == "Welch over seeds"


def test_run_effects_cancel_exactly_in_the_contrast_of_barriers():
    rng = np.random.default_rng(0)
    values, sets, ends = barrier_pairs(rng, 0.25, 3, all_pairs=True)
    exact, _, _ = barrier_pairs(np.random.default_rng(0), 0.25, 3, all_pairs=True)
    weights = {"between": 1.0, "within a": -0.5, "within b": -0.5}
    delta = additive_contrast(values, sets, ends, weights)
    assert delta.dof == 15 - 7
    # least squares by hand: plain means, since every pair is there
    by_set = {name: np.mean([v for v, s in zip(exact, sets, strict=True) if s == name]) for name in weights}
    assert delta.value == pytest.approx(sum(weight * by_set[name] for name, weight in weights.items()))


def test_pairs_that_do_not_tell_runs_and_methods_apart_are_not_tested():
    ends = [(0, 2), (1, 2), (3, 4)]
    delta = additive_contrast(
        np.array([1.0, 2.0, 3.0]), ["between", "between", "within"], ends, {"between": 1, "within": -1}
    )
    assert delta.p is None
    assert "do not tell" in delta.why or "too few" in delta.why
    assert additive_contrast(np.array([1.0]), ["between"], [(0, 1)], {"between": 1, "within": -1}).why.startswith(
        "no "
    )


def test_predictions_are_those_of_scikit_learn_without_the_fold():
    rng = np.random.default_rng(0)
    _, features, scores, blocks = runs_with_scores(rng, 1.0, groups=4)
    values, means = predicted(features, scores, blocks)
    out = blocks == 2
    scaler = StandardScaler().fit(features[~out])
    ridge = RidgeCV(alphas=PENALTIES).fit(scaler.transform(features[~out]), scores[~out])
    assert values[out, 0] == pytest.approx(ridge.predict(scaler.transform(features[out])))
    assert means[out, 0] == pytest.approx(scores[~out].mean())
    # no number of a run that is left out is seen
    changed = scores.copy()
    changed[out] += 100
    assert predicted(features, changed, blocks)[0][out, 0] == pytest.approx(values[out, 0])


def test_permutations_keep_groups_together():
    blocks = ["a", "a", "b", "b", "b", "c"]
    residuals = np.array([1.0, 3.0, 10.0, 10.0, 10.0, -5.0])
    shuffled = permuted(residuals, blocks, 50, np.random.default_rng(0))
    means = {tuple(sorted({round(c[:2].mean(), 9), round(c[2:5].mean(), 9), round(c[5], 9)})) for c in shuffled.T}
    assert means == {(-5.0, 2.0, 10.0)}
    assert {round(abs(c[0] - c[1]), 9) for c in shuffled.T} == {2.0}
    assert len({tuple(c) for c in shuffled.T}) > 6


def test_what_is_not_tested_has_no_interval():
    row = delta_columns(over_seeds([Value(1.0)], [Value(0.0)]))
    assert row["difference"] == 1.0
    assert all(math.isnan(row[name]) for name in ("low", "high", "p", "q"))
    assert row["why"] == "one seed"
