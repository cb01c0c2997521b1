"""Measurements: standard errors that cover the truth, and models that come out of them as they went in."""

import math

import numpy as np
import pytest
import torch
from quadratic import Quadratic
from tiny_runs import METHODS, arguments, dataset, llama, weights

import hf_lowrank as lr
from hf_lowrank.families import (
    Activation,
    Context,
    Curvature,
    CurvatureSettings,
    Interpolation,
    InterpolationSettings,
    Landscape,
    LandscapeSettings,
    Loss,
    Peer,
    Spectral,
)
from hf_lowrank.families.interpolation import loss_path_records
from hf_lowrank.families.landscape import _variance
from hf_lowrank.families.records import jackknife
from hf_lowrank.metrics.curvature import hessian_trace
from hf_lowrank.metrics.sequences import EvaluationSet

SMALL = LandscapeSettings(directions=2, points=3, svd_1_points=3, svd_k=(1, 3), svd_k_points=3)


class Exact:
    """An evaluation set of one sequence whose loss is a quadratic's, so that every expectation is known."""

    shared = False

    def losses(self, model):
        return torch.tensor([model.loss().item()], dtype=torch.float64), torch.ones(1, dtype=torch.float64)

    def settings(self):
        return {"sequences": 1}

    def units(self):
        return ("0",)


def landscape(model, sequences, settings):
    return Landscape().measure(Context(model, 0, settings, sequences))


def value(measurement, name, **settings):
    (found,) = [r for r in measurement.records if r.name == name and settings.items() <= r.settings.items()]
    return found


# Standard errors


def coverage(trials, truth):
    """Share of (value, stderr) pairs that hold the truth at 95 % of a t distribution with 7 degrees of freedom."""
    quantile = 2.365
    return np.mean([abs(v - truth) < quantile * s for v, s in trials])


def test_the_sharpness_of_random_directions_covers_the_trace_formula():
    model, x, trials = Quadratic(), 0.1, []
    for seed in range(300):
        settings = LandscapeSettings(directions=8, radius=x, points=3, svd_k=(), seed=1000 * seed)
        found = value(landscape(model, Exact(), settings), "landscape/random/sharpness")
        trials.append((found.value, found.stderr))
    truth = x**2 * model.H.trace().item() / 2
    assert coverage(trials, truth) == pytest.approx(0.95, abs=4 * math.sqrt(0.05 * 0.95 / 300))
    values = np.array([v for v, _ in trials])
    # variance of one direction's sharpness is x^4 ||H||_F^2 / 2
    expected = x**4 * model.H.square().sum().item() / 2 / 8
    assert values.var() == pytest.approx(expected, rel=4 * math.sqrt(2 / 300) * 1.5)


def test_the_traces_standard_error_covers_the_trace():
    model = Quadratic()
    trials = [hessian_trace(model, lambda m: m.loss(), samples=8, seed=seed) for seed in range(300)]
    share = coverage([(t.value, t.stderr) for t in trials], model.H.trace().item())
    assert share == pytest.approx(0.95, abs=4 * math.sqrt(0.05 * 0.95 / 300))


def test_the_jackknife_of_a_mean_is_its_standard_error():
    x = np.random.default_rng(0).normal(size=20)
    found = jackknife(x.mean(), [np.delete(x, i).mean() for i in range(20)])
    assert found.stderr == pytest.approx(x.std(ddof=1) / 20**0.5)
    assert math.isnan(jackknife(1.0, [1.0]).stderr)


def test_the_variance_over_directions_has_the_jackknife_over_sequences():
    rng = np.random.default_rng(0)
    losses, tokens = rng.normal(5, 1, size=(3, 4, 6)), np.array([3.0, 4, 5, 6, 7, 8])
    found = _variance(losses, tokens)
    others = []
    for i in range(6):
        kept = np.delete(losses, i, -1).sum(-1) / np.delete(tokens, i).sum()
        others.append(kept.var(0).mean())
    assert found.value == pytest.approx((losses.sum(-1) / tokens.sum()).var(0).mean())
    assert found.stderr == pytest.approx(jackknife(0, others).stderr)


