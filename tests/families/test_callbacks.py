"""Landscape, interpolation, activation and curvature callbacks; test_spectral.py has what all callbacks share."""

import json
import logging
import math
import shutil
import time

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_runs import METHODS, Kill, arguments, dataset, gpt2, llama, make_trainer, weights
from transformers import Trainer, TrainerCallback

import hf_lowrank as lr
from hf_lowrank.checkpoints import load_model
from hf_lowrank.families import Measurement, Record
from hf_lowrank.families import callback as base
from hf_lowrank.families.callback import MetricCallback
from hf_lowrank.families.records import metrics_folder, read_measurement
from hf_lowrank.metrics.activations import compare_activations
from hf_lowrank.metrics.curvature import hessian_trace
from hf_lowrank.metrics.interpolation import barrier, loss_path
from hf_lowrank.metrics.landscape import (
    expected_sharpness,
    loss_curve,
    mean_curve,
    random_direction,
    svd_direction,
    symmetric_grid,
    variance_over_directions,
)
from hf_lowrank.metrics.sequences import EvaluationSet
from hf_lowrank.report.catalogue import LANDSCAPE
from hf_lowrank.report.samples import read_samples, samples_path

FEW = dict(sequences=4, budget=None)
SMALL = dict(directions=3, points=5, svd_1_points=5, svd_k=(2,), svd_k_points=5)
SAVING = dict(save_strategy="steps", save_steps=2)


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """Without figures, which take seconds and are tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_lowrank.run.report.draw_figures", lambda publish: [])
        yield


def callbacks(valid, baseline):
    return [
        lr.SpectralCallback(every=2, budget=None),
        lr.LandscapeCallback(valid, every=2, **SMALL, **FEW),
        lr.InterpolationCallback(valid, points=5, **FEW),
        lr.ActivationCallback(valid, baseline, every=2, **FEW),
        lr.CurvatureCallback(valid, every=2, samples=2, iterations=3, **FEW),
    ]


def records(folder, name):
    return json.loads((folder / "publish" / "metrics" / f"{name}.json").read_text())


def values(folder, name):
    """Step -> value of one metric."""
    family = name.split("/")[0].replace("spectral", "spectral")
    return {r["step"]: r["value"] for r in records(folder, family) if r["name"] == name}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Six steps of SLTrain with every callback: (folder, trainer, validation rows, baseline)."""
    folder, valid, base_model = tmp_path_factory.mktemp("run"), dataset(8, seed=1), llama(seed=5)
    trainer = make_trainer(METHODS["sltrain"], arguments(folder, **SAVING))
    lr.attach(trainer, *callbacks(valid, base_model))
    trainer.train()
    return folder, trainer, valid, base_model


