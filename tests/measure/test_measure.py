"""Measuring finished runs: what is measured, against what, and what happens when something is not there."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import t as student
from tiny_runs import METHODS, arguments, dataset, gpt2, llama, make_trainer
from toy_models import toy_model
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, Trainer

import hf_lowrank as lr
from hf_lowrank.checkpoints import load_model
from hf_lowrank.cli import main
from hf_lowrank.compare.gather import gather
from hf_lowrank.compare.table import compare
from hf_lowrank.data import DataError
from hf_lowrank.families import CurvatureSettings, InterpolationSettings, LandscapeSettings, Preset
from hf_lowrank.measure import MeasureOptions, measure, open_run
from hf_lowrank.measure.progress import Progress
from hf_lowrank.methods.targets import dense_weights
from hf_lowrank.metrics.interpolation import barrier, loss_path
from hf_lowrank.metrics.sequences import EvaluationSet
from hf_lowrank.metrics.spectra import spectral_metrics
from hf_lowrank.report.baseline import beside_baseline
from hf_lowrank.report.catalogue import HEADLINE_METRICS
from hf_lowrank.report.io import write_report

PRESET = Preset(
    sequences=4,
    settings={
        "landscape": LandscapeSettings(directions=3, points=3, svd_1_points=3, svd_k=(2,), svd_k_points=3),
        "interpolation": InterpolationSettings(points=3, cross_points=3),
        "curvature": CurvatureSettings(2, 2, 3),
    },
)
OPTIONS = MeasureOptions(preset=PRESET, batch_size=4)
SAVING = dict(max_steps=4, save_strategy="steps", save_steps=2)
RUNS = {"full": "fullrank", "again": "fullrank", "sparse": "sltrain", "cola": "cola"}


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """Without figures, which take seconds and are tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("run.report", "measure.write"):
            patch.setattr(f"hf_lowrank.{module}.draw_figures", lambda publish: [])
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs of four steps with checkpoints at 2 and 4; `again` differs from `full` by its seed."""
    root = tmp_path_factory.mktemp("runs")
    for name, method in RUNS.items():
        seed = 7 if name == "again" else 0
        trainer = make_trainer(METHODS[method], arguments(root / name, **SAVING, seed=seed), model=llama(seed=seed))
        lr.attach(trainer)
        trainer.train()
    return root


@pytest.fixture
def runs(trained, tmp_path):
    """The same, to write into."""
    return shutil.copytree(trained, tmp_path / "runs")


class Seen(Progress):
    """What a measurement says of itself."""

    def __init__(self, stop_after=None):
        self.units, self.skipped, self.problems, self.stop_after = [], [], [], stop_after

    def unit(self, run, unit, skipped):
        (self.skipped if skipped else self.units).append((run, unit))
        if self.stop_after is not None and len(self.units) > self.stop_after:
            raise KeyboardInterrupt

    def failed(self, failure):
        self.problems.append((failure.where, failure.name, failure.reason))


def run_it(folders, baseline=None, options=OPTIONS, watcher=None, **changes):
    return measure([str(f) for f in folders], baseline and str(baseline), replace(options, **changes), watcher)


def records(folder, family):
    return json.loads((folder / "publish" / "metrics" / f"{family}.json").read_text())


def named(folder, family, name, step=4, space=None, **settings):
    (found,) = [
        r
        for r in records(folder, family)
        if (r["name"], r["step"]) == (name, step)
        and settings.items() <= r["settings"].items()
        and space in (None, r["space"])
    ]
    return found


@pytest.fixture(scope="module")
def measured(trained, tmp_path_factory):
    """Everything over all checkpoints of three runs against a fourth."""
    root = shutil.copytree(trained, tmp_path_factory.mktemp("measured") / "runs")
    seen = Seen()
    _, failures = run_it([root / "sparse", root / "again", root / "cola"], root / "full", watcher=seen)
    assert (failures, seen.problems) == (0, [])
    return root


def test_all_sixteen_are_there_at_every_checkpoint(measured):
    report = lr.load_report(measured / "sparse")
    names = {m["name"] for m in report["metrics"]}
    assert {m.name for m in HEADLINE_METRICS} <= names
    for metric in HEADLINE_METRICS:
        steps = {m["step"] for m in report["metrics"] if m["name"] == metric.name}
        # what compares with the checkpoint before begins with the second
        pairs = "update/" in metric.name or "consecutive" in metric.name
        assert steps == ({4} if pairs else {2, 4}), metric.name
    for name in ("landscape/random", "spectral/update", "interpolation/consecutive", "curvature/trace"):
        assert {m["space"] for m in report["metrics"] if m["name"].startswith(name)} == {"native", "dense"}, name
    assert (measured / "sparse" / "publish" / "README.md").read_text().count("H7") >= 1


def test_standard_errors_stand_with_what_is_estimated(measured):
    for m in lr.load_report(measured / "sparse")["metrics"]:
        exact = m["name"].startswith("spectral/") or m["name"].endswith(("_alpha", "min_loss", "center_to_min"))
        # CoLA, measured along with it, has no dense form
        assert (m["stderr"] is None) == (exact or m["settings"].get("other") == "cola"), m["name"]


def test_spectra_are_those_of_the_checkpoints(measured):
    new, old = (dict(_dense(measured / "sparse" / f"checkpoint-{s}")) for s in (4, 2))
    update = named(measured / "sparse", "spectral", "spectral/update/stable_rank", space="dense")
    expected = np.mean([spectral_metrics(new[k].double() - old[k].double()).stable_rank for k in new])
    assert update["value"] == pytest.approx(expected, rel=1e-4)
    assert update["reference"]["since"] == 2


def test_native_spectra_are_those_of_the_factors(measured):
    table = pd.read_parquet(measured / "sparse" / "publish" / "metrics" / "spectral.parquet")
    table = table[(table["step"] == 4) & (table["space"] == "native")].set_index("name")
    model = load_model(measured / "sparse" / "checkpoint-4")
    assert set(table["module"]) >= {"self_attn.q_proj.A", "self_attn.q_proj.B", "mlp.down_proj.A"}
    for name in ("A", "B"):
        factor = getattr(model.model.layers[1].mlp.up_proj, name)
        row = table.loc[f"model.layers.1.mlp.up_proj.{name}"]
        assert (row["rows"], row["cols"]) == tuple(factor.shape)
        assert row["spectral/weight/stable_rank"] == pytest.approx(spectral_metrics(factor).stable_rank)


def _dense(folder):
    return ((t.name, w.clone()) for t, w in dense_weights(load_model(folder)))


def evaluation(run, sequences=4):
    return EvaluationSet.from_dataset(pd.read_parquet(run / "evaluation.parquet").to_dict("records"), sequences)


@pytest.mark.parametrize(("name", "subject"), [("sparse", "cross_method"), ("again", "cross_seed")])
def test_barriers_to_the_baseline(name, subject, measured):
    run, rows = measured / name, evaluation(measured / name)
    ends = [lr.to_dense(load_model(measured / n / "checkpoint-4")) for n in (name, "full")]
    alphas = np.array([0, 0.5, 1])
    expected = barrier(alphas, loss_path(ends[0], ends[0].state_dict(), ends[1].state_dict(), rows, alphas))
    found = named(run, "interpolation", f"interpolation/{subject}/barrier", other="full")
    assert found["value"] == pytest.approx(expected.value, abs=2e-6)
    assert found["space"] == "dense"
    assert named(run, "interpolation", f"interpolation/{subject}_aligned/barrier", other="full")["value"] is not None
    assert named(run, "interpolation", f"interpolation/{subject}/barrier", step=2, other="full")["value"] is not None


def test_a_method_without_a_dense_form_is_marked_where_only_dense_counts(measured):
    row = named(measured / "cola", "interpolation", "interpolation/cross_method/barrier", other="full")
    assert (row["value"], row["space"]) == (None, "dense")
    assert "CoLA has no dense form" in row["about"]["note"]
    dense = [r for r in records(measured / "cola", "landscape") if r["space"] == "dense"]
    assert {r["value"] for r in dense} == {None}
    native = named(measured / "cola", "landscape", "landscape/random/sharpness", step=4, directions=3)
    assert native["space"] == "native"
    assert {r["space"] for r in records(measured / "cola", "spectral")} == {"linearised", "native"}
    assert named(measured / "cola", "interpolation", "interpolation/consecutive/barrier")["space"] == "native"


def test_the_map_has_every_pair(measured):
    table = pd.read_parquet(measured / "again" / "publish" / "metrics" / "barrier_map.parquet")
    pairs = set(zip(table["run_a"], table["run_b"], table["aligned"], strict=True))
    dense = ("sparse", "again", "full")
    assert pairs == {(a, b, x) for a in dense for b in dense if a != b for x in (False, True)}
    assert table["stderr"].notna().all()


def test_the_trajectory_of_the_last_checkpoint(measured):
    row = named(measured / "sparse", "landscape", "landscape/trajectory_1/sharpness")
    assert row["about"]["checkpoints"] == 2
    assert row["about"]["explained"] == pytest.approx(1)
    states = [load_model(measured / "sparse" / f"checkpoint-{s}") for s in (2, 4)]
    apart = sum(
        (p.double() - q.double()).square().sum()
        for p, q in zip(states[0].parameters(), states[1].parameters(), strict=True)
    )
    # the grid reaches as far as the trajectory
    assert row["settings"]["radius"] == pytest.approx(apart.sqrt().item(), rel=1e-5)


# Going on where it stopped


def test_a_second_time_nothing_is_measured(runs):
    run_it([runs / "sparse"], runs / "full")
    before = {p.name: p.read_bytes() for p in (runs / "sparse" / "publish" / "metrics").glob("*.json")}
    seen = Seen()
    run_it([runs / "sparse"], runs / "full", watcher=seen)
    assert seen.units == []
    assert {p.name: p.read_bytes() for p in (runs / "sparse" / "publish" / "metrics").glob("*.json")} == before


@pytest.mark.parametrize("after", [1, 5, 9])
def test_a_killed_measurement_goes_on_where_it_stopped(after, runs, measured):
    with pytest.raises(KeyboardInterrupt):
        run_it([runs / "sparse"], runs / "full", watcher=Seen(stop_after=after))
    seen = Seen()
    run_it([runs / "sparse"], runs / "full", watcher=seen)
    assert len(seen.skipped) == after
    for family in ("validation", "spectral", "activation", "curvature", "landscape"):
        assert records(runs / "sparse", family) == records(measured / "sparse", family), family


def test_other_settings_or_weights_are_measured_again(runs):
    only = dict(families=("loss", "curvature"))
    run_it([runs / "full"], **only)
    seen = Seen()
    other = replace(PRESET, settings={**PRESET.settings, "curvature": CurvatureSettings(2, 3, 3)})
    run_it([runs / "full"], watcher=seen, **only, preset=other)
    assert [unit for _, unit in seen.units] == ["step 2: curvature dense", "step 4: curvature dense"]
    assert len([r for r in records(runs / "full", "curvature") if r["step"] == 4]) == 2
    path = runs / "full" / "checkpoint-4" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] *= 1.5
    save_file(weights, path, metadata={"format": "pt"})
    seen = Seen()
    run_it([runs / "full"], watcher=seen, **only, preset=other)
    assert [unit for _, unit in seen.units] == ["step 4: loss", "step 4: curvature dense"]


def test_what_was_measured_while_training_stays_where_nothing_newer_is(tmp_path):
    trainer = make_trainer(METHODS["fullrank"], arguments(tmp_path / "run", **SAVING))
    lr.attach(trainer, lr.SpectralCallback(every=1, budget=None))
    trainer.train()
    run_it([tmp_path / "run"], families=("spectral",), steps=(4,))
    found = {r["step"]: r for r in records(tmp_path / "run", "spectral") if r["name"] == "spectral/update/stable_rank"}
    assert {step: r["reference"]["since"] for step, r in found.items()} == {1: 0, 2: 1, 3: 2, 4: 2}


# What is not there, or not right


def test_a_checkpoint_cut_short_costs_itself_alone(runs):
    path = runs / "full" / "checkpoint-2" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    seen = Seen()
    _, failures = run_it([runs / "full"], watcher=seen, families=("loss", "spectral", "interpolation"))
    assert failures == len(seen.problems) > 0
    assert all("ends too early" in error for _, unit, error in seen.problems if "step 2" in unit)
    assert named(runs / "full", "validation", "validation_loss", step=4)["value"] is not None
    cut = named(runs / "full", "validation", "validation_loss", step=2)
    assert cut["value"] is None
    assert "ends too early" in cut["about"]["note"]
    # the weights of the next checkpoint are there, its update is not
    (weight,) = spectra_of(runs / "full", "weight/stable_rank")
    assert weight["value"] > 1
    (update,) = spectra_of(runs / "full", "update/stable_rank")
    assert update["value"] is None
    assert "no update since step 2" in update["about"]["note"]
    # it is tried again next time
    again = Seen()
    run_it([runs / "full"], watcher=again, families=("loss",))
    assert [unit for _, unit in again.units] == ["step 2: loss"]


def spectra_of(folder, metric, step=4):
    return [r for r in records(folder, "spectral") if (r["name"], r["step"]) == (f"spectral/{metric}", step)]


def test_numbers_outlive_the_checkpoint_that_they_were_measured_of(runs):
    families = ("loss", "spectral", "interpolation")
    run_it([runs / "full"], families=families)
    metrics = runs / "full" / "publish" / "metrics"
    before = {path.name: path.read_bytes() for path in metrics.iterdir()}
    path = runs / "full" / "checkpoint-2" / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    seen = Seen()
    _, failures = run_it([runs / "full"], watcher=seen, families=families)
    assert failures == len(seen.problems) == 4, "two of its own, and two that need it as the checkpoint before"
    assert {path.name: path.read_bytes() for path in metrics.iterdir()} == before
    path.write_bytes(whole)
    again = Seen()
    _, failures = run_it([runs / "full"], watcher=again, families=families)
    assert (failures, len(again.units)) == (0, 4)


def test_nan_weights_are_rows_with_a_reason_and_the_rest_is_measured(runs):
    path = runs / "full" / "checkpoint-4" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    _, failures = run_it([runs / "full"], families=("loss", "spectral", "landscape"))
    table = pd.read_parquet(runs / "full" / "publish" / "metrics" / "spectral.parquet")
    bad = table[(table["step"] == 4) & table["error"].notna()]
    assert bad["name"].tolist() == ["model.layers.1.mlp.up_proj"]
    assert named(runs / "full", "spectral", "spectral/weight/stable_rank")["about"]["matrices"] == 13
    assert "not finite" in named(runs / "full", "validation", "validation_loss")["about"]["note"]
    seen = Seen()
    run_it([runs / "full"], watcher=seen, families=("curvature",), steps=(4,))
    assert "the Hessian's products are not finite" in seen.problems[0][2]
    failed = [r for r in records(runs / "full", "landscape") if r["step"] == 4 and r["value"] is None]
    assert any("model.layers.1.mlp.up_proj.weight" in r["about"]["note"] for r in failed)
    assert failures >= 1
    assert named(runs / "full", "landscape", "landscape/random/sharpness", step=2)["value"] is not None


def test_the_report_knows_its_baseline(measured):
    full, report = lr.load_report(measured / "full"), lr.load_report(measured / "sparse")
    baseline = report["baseline"]
    assert (baseline["name"], baseline["method"], baseline["steps"]) == ("full", "fullrank", 4)
    assert baseline["data"] == full["data"]
    # it was not measured itself: what its training noted is there
    (loss,) = [entry for entry in full["metrics"] if entry["name"] == "validation_loss"]
    (found,) = [c for c in beside_baseline(report) if c.name == "validation_loss"]
    assert found.baseline.value == loss["value"] != found.number.value
    assert "The baseline is full: full-rank training" in (measured / "sparse" / "publish" / "README.md").read_text()
    assert "baseline" not in full


def test_the_difference_to_the_baseline_is_paired_in_the_report_the_card_and_a_comparison(runs):
    names = ("again", "full")
    run_it([runs / name for name in names], runs / "full", families=("loss", "landscape", "interpolation"))
    rows = pd.read_parquet(runs / "full" / "evaluation.parquet").to_dict("records")
    sequences = EvaluationSet.from_dataset(rows, None, 4)
    of_run = [sequences.losses(load_model(runs / name / "checkpoint-4")) for name in names]
    (ours, tokens), (base, _) = [(losses.numpy(), counts.numpy()) for losses, counts in of_run]
    value = (ours - base).sum() / tokens.sum()
    residual, count = ours - base - value * tokens, len(tokens)
    stderr = np.sqrt(count / (count - 1) * (residual**2).sum()) / tokens.sum()
    pairs = {pair.name: pair.delta for pair in beside_baseline(lr.load_report(runs / "again"))}
    loss = pairs["validation_loss"]
    assert (loss.value, loss.stderr) == (pytest.approx(value, rel=1e-6), pytest.approx(stderr, rel=1e-6))
    assert (loss.test, loss.dof) == (f"paired over {count} sequences", pytest.approx(count - 1))
    assert loss.p == pytest.approx(2 * student.sf(abs(value / stderr), count - 1))
    assert f"paired over {count} sequences" in (runs / "again" / "publish" / "README.md").read_text()
    assert pairs["landscape/random/sharpness"].test == "paired over 3 directions × 4 sequences"
    assert pairs["interpolation/consecutive/barrier"].test == "paired over 4 sequences"
    found = compare(gather([str(runs / name) for name in names]).runs, baseline=1)
    (at,) = [place for place, column in enumerate(found.columns) if column.name == "validation_loss"]
    cell = found.cells.loc[(0, at)]
    assert (cell.delta, cell.delta_stderr, cell.p, cell.test) == (loss.value, loss.stderr, loss.p, loss.test)


def test_a_baseline_among_the_runs_is_measured_first(runs):
    run_it([runs / "again", runs / "full"], runs / "full", families=("loss", "curvature"))
    report, full = (lr.load_report(runs / name) for name in ("again", "full"))
    assert "baseline" not in full
    assert {c.name for c in beside_baseline(report)} == {
        "validation_loss", "perplexity", "curvature/top_eigenvalue", "curvature/trace",
    }  # fmt: skip
    theirs = {(e["name"], e["space"]): e for e in full["metrics"] if e["step"] == 4}
    assert all(theirs[e["name"], e["space"]] == e for e in report["baseline"]["metrics"])
    # measured again without one, it stays known
    run_it([runs / "again"], families=("loss",))
    assert lr.load_report(runs / "again")["baseline"] == report["baseline"]


@pytest.mark.parametrize(
    ("sources", "baseline", "changes", "message"),
    [
        (["full"], "other", {}, r"hidden_size is 32 there, 16 here"),
        (["full"], "strange", {}, r"model_type is gpt2 there, llama here.*hidden_size is None there, 16 here"),
        (["strange"], "full", {}, r"model_type is llama there, gpt2 here"),
        (["full"], "translated", {}, "baseline translated has another tokenizer than full"),
        (["full"], "nowhere/to/be", {}, "nowhere"),
        (["./nowhere"], None, {}, "does not exist"),
        (["full"], None, {"families": ("activation",)}, "--baseline"),
        (["full"], None, {"steps": (3,)}, "no checkpoint of step 3; it has 2, 4"),
        (["empty"], None, {}, "no checkpoint-<step>"),
        ([], None, {}, "at least one"),
        (["full", "sparse"], None, {"output": "x"}, "is for one run"),
    ],
)
def test_what_cannot_be_measured_is_said_first(sources, baseline, changes, message, runs, monkeypatch):
    monkeypatch.chdir(runs)
    (runs / "empty").mkdir()
    for name, model in (("other", llama(hidden_size=32)), ("strange", gpt2())):
        make_trainer(METHODS["fullrank"], arguments(runs / name, **SAVING), model=model).train()
    translate(runs / "full", "ours")
    translate(shutil.copytree(runs / "full", runs / "translated"), "theirs")
    with pytest.raises((ValueError, OSError), match=message):
        run_it(sources, baseline, **changes)
    assert not (runs / "full" / "measured.json").exists()


def translate(folder, tokenizer):
    """Give a run's report the name of its folder and data with the hash of a tokenizer."""
    report = lr.load_report(folder)
    keys = ("name", "config", "revision_or_hash", "tokenizer_name", "tokenizer_hash", "sequence_length", "packing")
    keys += ("train_sequences", "validation_sequences", "validation_tokens", "split_seed")
    report["run"]["name"], report["data"] = (
        folder.name,
        dict.fromkeys(keys) | {"name": "text", "tokenizer_hash": tokenizer},
    )
    write_report(report, folder / "publish" / "report.json")


