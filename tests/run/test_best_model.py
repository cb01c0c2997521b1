"""`load_best_model_at_end`: one model a report, and its step is named."""

import itertools
import shutil

import pytest
import torch
from tiny_runs import LENGTH, METHODS, arguments, dataset, make_trainer, weights
from transformers import EarlyStoppingCallback, TrainerCallback

import hf_lowrank as lr
from hf_lowrank.checkpoints import load_model
from hf_lowrank.compare.frame import collect
from hf_lowrank.compare.gather import gather
from hf_lowrank.families.best import state_at
from hf_lowrank.families.records import metrics_folder, read_measurement
from hf_lowrank.figures import _last_step
from hf_lowrank.hub.push import _write_step
from hf_lowrank.measure.source import open_run
from hf_lowrank.measure.write import write_run
from hf_lowrank.metrics.sequences import EvaluationSet
from hf_lowrank.report.significance import Sample

# whether the run stops early; the best of its four evaluations, one every two steps, is the second
RUNS = {"galore": False, "relora": True, "sltrain": False, "cola": True}
SCORES = (1.0, 3.0, 2.0, 0.0)


@pytest.fixture(scope="module", autouse=True)
def _no_figures():
    with pytest.MonkeyPatch.context() as patch:
        for module in ("run.report", "measure.write", "hub.push"):
            patch.setattr(f"hf_lowrank.{module}.draw_figures", lambda publish: [])
        yield


def trainer_of(method, folder, scores=SCORES, stops=False, max_steps=8, **changes):
    values = itertools.chain(scores, itertools.repeat(0.0))
    args = arguments(
        folder, max_steps=max_steps, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True, **changes,
    )  # fmt: skip
    trainer = make_trainer(METHODS[method], args, compute_metrics=lambda _: {"score": next(values)})
    if stops:
        trainer.add_callback(EarlyStoppingCallback(1))
    landscape = lr.LandscapeCallback(dataset(8), every=100, directions=1, points=3, sequences=2, budget=None)
    lr.attach(trainer, lr.SpectralCallback(every=4, budget=None), landscape)
    return trainer, landscape


@pytest.fixture(
    scope="module",
    params=[*("galore", "relora"), *(pytest.param(name, marks=pytest.mark.slow) for name in ("sltrain", "cola"))],
)
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("best") / request.param
    trainer, landscape = trainer_of(request.param, folder, stops=RUNS[request.param])
    trainer.train()
    last = 6 if RUNS[request.param] else 8
    assert (trainer.state.best_global_step, trainer.state.global_step) == (4, last)
    return folder, trainer, landscape, last


