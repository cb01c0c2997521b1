"""How often the 95 % intervals of reported numbers hold the truth, by simulation on a real short run.

    python recipes/benchmarks/coverage.py                                  # the table in hf_lowrank/metrics/README.md
    python recipes/benchmarks/coverage.py --draws 300 --points 5 --output coverage.json

Two tiny models learn the bytes of the standard library's sources. The losses of a pool of held-out sequences are
computed once at every point of every direction. Sequences, directions and vectors are then drawn from the pool with
replacement, as many as the preset `quick` takes, and go through the functions that make records. The truth is the
number of the whole pool, so that the draws are independent and what is drawn from is known exactly.

`now`: about `corrected`, or else about the value, t quantile with `dof`. `value`: the same about the value, and the
truth is the mean over the draws. `before`: about the value, normal quantile, and errors that leave out sequences
(H1, H2, trace) or are numerical (top eigenvalue).
"""

import argparse
import json
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy import stats
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, set_seed

from hf_lowrank.families.activation import sampled_similarity
from hf_lowrank.families.curvature import GROUPS, CurvatureSettings, sampled_form
from hf_lowrank.families.interpolation import InterpolationSettings, barrier_numbers
from hf_lowrank.families.landscape import LandscapeSettings, Sequences, random_numbers
from hf_lowrank.families.loss import loss_records, over_sequences
from hf_lowrank.families.records import jackknife, record
from hf_lowrank.metrics.activations import compare_activations
from hf_lowrank.metrics.curvature import quadratic_forms, top_eigenpair
from hf_lowrank.metrics.interpolation import each_between
from hf_lowrank.metrics.landscape import SingularDirections, random_direction, sharpness_weights, symmetric_grid
from hf_lowrank.metrics.perturb import each_point
from hf_lowrank.metrics.sequences import EvaluationSet
from hf_lowrank.report.samples import Sampled

LENGTH = 64
SEQUENCES = 32
Array = NDArray[np.float64]
# a number, and its error as it was before
Drawn = tuple[Sampled, float]


@dataclass
class Pool:
    """Everything that draws are made from; R directions, p points, n sequences."""

    model: PreTrainedModel
    other: PreTrainedModel
    rows: dict[str, torch.Tensor]
    tokens: Array
    center: Array  # (n,)
    random: dict[float, Array]  # radius -> (R, p, n)
    svd_1: Array  # (p, n)
    svd_k: Array  # (K, p, n)
    paths: dict[str, Array]  # (p, n)
    forms: Array  # (vectors, n)

    def subset(self, chosen: Array) -> EvaluationSet:
        """Some of the rows, which may be there several times."""
        return EvaluationSet({key: value[torch.from_numpy(chosen)] for key, value in self.rows.items()}, len(chosen))