def test_a_barrier_to_a_run_with_another_tokenizer_is_marked(runs):
    translate(runs / "full", "ours")
    translate(runs / "again", "theirs")
    _, failures = run_it([runs / "full", runs / "again"], families=("interpolation",))
    (row,) = [r for r in records(runs / "full", "interpolation") if r["settings"].get("other") == "again"]
    assert (failures, row["value"]) == (0, None)
    assert "again has another tokenizer" in row["about"]["note"]


def test_a_plain_trainers_run_gets_a_report(tmp_path):
    trainer = Trainer(model=gpt2(), args=arguments(tmp_path / "plain", **SAVING), train_dataset=dataset())
    trainer.train()
    rows = tmp_path / "rows.parquet"
    pd.DataFrame({"input_ids": dataset(6, seed=1)["input_ids"]}).to_parquet(rows)
    with pytest.raises(DataError, match="not recorded: name the validation data"):
        run_it([tmp_path / "plain"])
    shutil.copy(rows, tmp_path / "plain" / "evaluation.parquet")
    _, failures = run_it([tmp_path / "plain"])
    assert failures == 0
    report = lr.load_report(tmp_path / "plain")
    assert report["run"]["method"] == "fullrank"
    assert report["run"]["steps"] == 4
    assert report["data"] is None
    assert report["run"]["learning_rate"] == 1e-2, "the schedule's own, which no logged step need have reached"
    assert {"landscape/random/sharpness", "interpolation/consecutive/barrier"} <= {
        m["name"] for m in report["metrics"]
    }