@pytest.mark.parametrize("attach", [False, True], ids=["bare", "attached"])
@pytest.mark.parametrize("method", ["fullrank", "sltrain", "cola-m"])
def test_training_is_bit_identical_with_and_without_them(method, attach, tmp_path):
    found, base_model = {}, llama(seed=5)
    for measured in (False, True):
        args = arguments(tmp_path / f"{measured}", max_steps=4, logging_steps=2, **SAVING)
        trainer = make_trainer(METHODS[method], args)
        assert trainer.model.config.attention_dropout > 0
        made = callbacks(dataset(8, seed=1), base_model) if measured else []
        if attach and measured:
            lr.attach(trainer, *made)
        for callback in [] if attach else made:
            trainer.add_callback(callback)
        trainer.train()
        assert [callback.failed for callback in made] == [None] * len(made)
        logged = [(e["step"], e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e]
        found[measured] = weights(trainer.model), logged, trainer.model.training
    assert found[True][1] == found[False][1]
    assert found[True][2] == found[False][2]
    for key, tensor in found[False][0].items():
        assert torch.equal(found[True][0][key], tensor), key


# The numbers are those of the pure functions, on the checkpoints that the run left


def test_landscapes(run):
    folder, _, valid, _ = run
    model, rows = load_model(folder / "checkpoint-4"), EvaluationSet.from_dataset(valid, 4)
    curves = [loss_curve(model, rows, random_direction(model, i), symmetric_grid(0.003, 5)) for i in range(3)]
    found = {r["name"]: r for r in records(folder, "landscape") if r["step"] == 4}
    random = found["landscape/random/sharpness"]
    # losses are of float32 forward passes: 1e-7 of 4 nats
    assert random["value"] == pytest.approx(expected_sharpness(mean_curve(curves)), abs=2e-6)
    assert random["about"]["stderr"] == "over directions and sequences"
    assert random["stderr"] > 0
    assert found["landscape/random/variance"]["value"] == pytest.approx(variance_over_directions(curves), rel=0.01)
    top = loss_curve(model, rows, svd_direction(model, 1), symmetric_grid(0.25, 5))
    assert found["landscape/svd_1/sharpness"]["value"] == pytest.approx(expected_sharpness(top), abs=2e-6)
    several = [
        loss_curve(model, rows, svd_direction(model, k, True, "zero"), symmetric_grid(0.052, 5)) for k in (1, 2)
    ]
    assert found["landscape/svd_k/sharpness"]["value"] == pytest.approx(
        expected_sharpness(mean_curve(several)), abs=2e-6
    )
    assert found["landscape/svd_k/variance"]["value"] == pytest.approx(variance_over_directions(several), rel=0.01)
    assert found["landscape/svd_k/sharpness"]["settings"]["K"] == 2
    center = found["landscape/random/center_loss"]
    assert center["value"] == pytest.approx(rows.estimate(model).value, rel=1e-6)
    assert center["stderr"] == pytest.approx(rows.estimate(model).stderr, rel=1e-4)
    assert {r["space"] for r in found.values()} == {"native"}
    table = pd.read_parquet(folder / "publish" / "metrics" / "landscape.parquet")
    assert sorted(set(table["step"])) == [0, 2, 4, 6]
    assert set(table["subject"]) == {"random", "random_mean", "svd_1", "svd_k"}
    third = table[(table["step"] == 4) & (table["subject"] == "random") & (table["direction"] == 2)]
    np.testing.assert_allclose(third["loss"], curves[2].loss, rtol=1e-5)


def test_barriers_between_neighbouring_checkpoints(run):
    folder, _, valid, _ = run
    rows = EvaluationSet.from_dataset(valid, 4)
    for now, before in ((4, 2), (6, 4)):
        old, new = (lr.to_dense(load_model(folder / f"checkpoint-{step}")) for step in (before, now))
        alphas = np.linspace(0, 1, 5)
        expected = barrier(alphas, loss_path(new, old.state_dict(), new.state_dict(), rows, alphas))
        found = {r["name"]: r for r in records(folder, "interpolation") if r["step"] == now}
        height = found["interpolation/consecutive/barrier"]
        assert height["value"] == pytest.approx(expected.value, abs=2e-6)
        assert height["stderr"] > 0
        assert (height["space"], height["reference"]["other_step"]) == ("dense", before)
        assert found["interpolation/consecutive/barrier_chord"]["value"] == pytest.approx(expected.chord, abs=2e-6)
        assert found["interpolation/consecutive/barrier_alpha"]["value"] == expected.alpha
    assert sorted(values(folder, "interpolation/consecutive/barrier")) == [4, 6]


def test_activations_against_a_baseline(run):
    folder, _, valid, base_model = run
    rows = EvaluationSet.from_dataset(valid, 4)
    mean, layers = compare_activations(load_model(folder / "checkpoint-6"), base_model.eval(), rows)
    found = {r["name"]: r for r in records(folder, "activation") if r["step"] == 6}
    for name in ("relative_l2", "cosine", "cka", "cka_debiased"):
        assert found[f"activation/{name}"]["value"] == pytest.approx(getattr(mean, name).value, rel=1e-5)
        assert found[f"activation/{name}"]["stderr"] == pytest.approx(getattr(mean, name).stderr, rel=1e-3)
    table = pd.read_parquet(folder / "publish" / "metrics" / "activation.parquet")
    last = table[table["step"] == 6].sort_values("layer")
    assert last["layer"].tolist() == [0, 1, 2]
    np.testing.assert_allclose(last["activation/cka"], [layer.cka.value for layer in layers], rtol=1e-5)


def test_curvature(run):
    folder, _, valid, _ = run
    model, rows = load_model(folder / "checkpoint-6"), EvaluationSet.from_dataset(valid, 4)
    expected = hessian_trace(model, rows.differentiable, samples=2, seed=0)
    (trace,) = [r for r in records(folder, "curvature") if r["step"] == 6 and r["name"] == "curvature/trace"]
    assert trace["value"] == pytest.approx(expected.value, rel=1e-4)
    assert trace["about"]["stderr"] == "over directions and sequences"


def test_the_report_has_the_sixteen_but_the_barrier_to_another_run(run):
    folder, trainer, _, _ = run
    names = {m["name"] for m in lr.load_report(folder)["metrics"]}
    from hf_lowrank.report.catalogue import HEADLINE_METRICS

    assert {m.name for m in HEADLINE_METRICS} - names == {"interpolation/cross_method/barrier"}
    logged = {key for entry in trainer.state.log_history for key in entry}
    assert names - {"validation_loss", "perplexity"} <= logged


def test_the_validation_rows_are_kept_for_measuring_later(run):
    folder, trainer, _, _ = run
    kept = pd.read_parquet(folder / "evaluation.parquet")
    assert [list(row) for row in kept["input_ids"]] == trainer.eval_dataset["input_ids"]


# Resuming


def test_a_killed_run_measures_on_as_if_nothing_had_happened(run, tmp_path):
    whole, _, valid, base_model = run
    trainer = make_trainer(METHODS["sltrain"], arguments(tmp_path, **SAVING), callbacks=[Kill(5)])
    lr.attach(trainer, *callbacks(valid, base_model))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    # killed at step 5, resumed from 2: what was measured at 4 is measured again
    shutil.rmtree(tmp_path / "checkpoint-4")
    trainer = make_trainer(METHODS["sltrain"], arguments(tmp_path, **SAVING))
    lr.attach(trainer, *callbacks(valid, base_model))
    trainer.train(resume_from_checkpoint=lr.last_checkpoint(tmp_path))
    for family in ("landscape", "interpolation", "activation", "curvature"):
        assert records(tmp_path, family) == records(whole, family), family
        found, expected = (read_samples(samples_path(metrics_folder(f), family)) for f in (tmp_path, whole))
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[key].sums, expected[key].sums) for key in found), family


