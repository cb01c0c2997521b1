"""Whether metrics predict downstream scores beyond the loss: ridge regression on runs that were left out.

A model is fitted without one run, one method or one size and predicts it; its penalty is chosen inside the training
runs. Three sets of features are compared: the loss, the loss with the metrics, and the loss with as many random
numbers that vary between and within groups as the metrics do. The gain of the metrics is tested by permuting what the
loss leaves of the scores (Freedman and Lane 1983). Seeds of one group are alike, so groups are permuted as wholes, and
seeds inside them; intervals are of a bootstrap over groups.

Shapes: n runs, k features, P permutations.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import false_discovery_control, rankdata
from sklearn.linear_model import RidgeCV

__all__ = ["Floats", "partial_ranks", "permuted", "predicted", "prediction_rows", "r_squared", "random_features"]

Floats = NDArray[np.float64]

PENALTIES = np.logspace(-3, 4, 15)
PERMUTATIONS, BOOTSTRAPS, RANDOM_DRAWS = 199, 400, 5


def predicted(features: Floats, scores: Floats, folds: Sequence[Any]) -> tuple[Floats, Floats]:
    """Return predictions of each run by a ridge regression without its fold, and the training mean.

    Args:
        features: (n, k).
        scores: (n,) or (n, P), several at once.
        folds: (n,) the fold of each run.

    Returns:
        Two arrays of the shape (n, P).
    """
    targets = scores.reshape(len(scores), -1)
    values, means = np.full(targets.shape, np.nan), np.full(targets.shape, np.nan)
    named = np.array([str(fold) for fold in folds], dtype=object)
    for fold in dict.fromkeys(named):
        out = named == fold
        train = features[~out]
        center, spread = train.mean(0), train.std(0)
        spread = np.where(spread > 1e-12 * np.abs(center), spread, 1.0)
        ridge = RidgeCV(alphas=PENALTIES, alpha_per_target=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ridge.fit((train - center) / spread, targets[~out])
        values[out] = ridge.predict((features[out] - center) / spread).reshape(out.sum(), -1)
        means[out] = targets[~out].mean(0)
    return values, means


def r_squared(scores: Floats, values: Floats, means: Floats) -> Floats:
    """Return (P,) the share of squared deviations from the training means that predictions explain."""
    targets = scores.reshape(len(scores), -1)
    return 1 - ((targets - values) ** 2).sum(0) / ((targets - means) ** 2).sum(0)


def permuted(residuals: Floats, blocks: Sequence[Any], count: int, rng: np.random.Generator) -> Floats:
    """Return (n, count) residuals whose block means are permuted among blocks, and the rest inside blocks.

    Args:
        residuals: (n,).
        blocks: (n,) the block of each run.
    """
    names = pd.factorize(np.array([str(block) for block in blocks], dtype=object))[0]
    sizes = np.bincount(names)
    means = np.bincount(names, residuals) / sizes
    within = residuals - means[names]
    shuffled = np.empty((len(residuals), count))
    by_block = np.argsort(names, kind="stable")
    for column in range(count):
        shuffled[:, column] = rng.permutation(means)[names]
        # a random order inside each block
        shuffled[by_block, column] += within[np.lexsort((rng.random(len(names)), names))]
    return shuffled


def random_features(metrics: Floats, blocks: Sequence[Any], rng: np.random.Generator) -> Floats:
    """Return (n, k) random numbers; each column varies between and within blocks as that of the metrics does."""
    names = pd.factorize(np.array([str(block) for block in blocks], dtype=object))[0]
    sizes = np.bincount(names)
    columns = []
    for column in metrics.T:
        means = np.bincount(names, column) / sizes
        between, within = means[names].std(), (column - means[names]).std()
        columns.append(between * rng.normal(size=len(sizes))[names] + within * rng.normal(size=len(column)))
    return np.stack(columns, axis=1)


def prediction_rows(
    loss: Floats, metrics: Floats, scores: Floats, folds: Sequence[Any], blocks: Sequence[Any],
    seed: int = 0, permutations: int = PERMUTATIONS, bootstraps: int = BOOTSTRAPS,
) -> dict[str, float]:  # fmt: skip
    """Return R^2 and rank correlation of the three sets of features, with intervals, and the gain of the metrics.

    Args:
        loss, scores: (n,).
        metrics: (n, k).
        folds: (n,) what is left out together.
        blocks: (n,) groups whose runs are alike.
    """
    rng = np.random.default_rng(seed)
    alone = loss[:, None]
    together = np.column_stack([alone, metrics])
    given = np.column_stack([np.ones(len(loss)), loss])
    line = given @ np.linalg.lstsq(given, scores, rcond=None)[0]
    shuffled = line[:, None] + permuted(scores - line, blocks, permutations, rng)
    all_scores = np.column_stack([scores, shuffled])
    by_loss, means = predicted(alone, all_scores, folds)
    by_both, _ = predicted(together, all_scores, folds)
    gains = r_squared(all_scores, by_both, means) - r_squared(all_scores, by_loss, means)
    draws = [
        predicted(np.column_stack([alone, random_features(metrics, blocks, rng)]), scores, folds)[0][:, 0]
        for _ in range(RANDOM_DRAWS if bootstraps else 0)
    ]
    sets = {"loss": [by_loss[:, 0]], "metrics": [by_both[:, 0]], **({"random": draws} if draws else {})}
    counts = _resampled(blocks, bootstraps, rng)
    found: dict[str, float] = {}
    r2: dict[str, Floats] = {}
    for name, several in sets.items():
        r2[name] = np.mean([_weighted_r2(scores, each, means[:, 0], counts) for each in several], axis=0)
        rho = np.mean([_weighted_rho(scores, each, counts) for each in several], axis=0)
        found |= _with_interval(f"{name}_r2", r2[name]) | _with_interval(f"{name}_rho", rho)
    found |= _with_interval("gain", r2["metrics"] - r2["loss"])
    found["p"] = float((1 + (gains[1:] >= gains[0] - 1e-12).sum()) / (1 + permutations))
    return found


def _resampled(blocks: Sequence[Any], count: int, rng: np.random.Generator) -> Floats:
    """(1 + count, n) how often each run is there: once in the data, then in bootstraps over blocks."""
    names = pd.factorize(np.array([str(block) for block in blocks], dtype=object))[0]
    total = int(names.max()) + 1
    drawn = rng.multinomial(total, np.full(total, 1 / total), size=count)
    return np.vstack([np.ones(len(names)), drawn[:, names]])


def _weighted_r2(scores: Floats, values: Floats, means: Floats, counts: Floats) -> Floats:
    total = counts @ (scores - means) ** 2
    return 1 - counts @ (scores - values) ** 2 / np.where(total > 0, total, np.nan)


def _weighted_rho(scores: Floats, values: Floats, counts: Floats) -> Floats:
    """Rank correlations, with the ranks that runs have in the data."""
    one, other = rankdata(scores), rankdata(values)
    weights = counts / counts.sum(1, keepdims=True)
    mean_one, mean_other = weights @ one, weights @ other
    product = weights @ (one * other) - mean_one * mean_other
    spread = (weights @ one**2 - mean_one**2) * (weights @ other**2 - mean_other**2)
    return product / np.sqrt(np.where(spread > 1e-12, spread, np.nan))


def _with_interval(name: str, values: Floats) -> dict[str, float]:
    """The number of the data with the 95 % percentile interval of its bootstraps."""
    drawn = values[1:][np.isfinite(values[1:])]
    low, high = np.percentile(drawn, [2.5, 97.5]).tolist() if len(drawn) else (np.nan, np.nan)
    return {name: float(values[0]), f"{name}_low": low, f"{name}_high": high}


def partial_ranks(
    loss: Floats, metrics: Floats, scores: Floats, blocks: Sequence[Any], seed: int = 0,
    permutations: int = PERMUTATIONS,
) -> tuple[Floats, Floats, Floats]:  # fmt: skip
    """Return (k,) each metric's partial rank correlation with the scores given the loss, its p- and q-value."""
    rng = np.random.default_rng(seed)
    given = np.column_stack([np.ones(len(loss)), rankdata(loss)])

    def rest(columns: Floats) -> Floats:
        return np.asarray(columns - given @ np.linalg.lstsq(given, columns, rcond=None)[0])

    def unit(columns: Floats) -> Floats:
        size = np.linalg.norm(columns, axis=0)
        return np.where(size > 1e-9, columns / np.where(size > 1e-9, size, 1), 0)

    score = rest(rankdata(scores)[:, None])
    others = np.column_stack([score[:, 0], rest(permuted(score[:, 0], blocks, permutations, rng))])
    correlations = unit(rest(rankdata(metrics, axis=0))).T @ unit(others)
    exceeding = (np.abs(correlations[:, 1:]) >= np.abs(correlations[:, :1]) - 1e-12).sum(1)
    p = (1 + exceeding) / (1 + permutations)
    return correlations[:, 0], p, np.asarray(false_discovery_control(p)) if len(p) else p