def test_a_plain_run_that_was_measured_is_published_with_its_model(hub, tmp_path, caplog):
    folder = tmp_path / "plain"
    trainer = Trainer(model=gpt2(), args=arguments(folder, **SAVING), train_dataset=dataset())
    trainer.train()
    run_it([folder], families=("spectral",))
    lr.push(folder, "user/plain")
    published = AutoModelForCausalLM.from_pretrained("user/plain").state_dict()
    trained = trainer.model.state_dict()
    assert published.keys() == trained.keys()
    assert all(torch.equal(published[name], tensor) for name, tensor in trained.items())
    # nothing to publish but the report
    for path in (folder / "publish").glob("*.safetensors"):
        path.unlink()
    (folder / "publish" / "config.json").unlink()
    shutil.rmtree(folder / "checkpoint-4")
    lr.push(folder, "user/reported")
    assert "holds no model" in caplog.text


def test_a_published_folder_alone(measured, tmp_path):
    published = shutil.copytree(measured / "sparse" / "publish", tmp_path / "publish")
    shutil.copy(measured / "sparse" / "evaluation.parquet", tmp_path / "evaluation.parquet")
    run = open_run(str(published))
    assert [c.step for c in run.checkpoints] == [4]
    assert run.method == "sltrain"
    run_it([published], families=("loss",), output=tmp_path)
    assert named(tmp_path, "validation", "validation_loss")["value"] == pytest.approx(
        named(measured / "sparse", "validation", "validation_loss")["value"], rel=1e-6
    )