def test_numbers_with_a_sampling_error_have_the_samples_that_it_is_made_of(run):
    folder, _, valid, _ = run
    units = EvaluationSet.from_dataset(valid, 4).units()
    for family in ("landscape", "interpolation", "activation", "curvature", "validation"):
        for record in read_measurement(metrics_folder(folder), family).records:
            over = record.about.get("stderr")
            sampled = record.stderr is not None and over != "residual norm"
            assert (record.samples is not None) == sampled, record.name
            if sampled:
                # a sharpness of several directions is kept in float32
                stderr, dof = record.samples.error(record.value if record.name.endswith("variance") else None)
                assert (stderr, record.samples.over) == (pytest.approx(record.stderr, rel=1e-5), over), record.name
                assert record.about["dof"] == pytest.approx(dof, abs=0.02)
                if record.name.endswith(("sharpness", "barrier", "barrier_chord", "center_loss", "trace", "loss")):
                    assert record.samples.value == pytest.approx(record.value, rel=1e-6), record.name
                if "sequence" in record.samples.kind and family != "validation":
                    assert record.samples.units == units


def test_a_resumed_run_without_them_drops_what_lies_beyond_its_checkpoint(run, tmp_path):
    whole, _, _, _ = run
    folder = shutil.copytree(whole, tmp_path / "run")
    trainer = make_trainer(METHODS["sltrain"], arguments(folder, **SAVING))
    lr.attach(trainer)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert sorted(values(folder, "landscape/random/sharpness")) == [0, 2]
    assert {key[2] for key in read_samples(samples_path(metrics_folder(folder), "landscape"))} == {0, 2}
    assert not list((folder / "publish" / "metrics").glob("interpolation.*"))


# The budget


class Slow(MetricCallback):
    """Takes a while for a number."""

    name = "slow"

    def measure(self, model, args, state):
        time.sleep(0.05)
        return Measurement([Record("slow/number", float(state.global_step), None, state.global_step)], [])


class Slower(Slow):
    name = "slower"