def same(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def steps_of(folder, family):
    return [record.step for record in read_measurement(metrics_folder(folder), family).records]


def test_facts_and_weights_are_those_of_the_best_step(run):
    folder, _, _, last = run
    facts = lr.load_report(folder).run
    assert (facts.steps, facts.best_of) == (4, {"steps": last, "metric": "eval_score", "value": 3.0})
    assert facts.tokens_seen == 4 * 4 * LENGTH
    assert facts.stopped_early == (last == 6)
    assert same(lr.from_pretrained(folder), load_model(folder / "checkpoint-4"))
    assert not same(lr.from_pretrained(folder), load_model(folder / f"checkpoint-{last}"))


def test_every_family_is_measured_at_the_best_step(run):
    folder, trainer, landscape, last = run
    metrics = lr.load_report(folder).metrics
    newest = {}
    for metric in metrics:
        newest[metric.name] = max(newest.get(metric.name, 0), metric.step)
    assert set(newest.values()) == {4}
    assert {name.partition("/")[0] for name in newest} >= {"landscape", "spectral", "validation_loss"}
    best = load_model(folder / "checkpoint-4")
    (loss,) = [m for m in metrics if m.name == "validation_loss"]
    assert loss.value == pytest.approx(EvaluationSet.from_dataset(dataset(8, seed=1), None).estimate(best).value)
    again = landscape.measure(best, trainer.args, state_at(trainer.state, 4))
    assert {r.name: r.value for r in again.records} == pytest.approx(
        {m.name: m.value for m in metrics if m.name.startswith("landscape/") and m.step == 4}
    )
    # what was measured of the last step is kept beside it
    assert set(steps_of(folder, "spectral")) == ({0, 4} if last == 6 else {0, 4, 8})
    assert steps_of(folder, "spectral") == sorted(steps_of(folder, "spectral"))


def test_card_and_comparison_are_of_the_best_step(run):
    folder, _, _, last = run
    card = (folder / "publish" / "README.md").read_text()
    assert f"step 4, the best of {last} steps by eval_score (3)" in card
    assert "step 4" in card.partition("\n---\n")[0]
    assert f"step {last}," not in card.partition("\n---\n")[0]
    compared = gather([str(folder)]).runs
    points = collect(compared)
    shown = points[points["column"] >= 0]
    assert set(shown["step"].dropna()) == {4}
    assert compared[0].tables["landscape"]["step"].max() == 4
    assert compared[0].tables["training"]["step"].max() == last
    assert _last_step(folder / "publish") == 4
    assert Sample.of(shown[shown["metric"] == "validation_loss"]["number"].iloc[0]).value > 0


def test_later_commands_take_the_best_step(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / run[0].name)
    last = run[3]
    expected = lr.load_report(folder)
    assert open_run(str(folder)).final.step == open_run(str(folder / "publish")).final.step == 4
    write_run(open_run(str(folder)))
    assert lr.load_report(folder) == expected
    for step, checkpoint_of in ((2, {"steps": last}), (4, {"steps": last}), (last, None)):
        (tmp_path / str(step)).mkdir()
        _write_step(folder / "publish", folder / f"checkpoint-{step}", tmp_path / str(step))
        report = lr.load_report(tmp_path / str(step))
        assert (report.run.steps, report.run.checkpoint_of) == (step, checkpoint_of)
        assert report.run.best_of == (expected.run.best_of if step == 4 else None)
        measured_at = {m.step for m in report.metrics}
        assert max(measured_at) == min(step, max(steps_of(folder, "spectral"))) or step == 2
    shutil.rmtree(folder / "checkpoint-4")
    final = open_run(str(folder)).final
    assert (final.step, same(final.load("cpu"), lr.from_pretrained(folder))) == (4, True)


def test_a_run_goes_on_from_the_last_step(tmp_path):
    trainer, _ = trainer_of("sltrain", tmp_path)
    trainer.train()
    before = steps_of(tmp_path, "spectral")
    trainer, _ = trainer_of("sltrain", tmp_path, scores=(5.0,), max_steps=12)
    trainer.train(resume_from_checkpoint=lr.last_checkpoint(tmp_path))
    facts = lr.load_report(tmp_path).run
    assert (facts.steps, facts.best_of.steps, facts.best_of.value) == (10, 12, 5.0)
    spectral = read_measurement(metrics_folder(tmp_path), "spectral").records
    assert [r.step for r in spectral if r.step <= 8] == before
    since = {r.step: r.reference["since"] for r in spectral if r.name == "spectral/update/stable_rank"}
    # of the model of step 10 nothing is at hand that was measured before it
    assert since == {4: 0, 8: 4, 12: 8}


def test_the_best_step_is_the_last(tmp_path):
    trainer, _ = trainer_of("galore", tmp_path, scores=(0.0, 1.0, 2.0, 3.0))
    trainer.train()
    facts = lr.load_report(tmp_path).run
    assert (facts.steps, facts.best_of.steps, facts.stopped_early) == (8, 8, False)
    assert "step 8, the best of 8 steps by eval_score" in (tmp_path / "publish" / "README.md").read_text()


class RemoveBest(TrainerCallback):
    def on_log(self, args, state, control, logs, **kwargs):
        if "train_runtime" in logs:
            shutil.rmtree(state.best_model_checkpoint)


def test_where_the_best_checkpoint_is_gone_the_report_is_of_the_last_step(tmp_path):
    trainer, _ = trainer_of("galore", tmp_path)
    trainer.add_callback(RemoveBest)
    trainer.train()
    report = lr.load_report(tmp_path)
    assert (report.run.steps, report.run.best_of) == (8, None)
    assert same(lr.from_pretrained(tmp_path), load_model(tmp_path / "checkpoint-8"))
    assert {m.step for m in report.metrics if m.name == "validation_loss"} == {8}


def test_one_checkpoint_is_kept(tmp_path):
    trainer, _ = trainer_of("lora", tmp_path, save_total_limit=1)
    trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    assert lr.load_report(tmp_path).run.steps == open_run(str(tmp_path)).final.step == 4