def test_a_repository_with_revisions(hub, trained, tmp_path, monkeypatch, go_offline):
    monkeypatch.chdir(tmp_path)
    for step in (2, 4):
        folder = shutil.copytree(trained / "sparse" / "publish", tmp_path / f"at{step}")
        model = load_model(trained / "sparse" / f"checkpoint-{step}")
        from hf_lowrank.checkpoints import export

        export(model, folder)
        report = json.loads((folder / "report.json").read_text())
        report["run"]["steps"] = step
        (folder / "report.json").write_text(json.dumps(report))
        lr.push(folder, "user/sparse", tag=f"step-{step}")
    run = open_run("user/sparse")
    assert [c.step for c in run.checkpoints] == [2, 4]
    shutil.copytree(trained / "sparse", "local")
    run.output.mkdir(parents=True)
    shutil.copy(trained / "sparse" / "evaluation.parquet", run.output)
    run_it(["user/sparse"], families=("loss", "spectral"))
    run_it(["local"], families=("loss", "spectral"))
    for family in ("validation", "spectral"):
        assert records(run.output, family) == records(tmp_path / "local", family)
    assert open_run("user/sparse@step-2").checkpoints[0].step == 2
    # everything is in the cache now
    go_offline()
    run = open_run("user/sparse")
    assert [c.step for c in run.checkpoints] == [2, 4]
    assert all((c.folder / "model.safetensors").is_file() for c in run.checkpoints)