def bytes_of_the_standard_library() -> torch.Tensor:
    """(rows, LENGTH) bytes, of whole files in a fixed random order."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    order = np.random.default_rng(0).permutation(len(files))
    text = np.concatenate([np.frombuffer(files[i].read_bytes(), dtype=np.uint8) for i in order])
    rows = text[: len(text) // LENGTH * LENGTH].reshape(-1, LENGTH)
    return torch.from_numpy(rows.astype(np.int64))


def trained(rows: torch.Tensor, seed: int, steps: int) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """A model, and its weights after two thirds of the steps."""
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=48, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )  # fmt: skip
    model, rng, before = AutoModelForCausalLM.from_config(config), np.random.default_rng(seed), {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        if step == 2 * steps // 3:
            before = {key: value.clone() for key, value in model.state_dict().items()}
        batch = rows[rng.integers(0, len(rows), 16)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 20, 1.05 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), before


def fill_pool(size: int, directions: int, points: int, steps: int) -> Pool:
    """Train two models and measure the pool; see the module for what is in it."""
    text = bytes_of_the_standard_library()
    held_out = len(text) * 4 // 5
    (model, before), (other, _) = (trained(text[:held_out], seed, steps) for seed in (0, 1))
    chosen = text[np.linspace(held_out, len(text) - 1, size).round().astype(int)]
    rows = {"input_ids": chosen, "labels": chosen}
    whole, how = EvaluationSet(rows, 64), LandscapeSettings()
    center, tokens = (part.numpy() for part in whole.losses(model))

    def losses(model: Any) -> Array:
        return whole.losses(model)[0].numpy()

    def along(direction: dict[str, torch.Tensor], radius: float) -> Array:
        grid = symmetric_grid(radius, points)
        around = iter(each_point(model, direction, grid[grid != 0], losses))
        return np.stack([center if x == 0 else next(around) for x in grid])

    random = {
        radius: np.stack([along(random_direction(model, seed), radius) for seed in range(directions)])
        for radius in (how.radius, 0.05)
    }
    singular, ends = SingularDirections(model, max(how.svd_k)), model.state_dict()
    ends = {key: value.clone() for key, value in ends.items()}
    alphas = InterpolationSettings().grid()
    pairs = {"consecutive": (before, ends), "cross_method": (ends, other.state_dict())}
    ones = [
        EvaluationSet({key: value[[i]] for key, value in rows.items()}) for i in range(0, size, max(size // 48, 1))
    ]
    forms = [quadratic_forms(model, one.differentiable, directions)[:, 0] for one in ones]
    return Pool(
        model, other, rows, tokens, center, random,
        svd_1=along(singular.direction(1), how.svd_1_radius),
        svd_k=np.stack([
            along(singular.direction(k, True, "zero"), how.svd_k_radius) for k in range(1, max(how.svd_k) + 1)
        ]),
        paths={name: np.stack(each_between(model, *pair, alphas, losses)) for name, pair in pairs.items()},
        forms=np.stack(forms, axis=1),
    )  # fmt: skip


def numbers(pool: Pool, rng: np.random.Generator | None) -> Iterator[tuple[str, Drawn]]:
    """The numbers of one draw, or those of the whole pool without a generator."""
    n, how, R = len(pool.tokens), LandscapeSettings(), len(pool.random[0.05])
    chosen = np.arange(n) if rng is None else rng.integers(0, n, SEQUENCES)
    some = np.arange(R) if rng is None else rng.integers(0, R, how.directions)
    tokens = pool.tokens[chosen]
    at = Sequences(tokens, tuple(map(str, range(len(chosen)))))

    def one_way(number: Any) -> Drawn:
        return number, number.stderr

    for entry in loss_records(over_sequences(*map(torch.from_numpy, (pool.center[chosen], tokens)), at.units), 0, {}):
        assert entry.value is not None
        assert entry.samples is not None
        yield entry.name, one_way(Sampled(entry.value, entry.samples))
    for radius, curves in pool.random.items():
        losses, grid = curves[some][:, :, chosen], symmetric_grid(radius, curves.shape[1])
        found: Any = random_numbers(at, grid, losses)
        means = losses.sum(-1) / tokens.sum()
        sharpness = means @ sharpness_weights(grid)
        left_out = [np.delete(means, i, axis=0).var(0).mean() for i in range(len(some))]
        yield f"H1, radius {radius}", (found["sharpness"], sharpness.std(ddof=1) / len(some) ** 0.5)
        yield f"H2, radius {radius}", (found["variance"], jackknife(0.0, left_out).stderr)
    grid = symmetric_grid(how.svd_1_radius, pool.svd_1.shape[0])
    yield "H3", one_way(at.mean(sharpness_weights(grid) @ pool.svd_1[:, chosen]))
    yield "H4, K = 5", one_way(at.mean(sharpness_weights(grid) @ pool.svd_k[:, :, chosen].mean(0)))
    yield "H5, K = 5", one_way(at.variance(pool.svd_k[:, :, chosen]))
    for name, losses in pool.paths.items():
        path: Any = barrier_numbers(
            InterpolationSettings().grid(), losses[:, chosen], torch.from_numpy(tokens), at.units
        )
        for key in ("barrier", "barrier_chord"):
            yield f"{'H6' if name == 'consecutive' else 'H7'}, {key}", one_way(path[key])
    yield "curvature/trace", _trace(pool, rng)


def _trace(pool: Pool, rng: np.random.Generator | None) -> Drawn:
    """Hessian trace over 8 vectors and 4 sequences."""
    how, forms = CurvatureSettings(), pool.forms
    if rng is not None:
        forms = forms[rng.integers(0, len(forms), how.samples)]
        forms = forms[:, rng.integers(0, forms.shape[1], how.sequences)]
    parts = [(str(i), LENGTH - 1, torch.tensor([i])) for i in range(forms.shape[1])]
    by_vector = forms.mean(1)
    number = sampled_form(forms / forms.shape[1], parts, "direction x sequence")
    return number, by_vector.std(ddof=1) / len(by_vector) ** 0.5


def eigenvalue(pool: Pool, rng: np.random.Generator | None) -> Iterator[tuple[str, Drawn]]:
    """The top eigenvalue of a draw of 4 sequences."""
    how, n = CurvatureSettings(), len(pool.tokens)
    few = pool.subset(np.arange(n) if rng is None else rng.integers(0, n, how.sequences))
    seed = 0 if rng is None else int(rng.integers(2**31))
    pair = top_eigenpair(pool.model, partial(few.differentiable_shares, most=GROUPS), how.iterations, seed)
    assert pair.shares is not None
    yield "curvature/top_eigenvalue", (sampled_form(pair.shares, few.parts(GROUPS), "sequence"), pair.residual)


def activations(pool: Pool, rng: np.random.Generator | None) -> Iterator[tuple[str, Drawn]]:
    """H14 to H16 on a draw of sequences."""
    n = len(pool.tokens)
    few = pool.subset(np.arange(n) if rng is None else rng.integers(0, n, SEQUENCES))
    mean, _ = compare_activations(pool.model, pool.other, few)
    for name, metric in (("H14", "relative_l2"), ("H15", "cosine"), ("H16", "cka"), ("H16", "cka_debiased")):
        number: Any = sampled_similarity(getattr(mean, metric))
        yield f"{name}, {metric}", (number, number.stderr)


def coverage(pool: Pool, draw: Callable[..., Iterator[tuple[str, Drawn]]], draws: int) -> dict[str, dict[str, float]]:
    """Shares of intervals that hold the truth, by number; see the module's text for the kinds."""
    truths = {name: number.value for name, (number, _) in draw(pool, None)}
    rng, found = np.random.default_rng(0), {name: [] for name in truths}  # type: ignore[var-annotated]
    for _ in range(draws):
        for name, (number, before) in draw(pool, rng):
            entry = record(name, number, 0)
            half = stats.t.ppf(0.975, entry.about["dof"]) * (entry.stderr or 0.0)
            found[name].append((entry.value, entry.about.get("corrected", entry.value), half, before))
    results = {}
    for name, rows in found.items():
        value, corrected, half, before = np.array(rows).T
        truth = truths[name]
        results[name] = {
            "now": float(np.mean(np.abs(corrected - truth) <= half)),
            "value": float(np.mean(np.abs(value - value.mean()) <= half)),
            "before": float(np.mean(np.abs(value - truth) <= 1.96 * before)),
            "truth": truth,
            "mean": float(value.mean()),
            "draws": draws,
        }
    return results


def main() -> None:
    """Simulate and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=900, help="a third of them where a draw needs forward passes")
    parser.add_argument("--points", type=int, default=7, help="of every grid along a direction (quick: 13)")
    parser.add_argument("--pool", type=int, default=256, help="sequences to draw from")
    parser.add_argument("--directions", type=int, default=32, help="directions and vectors to draw from")
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pool = fill_pool(options.pool, options.directions, options.points, options.steps)
    few = max(options.draws // 3, 1)
    results = coverage(pool, numbers, options.draws)
    results |= coverage(pool, eigenvalue, few) | coverage(pool, activations, few)
    table = Table("number", "before", "now", "about the value", "truth", "mean of the draws", "draws")
    for name, result in results.items():
        shares = (f"{result[key]:.3f}" for key in ("before", "now", "value"))
        table.add_row(name, *shares, f"{result['truth']:.4g}", f"{result['mean']:.4g}", f"{result['draws']:.0f}")
    Console(width=119).print(table)
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