def test_barriers_between_random_halves_agree_within_their_standard_errors():
    """Two halves of an evaluation set give two independent estimates of one barrier."""
    a, b = llama(seed=0), llama(seed=1)
    ends = tuple({k: 3 * v for k, v in m.state_dict().items()} for m in (a, b))
    rows = EvaluationSet.from_dataset(dataset(400)).rows
    apart = []
    for i in range(40):
        chosen = torch.randperm(400, generator=torch.Generator().manual_seed(i))[:40]
        halves = [EvaluationSet({k: v[part] for k, v in rows.items()}) for part in (chosen[:20], chosen[20:])]
        a.load_state_dict(ends[1])
        before = Peer("", 0, tensor=ends[0].get)
        found = [
            value(
                Interpolation().measure(Context(a, 0, InterpolationSettings(points=3), half, previous=before)),
                "interpolation/consecutive/barrier",
            )
            for half in halves
        ]
        apart.append((found[0].value - found[1].value) / math.hypot(found[0].stderr, found[1].stderr))
    # standard normal but for the small halves
    assert np.std(apart) == pytest.approx(1, abs=4 / math.sqrt(2 * 40))


# What goes in comes out


def prepared(kind, dtype):
    args = arguments("unused", log_level="error")
    model, _ = lr.prepare(llama().to(dtype), METHODS[kind], args)
    return model.train()


def measurements(model, rows):
    """Every measurement, by name."""
    other = {k: v.clone() * (1.1 if v.is_floating_point() else 1) for k, v in model.state_dict().items()}
    baseline = llama(seed=1).to(model.dtype)
    before = Peer("", 0, tensor=other.get)
    at = {
        "loss": (Loss, Context(model, 0, None, rows)),
        "landscape": (Landscape, Context(model, 0, SMALL, rows)),
        "activation": (Activation, Context(model, 0, None, rows, baseline=Peer("b", None, lambda: baseline))),
        "interpolation": (Interpolation, Context(model, 0, InterpolationSettings(points=3), rows, previous=before)),
        "curvature": (Curvature, Context(model, 0, CurvatureSettings(2, 2, 2), rows)),
        "spectral": (Spectral, Context(model, 0, space="dense")),
        "native spectral": (Spectral, Context(model, 0, space="native")),
    }
    return {name: lambda family=family, at=at: family().measure(at) for name, (family, at) in at.items()}


NAMES = ("loss", "landscape", "activation", "interpolation", "curvature", "spectral", "native spectral")


def state(model):
    model_state = weights(model)
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return model_state, grads, [m.training for m in model.modules()], model.config._attn_implementation


def same(one, two):
    tensors = all(torch.equal(v, two[0][k]) for k, v in one[0].items())
    grads = all(
        (g is None) == (two[1][k] is None) and (g is None or torch.equal(g, two[1][k])) for k, g in one[1].items()
    )
    return tensors and grads and one[2:] == two[2:]


def test_two_directions_are_too_few_for_an_error_of_their_variance():
    model, rows = llama().eval(), EvaluationSet.from_dataset(dataset(4))
    found = landscape(model, rows, SMALL)
    assert value(found, "landscape/random/variance").stderr is None
    assert value(found, "landscape/random/sharpness").stderr > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["fullrank", "sltrain", "cola-m", "lora"])
@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_bit_identical_after_every_measurement(name, kind, dtype):
    model, rows = prepared(kind, dtype), EvaluationSet.from_dataset(dataset(4))
    model(**rows.rows).loss.backward()
    model.model.layers[0].eval()
    before = state(model)
    measurements(model, rows)[name]()
    assert same(before, state(model))


# the others take one forward pass
@pytest.mark.parametrize(
    ("name", "after"), [*((name, 1) for name in NAMES[:5]), ("landscape", 3), ("interpolation", 3)]
)
def test_and_after_an_exception_in_the_middle(name, after):
    model, rows = prepared("sltrain", torch.float32), EvaluationSet.from_dataset(dataset(4))
    before, calls = state(model), []

    def fail(*_):
        calls.append(1)
        if len(calls) >= after:
            raise RuntimeError("out of memory")

    todo = measurements(model, rows)[name]
    handle = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        todo()
    handle.remove()
    assert same(before, state(model))