def test_what_is_no_longer_there_is_measured_again(runs):
    run_it([runs / "full"], families=("loss", "spectral"))
    (runs / "full" / "publish" / "metrics" / "spectral.json").unlink()
    seen = Seen()
    run_it([runs / "full"], families=("loss", "spectral"), watcher=seen)
    assert [unit for _, unit in seen.units] == ["step 2: spectral dense", "step 4: spectral dense"]
    # training on keeps the loss of earlier checkpoints
    trainer = make_trainer(METHODS["fullrank"], arguments(runs / "full", **{**SAVING, "max_steps": 6}))
    lr.attach(trainer)
    trainer.train(resume_from_checkpoint=lr.last_checkpoint(runs / "full"))
    losses = [r["step"] for r in records(runs / "full", "validation") if r["name"] == "validation_loss"]
    assert losses == [2, 4, 6]


def test_other_sequences_do_not_measure_spectra_again(runs):
    run_it([runs / "full"], families=("loss", "spectral", "curvature"))
    seen = Seen()
    run_it(
        [runs / "full"], families=("loss", "spectral", "curvature"), watcher=seen, preset=replace(PRESET, sequences=3)
    )
    assert [unit for _, unit in seen.units] == [f"step {step}: curvature dense" for step in (2, 4)]


def test_spectra_need_no_data(tmp_path):
    Trainer(model=gpt2(), args=arguments(tmp_path / "plain", **SAVING), train_dataset=dataset()).train()
    _, failures = run_it([tmp_path / "plain"], families=("spectral",))
    assert failures == 0
    model = lr.load_report(tmp_path / "plain").run.model
    assert (model.parameters, model.loaded_by) == (gpt2().num_parameters(), "AutoModelForCausalLM")