@pytest.mark.parametrize(("budget", "least", "most"), [(None, 13, 13), (0.0, 2, 2), (50.0, 13, 13)])
def test_a_budget_thins_measurements_out_and_says_so_once(budget, least, most, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(base, "GRACE", 0.0)
    callback = Slow(every=1, budget=budget)
    trainer = Trainer(model=gpt2(), args=arguments(tmp_path, max_steps=12), train_dataset=dataset())
    lr.attach(trainer, callback)
    with caplog.at_level(logging.WARNING, logger="hf_lowrank"):
        trainer.train()
    steps = sorted(r.step for r in callback.records)
    assert least <= len(steps) <= most
    # the start and the end are always measured
    assert (steps[0], steps[-1]) == (0, 12)
    assert callback.skipped == 13 - len(steps)
    assert caplog.text.count("some are left out") == (1 if callback.skipped else 0)


def test_the_budget_is_for_all_callbacks_together(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "GRACE", 0.18)
    made = [Slow(every=1), Slower(every=1)]
    trainer = Trainer(model=gpt2(), args=arguments(tmp_path, max_steps=12), train_dataset=dataset())
    for callback in made:
        trainer.add_callback(callback)
    trainer.train()
    between = sum(len(callback.records) - 2 for callback in made)
    assert between <= 4
    assert made[0]._clock is made[1]._clock
    # a second run starts with a budget of its own
    spent = made[0]._clock
    trainer.train()
    assert made[0]._clock is made[1]._clock is not spent


@pytest.mark.parametrize("arguments_", [{"every": 0}, {"every": 1, "budget": -1}, {"every": 1, "budget": math.nan}])
def test_numbers_that_make_no_sense(arguments_):
    with pytest.raises(ValueError, match=r"every=0|budget="):
        lr.SpectralCallback(**arguments_)


# What goes wrong


def test_one_that_fails_costs_itself_alone(tmp_path, caplog):
    valid = dataset(8, seed=1)
    trainer = make_trainer(METHODS["fullrank"], arguments(tmp_path, max_steps=2))
    bad = lr.LandscapeCallback(valid, every=1, **SMALL, **FEW)
    bad.measure = lambda *_: 1 / 0
    good = lr.CurvatureCallback(valid, every=1, samples=2, iterations=2, **FEW)
    lr.attach(trainer, bad, good)
    with caplog.at_level(logging.WARNING, logger="hf_lowrank"):
        trainer.train()
    assert "landscape failed at step 0 and is switched off" in caplog.text
    assert bad.failed
    assert good.failed is None
    assert sorted({r.step for r in good.records}) == [0, 1, 2]


def test_what_cannot_work_is_said_before_training(tmp_path):
    trainer = make_trainer(METHODS["fullrank"], arguments(tmp_path))
    with pytest.raises(ValueError, match="evaluation data set is empty"):
        lr.attach(trainer, lr.LandscapeCallback([]))
    with pytest.raises(ValueError, match="token id 1000000"):
        lr.attach(trainer, lr.ActivationCallback([{"input_ids": [10**6, 1, 2]}], llama()))
    with pytest.raises(ValueError, match=r"hidden_size is 32 there, 16 here"):
        lr.attach(trainer, lr.ActivationCallback(dataset(4), llama(hidden_size=32)))
    with pytest.raises(FileNotFoundError, match="no/such"):
        lr.ActivationCallback(dataset(4), "./no/such/run")
    with pytest.raises(ValueError, match="it is 'native', 'dense', 'both'"):
        lr.LandscapeCallback(dataset(4), space="denes")
    with pytest.raises(ValueError, match=r"directions=-1"):
        lr.LandscapeCallback(dataset(4), directions=-1)
    with pytest.raises(ValueError, match="points=2"):
        lr.InterpolationCallback(dataset(4), points=2)
    with pytest.raises(ValueError, match="two LandscapeCallback write the same files: give one with space='both'"):
        lr.attach(trainer, lr.LandscapeCallback(dataset(4)), lr.LandscapeCallback(dataset(4), space="dense"))
    # nothing of all that is left in the Trainer
    lr.attach(trainer, lr.LandscapeCallback(dataset(4), **SMALL, **FEW))


def test_the_second_of_a_kind_is_off_under_a_bare_trainer(tmp_path, caplog):
    made = [lr.SpectralCallback(every=1, budget=None), lr.SpectralCallback(every=1, space="native", budget=None)]
    trainer = Trainer(
        model=gpt2(), args=arguments(tmp_path, max_steps=1), train_dataset=dataset(), callbacks=[made[0]]
    )
    trainer.callback_handler.callbacks.append(made[1])
    with caplog.at_level(logging.WARNING, logger="hf_lowrank"):
        trainer.train()
    assert made[0].failed is None
    assert "two SpectralCallback write the same files" in made[1].failed


def test_both_spaces(tmp_path):
    trainer = make_trainer(METHODS["sltrain"], arguments(tmp_path, max_steps=2))
    lr.attach(
        trainer,
        lr.SpectralCallback(every=1, space="both", budget=None),
        lr.LandscapeCallback(dataset(8), every=2, space="both", **SMALL, **FEW),
    )
    trainer.train()
    for family in ("spectral", "landscape"):
        assert {r["space"] for r in records(tmp_path, family) if r["step"] == 2} == {"native", "dense"}
    found = [r for r in records(tmp_path, "spectral") if (r["step"], r["name"]) == (2, "spectral/update/stable_rank")]
    assert {r["space"]: r["reference"]["since"] for r in found} == {"native": 1, "dense": 1}


def test_the_last_step_is_measured_before_the_best_weights_take_its_place(tmp_path):
    args = arguments(
        tmp_path, max_steps=5, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    trainer = make_trainer(METHODS["fullrank"], args)
    kept = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            kept[state.global_step] = weights(model)

    trainer.add_callback(Keep())
    lr.attach(trainer, lr.SpectralCallback(every=100, budget=None))
    trainer.train()
    best = weights(trainer.model)
    assert not all(torch.equal(best[k], v) for k, v in kept[5].items())
    from hf_lowrank.metrics.spectra import spectral_metrics

    table = pd.read_parquet(tmp_path / "publish" / "metrics" / "spectral.parquet")
    (row,) = table[(table["step"] == 5) & (table["name"] == "model.layers.0.mlp.up_proj")].to_dict("records")
    expected = spectral_metrics(kept[5]["model.layers.0.mlp.up_proj.weight"]).stable_rank
    assert row["spectral/weight/stable_rank"] == pytest.approx(expected)


def test_a_baseline_with_checkpoints_is_taken_at_the_same_step(run, tmp_path):
    folder, _, valid, _ = run
    trainer = make_trainer(METHODS["fullrank"], arguments(tmp_path, max_steps=4))
    lr.attach(trainer, lr.ActivationCallback(valid, folder, every=2, **FEW))
    trainer.train()
    found = {r["step"]: r["reference"]["baseline_step"] for r in records(tmp_path, "activation")}
    # none was saved at step 0: what the run published is taken
    assert found == {0: None, 2: 2, 4: 4}
    # what its report says of it goes into this one's, and into the card
    baseline, theirs = lr.load_report(tmp_path)["baseline"], lr.load_report(folder)
    assert (baseline["name"], baseline["method"]) == (theirs["run"]["name"], theirs["run"]["method"])
    assert "baseline" not in theirs, "a model has no report"
    assert "<summary>Beside its baseline</summary>" in (tmp_path / "publish" / "README.md").read_text()


def test_a_dense_landscape_of_a_method_without_a_dense_form_is_a_marked_row(tmp_path):
    trainer = make_trainer(METHODS["cola"], arguments(tmp_path, max_steps=1))
    callback = lr.LandscapeCallback(dataset(8), space="dense", **SMALL, **FEW)
    lr.attach(trainer, callback)
    trainer.train()
    assert callback.failed is None
    marked = [r for r in records(tmp_path, "landscape") if r["step"] == 1]
    assert {record["name"] for record in marked} == set(LANDSCAPE.metric_names())
    for record in marked:
        assert (record["value"], record["space"]) == (None, "dense")
        assert "CoLA has no dense form" in record["about"]["note"]


def test_a_dense_landscape_is_that_of_the_dense_model(tmp_path):
    trainer = make_trainer(METHODS["sltrain"], arguments(tmp_path, max_steps=1))
    lr.attach(trainer, lr.LandscapeCallback(dataset(8), space="dense", **SMALL, **FEW))
    trainer.train()
    dense, rows = lr.to_dense(trainer.model).eval(), EvaluationSet.from_dataset(dataset(8), 4)
    curves = [loss_curve(dense, rows, random_direction(dense, i), symmetric_grid(0.003, 5)) for i in range(3)]
    (found,) = [
        r for r in records(tmp_path, "landscape") if (r["step"], r["name"]) == (1, "landscape/random/sharpness")
    ]
    assert found["value"] == pytest.approx(expected_sharpness(mean_curve(curves)), abs=2e-6)
    assert found["space"] == "dense"


def test_a_run_is_paired_with_its_baseline_while_it_trains(tmp_path):
    full = make_trainer(METHODS["fullrank"], arguments(tmp_path / "full", max_steps=2))
    lr.attach(full)
    full.train()
    trainer = make_trainer(METHODS["galore"], arguments(tmp_path / "galore", max_steps=2))
    lr.attach(trainer, lr.ActivationCallback(dataset(4), tmp_path / "full", every=2, sequences=4))
    trainer.train()
    report = lr.load_report(tmp_path / "galore")
    stored = {entry.name: entry for entry in report.baseline.differences}
    loss = stored["validation_loss"]
    assert (loss.test, loss.paired, loss.dof) == ("paired over 8 sequences", True, pytest.approx(7))
    assert loss.difference == pytest.approx(loss.value - loss.baseline)
    assert "paired over 8 sequences" in (tmp_path / "galore" / "publish" / "README.md").read_text()