def test_several_k_share_their_curves():
    model, rows = llama().eval(), EvaluationSet.from_dataset(dataset(4))
    both = landscape(model, rows, SMALL)
    settings = LandscapeSettings(directions=0, svd_1_points=3, svd_k=(1,), svd_k_points=3)
    alone = landscape(model, rows, settings)
    expected = value(alone, "landscape/svd_k/sharpness")
    assert value(both, "landscape/svd_k/sharpness", K=1).value == expected.value
    assert value(both, "landscape/svd_k/variance", K=1).value == 0
    assert value(both, "landscape/svd_k/sharpness", K=3).value != expected.value


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(directions=-1), "directions=-1"),
        (dict(svd_k=(0,)), r"svd_k=\(0,\)"),
        (dict(normalize="rows"), "normalize='rows'"),
        (dict(points=4), "4 points"),
        (dict(radius=0.0), "within 0.0"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        LandscapeSettings(**settings)


def test_single_directions_stand_beside_the_means_of_several():
    rows = EvaluationSet.from_dataset(dataset(4), 4)
    settings = dict(directions=0, svd_1_points=3, svd_k_points=3)
    found = landscape(llama(), rows, LandscapeSettings(svd_k=(2,), svd_single=(1, 2), **settings))
    means, alone = [], []
    for r in found.records:
        if r.name == "landscape/svd_k/sharpness":
            (alone if "curves" in r.settings else means).append(r)
    assert [r.settings["K"] for r in alone] == [1, 2]
    assert means[0].value == pytest.approx((alone[0].value + alone[1].value) / 2)
    assert {r.settings["K"] for r in found.records if r.name.endswith("svd_k/variance")} == {2}
    only = landscape(llama(), rows, LandscapeSettings(svd_k=(), svd_single=(2,), **settings))
    assert value(only, "landscape/svd_k/sharpness").value == alone[1].value


def test_barriers_between_runs_may_be_measured_on_fewer_sequences():
    rows, b = EvaluationSet.from_dataset(dataset(6), 6), llama(seed=1)
    at = Context(llama(), 0, InterpolationSettings(cross_points=3, cross_sequences=4), rows)
    ends = at.model.state_dict(), b.state_dict()
    for subject, count in (("cross_method", 4), ("consecutive", 6)):
        reference = {"other": "b", "other_step": 0}
        for r in loss_path_records(at, at.model, ends, subject, "dense", {}, reference).records:
            assert r.settings["sequences"] == count
    with pytest.raises(ValueError, match="cross_sequences=0"):
        InterpolationSettings(cross_sequences=0)


def test_the_error_of_curvature_is_over_vectors_and_sequences():
    rows = EvaluationSet.from_dataset(dataset(12), 12)
    for sequences, units in ((1, 1), (3, 3), (12, 8)):
        measured = Curvature().measure(Context(llama(), 0, CurvatureSettings(sequences, 4, 3), rows))
        trace, top = (value(measured, f"curvature/{name}") for name in ("trace", "top_eigenvalue"))
        assert trace.samples.sums.shape == (4, units)
        assert trace.samples.weights.sum() == trace.settings["tokens"]
        assert trace.about["stderr"] == ("over directions" if units == 1 else "over directions and sequences")
        if units == 1:
            assert (top.about["stderr"], top.samples) == ("residual norm", None)
        else:
            assert (top.about["stderr"], len(top.samples.units)) == ("over sequences", units)
            assert top.about["residual_norm"] > 0
            assert top.samples.value == pytest.approx(top.value)


def test_the_bias_of_a_variance_stands_beside_it():
    rows = EvaluationSet.from_dataset(dataset(8), 8)
    measured = landscape(llama(), rows, LandscapeSettings(directions=4, points=3, svd_k=(2,), svd_k_points=3))
    for name in ("random/variance", "svd_k/variance"):
        number = value(measured, f"landscape/{name}")
        assert number.about["corrected"] == number.samples.value != number.value
        assert number.about["dof"] < number.samples.error()[1]
    assert "corrected" not in value(measured, "landscape/random/sharpness").about


@pytest.mark.parametrize("settings", [dict(points=2), dict(cross_points=2), dict(cross_points=20, beyond=0.25)])
def test_grids_that_miss_an_end(settings):
    with pytest.raises(ValueError, match="points="):
        InterpolationSettings(**settings)


def test_grids_between_two_runs_hold_both_ends():
    assert InterpolationSettings(cross_points=4).cross_grid().tolist()[-1] == 1.0
    grid = InterpolationSettings(cross_points=31, beyond=0.25).cross_grid()
    assert (grid[0], grid[-1], len(grid)) == (-0.25, 1.25, 31)
    assert {0.0, 1.0} <= set(grid.tolist())