def test_the_card_of_a_plain_run_names_the_models_own_class(tmp_path):
    toy_model("vit", auto_class=AutoModelForImageClassification).save_pretrained(tmp_path / "plain" / "checkpoint-2")
    run_it([tmp_path / "plain"], families=("spectral",))
    assert "ViTForImageClassification.from_pretrained(" in (tmp_path / "plain/publish/README.md").read_text()


def test_a_plain_run_that_went_on_has_a_report_of_where_it_is_now(tmp_path):
    folder = tmp_path / "plain"
    Trainer(model=gpt2(), args=arguments(folder, **SAVING), train_dataset=dataset()).train()
    run_it([folder], families=("spectral",))
    longer = arguments(folder, **{**SAVING, "max_steps": 6})
    Trainer(model=gpt2(), args=longer, train_dataset=dataset()).train(resume_from_checkpoint=True)
    # the newest is cut short: the others count
    path = folder / "checkpoint-6" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    _, failures = run_it([folder], families=("spectral",))
    assert failures == 1
    report = lr.load_report(folder)
    assert report["run"]["steps"] == 6
    assert report["run"]["model"]["parameters"] == gpt2().num_parameters()
    assert named(folder, "spectral", "spectral/update/stable_rank", step=4)["value"] is not None


def test_another_folder_for_the_results_and_the_runs_own_rows(runs, tmp_path):
    run_it([runs / "full"], families=("loss",), output=tmp_path / "out")
    assert named(tmp_path / "out", "validation", "validation_loss")["settings"]["sequences"] == 8
    assert not (runs / "full" / "measured.json").exists()
    run_it([runs / "sparse" / "checkpoint-2"], families=("loss",))
    assert named(runs / "sparse", "validation", "validation_loss", step=2)["settings"]["sequences"] == 8
    assert not (runs / "sparse" / "checkpoint-2" / "publish").exists()


def test_a_layout_that_cannot_be_aligned_has_its_plain_barrier(runs, monkeypatch):
    def refuse(*_):
        raise ValueError("block 0 has no known layout")

    monkeypatch.setattr("hf_lowrank.families.interpolation.align", refuse)
    _, failures = run_it([runs / "sparse"], runs / "full", families=("interpolation",))
    assert failures == 0
    prefix = "interpolation/cross_method"
    assert named(runs / "sparse", "interpolation", f"{prefix}/barrier", other="full")["value"] is not None
    aligned = named(runs / "sparse", "interpolation", f"{prefix}_aligned/barrier", other="full")
    assert (aligned["value"], aligned["about"]["note"]) == (None, "block 0 has no known layout")


def test_a_barrier_that_failed_leaves_one_row_that_a_later_one_replaces(runs):
    path = runs / "full" / "checkpoint-4" / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    for _ in range(2):
        run_it([runs / "sparse"], runs / "full", families=("interpolation",))
    failed = named(runs / "sparse", "interpolation", "interpolation/cross_method/barrier", other="full")
    assert failed["value"] is None
    path.write_bytes(whole)
    run_it([runs / "sparse"], runs / "full", families=("interpolation",))
    assert named(runs / "sparse", "interpolation", "interpolation/cross_method/barrier", other="full")["value"]


# The command


def command(*words):
    import sys

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["hf-lowrank", "measure", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
    return ended.value.code


def test_the_command_measures_and_prints(runs, capsys):
    assert command(runs / "full", "--only", "loss,spectral", "--sequences", "4", "--device", "cpu") == 0
    out = capsys.readouterr().out
    assert "1/4 full step 2: loss\n" in out, "what is being measured, for a log file"
    assert "validation_loss" in out
    assert "H9" in out
    assert "holds report, tables, figures and card" in " ".join(out.split())
    path = runs / "full" / "checkpoint-2" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert command(runs / "full", "--only", "loss") == 1
    assert "ends too early" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "spectra"], "did you mean 'spectral'"),
        (["--only", "loss,activation"], "name it with --baseline"),
        (["--preset", "quik"], "did you mean 'quick'"),
        (["--steps", "two"], "whole numbers"),
        (["--sequences", "0"], "give 1 or more"),
        (["--sequence-length", "9"], "needs --dataset-name or --dataset-path"),
        (["--dataset-path", "nowhere", "--tokenizer-name", "t"], "does not exist"),
    ],
)
def test_the_command_says_what_is_wrong(words, message, runs, capsys):
    assert command(runs / "full", *words) == 2
    assert message in capsys.readouterr().err


def test_study_has_the_studys_settings():
    from hf_lowrank.families import PRESETS, families
    from hf_lowrank.metrics.landscape import symmetric_grid

    assert (PRESETS["study"].sequences, PRESETS["quick"].sequences) == (1000, 32)
    study, quick = (PRESETS[name].of(families()["landscape"]) for name in ("study", "quick"))
    steps = {
        "random": (study.radius, study.points, 0.003, 0.00025),
        "svd_1": (study.svd_1_radius, study.svd_1_points, 0.25, 0.005),
        "svd_k": (study.svd_k_radius, study.svd_k_points, 0.052, 0.004),
    }
    for radius, points, end, step in steps.values():
        grid = symmetric_grid(radius, points)
        assert grid[-1] == pytest.approx(end)
        np.testing.assert_allclose(np.diff(grid), step)
        assert 0.0 in grid
    assert (study.directions, study.svd_k, study.svd_single) == (100, (5, 10, 20, 100), (5, 10, 100))
    interpolation = PRESETS["study"].of(families()["interpolation"])
    assert len(interpolation.grid()) == 21
    assert len(interpolation.cross_grid()) == 21
    assert interpolation.cross_sequences == 500
    assert (quick.directions, quick.points, quick.svd_k) == (8, 13, (5,))
