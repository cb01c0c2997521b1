"""The study's machine: its file, its plan, its forecast, and its jobs, with stand-ins for the commands."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import study_stub
import yaml

from hf_lowrank.options import StudyOptions
from hf_lowrank.study.forecast import Costs, forecast
from hf_lowrank.study.jobs import locked, read_state
from hf_lowrank.study.plan import check_cells, make_plan, recipe_words
from hf_lowrank.study.runner import load_plan
from hf_lowrank.study.search import search
from hf_lowrank.study.spec import read_study
from hf_lowrank.study.study import forecast_lines, recipe_tokens, run_study

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
SMALL = {
    "title": "small", "sizes": ["tiny"], "seeds": [1, 2], "steps": 4, "checkpoints": 2, "recipes": str(RECIPES),
    "methods": {"fullrank": None, "galore": None}, "downstream": {"tasks": ["quick"], "checkpoints": "all"},
    "barriers": {"methods": ["fullrank", "galore"], "seeds": ["galore"]},
}  # fmt: skip
TUNED = {"tuning": {"size": "tiny", "seed": 0, "starts": {"galore": ["1e-2", 3.0e-2]}}}


def written(folder, **changes):
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in {**SMALL, **changes}.items() if value is not None}))
    return path


def planned(folder, losses=None, **changes):
    return make_plan(read_study(written(folder, **changes)), RECIPES, losses)


BAD = {
    "unknown key": ({"metod": 1}, "unknown key 'metod' .did you mean 'methods'"),
    "unknown key of a method": ({"methods": {"galore": {"setting": {}}}}, "methods.galore.setting.*settings"),
    "unknown key of a part": ({"metrics": {"presets": "quick"}}, "metrics.presets.*preset"),
    "missing key": ({"title": None}, "'title' is missing"),
    "wrong type": ({"steps": "many"}, "steps"),
    "no step": ({"steps": 0}, "steps.*greater than or equal to 1"),
    "no seed": ({"seeds": []}, "seeds"),
    "a seed twice": ({"seeds": [1, 1]}, "seeds.*1 stands there twice"),
    "uneven checkpoints": ({"checkpoints": 3}, "3 do not divide the 4 steps of tiny evenly"),
    "no such checkpoint": ({"metrics": {"checkpoints": [3]}}, "tiny has no checkpoint at step 3, but at 2, 4"),
    "steps of another size": ({"steps": {"60m": 4}}, "steps: 60m is none of the sizes tiny"),
    "no steps of a size": ({"steps": {}}, "none for the size tiny"),
    "unknown preset": ({"metrics": {"preset": "slow"}}, "metrics.preset='slow'.*'quick' or 'study'"),
    "unknown family": ({"metrics": {"only": ["spectra"]}}, "metrics.only: spectra .did you mean 'spectral'"),
    "unknown reference": ({"reference": "full"}, "reference: full .did you mean 'fullrank'"),
    "unknown method in barriers": ({"barriers": {"methods": ["galor"]}}, "barriers.methods: galor .did you mean"),
    "what the study decides": ({"settings": {"seed": 3}}, "seed is no setting of a method here: seeds decides it"),
    "two sources of rates": (
        {**TUNED, "methods": {"fullrank": None, "galore": {"settings": {"learning_rate": 0.1}}}},
        "galore: both settings.learning_rate and tuning.starts",
    ),
    "rates of rates": (
        {"controls": {"a": {"recipe": "galore", "rates_of": "b"}, "b": {"recipe": "galore", "rates_of": "galore"}}},
        "b takes its rates from another itself",
    ),
    "a seed that is tuned with": ({**TUNED, "seeds": [0, 1]}, "tuning.seed 0 is a seed of the study"),
    "a start of three": ({"tuning": {"size": "tiny", "starts": {"galore": [1, 2, 3]}}}, "tuning.starts.galore"),
    "a start below 0": ({"tuning": {"size": "tiny", "starts": {"galore": [-1, 2]}}}, "tuning.starts.galore"),
    "a name that is no folder": ({"methods": {"a/b": None}}, "'a/b' becomes a folder's name"),
    "a control like a method": ({"controls": {"galore": None}}, "controls.galore: a method has this name"),
    "unknown recipe": (
        {"methods": {"fullrank": None, "galor": None}, "barriers": None},
        "galor: no recipe of the size tiny; there are",
    ),
    "unknown size": ({"sizes": ["61m"]}, "has no 61m, but"),
    "unknown flag": ({"settings": {"warmup": 3}}, "fullrank at the size tiny: unknown flag '--warmup'"),
    "wrong value": ({"settings": {"learning_rate": "fast"}}, "at the size tiny: .*learning_rate.*fast"),
    "another method's flag": (
        {"methods": {"fullrank": {"settings": {"sparsity": 0.1}}}, "barriers": None},
        "it is a setting of sltrain",
    ),
    "a batch that cannot be shared": ({"processes": 3}, "total_batch_size=16 cannot be shared among processes=3"),
    "no results": ({"tuning": {**TUNED["tuning"], "results": "none.jsonl"}}, "none.jsonl does not exist"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_file_is_refused_by_name_before_anything_runs(case, tmp_path):
    changes, message = BAD[case]
    with pytest.raises(ValueError, match=message) as caught:
        run_study(written(tmp_path, **changes), StudyOptions(output=tmp_path / "out"), print)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_none_or_says_a_key_twice_is_refused(tmp_path):
    path = tmp_path / "study.yaml"
    with pytest.raises(ValueError, match="there is no such file"):
        read_study(path)
    for text, message in {
        "title: a\ntitle: b\n": "the key title stands twice", "- a": "a mapping of names", "a: [": "no valid YAML",
    }.items():  # fmt: skip
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_study(path)


@pytest.mark.parametrize("path", sorted((RECIPES / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_studies_of_the_repository_are_right(path):
    study = read_study(path)
    plan = make_plan(study, RECIPES)
    tokens = check_cells(plan, RECIPES, recipe_tokens(RECIPES, study.processes))
    assert len(plan.cells) == len(tokens)
    assert len({cell.name for cell in plan.cells}) == len(plan.cells)
    assert all(len(study.saved_steps(size)) >= 4 for size in study.sizes)


def test_a_plan_has_every_method_and_control_at_every_size_with_every_seed(tmp_path):
    controls = {
        "full-at-galores": {"recipe": "fullrank", "rates_of": "galore", "seeds": [2]},
        "high": {"recipe": "galore", "settings": {"r": 8}, "sizes": {"tiny": {"r": 128}}},
    }
    plan = planned(tmp_path, sizes=["nano", "tiny"], controls=controls, settings={"weight_decay": 0.1})
    names = [cell.name for cell in plan.cells]
    assert names[:6] == [
        "nano-fullrank-s1", "nano-galore-s1", "nano-high-s1", "tiny-fullrank-s1", "tiny-galore-s1", "tiny-high-s1",
    ]  # fmt: skip
    assert len(names) == 14
    assert plan.cell("tiny-full-at-galores-s2").overrides == {
        "weight_decay": 0.1, "learning_rate": 1e-2, "other_lr_scale": 1.0,
    }  # fmt: skip
    assert plan.cell("nano-high-s1").overrides["r"] == 8
    assert plan.cell("tiny-high-s1").overrides["r"] == 128
    assert [cell.role for cell in plan.cells if cell.label == "high"] == ["control"] * 4
    words = " ".join(recipe_words(plan.cell("tiny-high-s1"), RECIPES))
    assert "configs/tiny/galore.yaml --weight_decay 0.1 --r 128 --max_steps 4 --seed 1 --data_seed 1" in words
    baselines = {cell.name: getattr(plan.baseline(cell), "name", None) for cell in plan.cells}
    assert baselines["tiny-galore-s2"] == "tiny-fullrank-s2"
    # a null: full-rank against full-rank of the seed before
    assert (baselines["tiny-fullrank-s1"], baselines["tiny-fullrank-s2"]) == (None, "tiny-fullrank-s1")
    assert {pair.name: pair.runs for pair in plan.pairs}["pair-tiny-methods-s2"] == (
        "tiny-fullrank-s2", "tiny-galore-s2",
    )  # fmt: skip


def test_rates_come_from_the_search_and_are_carried_to_other_sizes(tmp_path):
    changes = {
        "sizes": ["nano", "tiny", "60m"], "tuning": {**TUNED["tuning"], "carried_to": ["nano"]},
        "controls": {"full": {"recipe": "fullrank", "rates_of": "galore"}},
    }  # fmt: skip
    plan = planned(tmp_path, **changes)
    assert plan.waiting == {"galore", "full"}
    losses = {}
    while coming := search(losses).coming:
        losses |= {(i, j): 4 + (i + 1) ** 2 + j**2 for i, j in coming}
    plan = planned(tmp_path, {"galore": losses}, **changes)
    assert not plan.waiting
    tuned = {"learning_rate": 0.00333, "other_lr_scale": 9.01}
    for size in ("nano", "tiny"):
        assert plan.cell(f"{size}-galore-s1").overrides == plan.cell(f"{size}-full-s1").overrides == tuned
    assert plan.cell("60m-galore-s1").overrides == {}
    assert plan.cell("60m-full-s1").overrides == {"learning_rate": 0.01, "other_lr_scale": 1.0}


def test_a_control_takes_the_rates_that_its_source_has_here(tmp_path):
    changes = {
        "settings": {"learning_rate": 0.05, "other_lr_scale": 2.0},
        "controls": {"full": {"recipe": "fullrank", "rates_of": "galore"}},
    }
    overrides = planned(tmp_path, **changes).cell("tiny-full-s1").overrides
    assert (overrides["learning_rate"], overrides["other_lr_scale"]) == (0.05, 2.0)


COSTS = Costs(start=10, step=2, measure=30, evaluate=5, pair=7, checkpoint=100, publish=40)


def test_what_a_study_will_cost(tmp_path):
    plan = planned(tmp_path)
    tokens = {cell.name: 1000 for cell in plan.cells}
    new = forecast(plan, tokens, {"tiny": COSTS}, {}, keep_checkpoints=False)
    assert (new.runs, new.all_runs, new.tuning, new.tokens) == (4, 4, 0, 4000)
    # four runs of 4 steps with 2 checkpoints, three pairs of two runs in both directions
    assert new.seconds == 4 * (10 + 4 * 2 + 2 * 30 + 2 * 5) + 3 * 2 * 7
    # at the end: what is published, and the checkpoints of two full-rank runs
    assert new.kept == 4 * 40 + 2 * 2 * 100
    # at most: the first pair of runs without all but GaLore's last checkpoint, which waits for the other seed's
    assert new.peak == (2 * 40 + 2 * 100 + 100) + (2 * 40 + 2 * 2 * 100)
    assert forecast(plan, tokens, {"tiny": COSTS}, {}, keep_checkpoints=True).kept == 4 * 40 + 4 * 2 * 100
    unknown = forecast(plan, tokens, {}, {}, keep_checkpoints=False)
    assert (unknown.tokens, unknown.seconds, unknown.peak) == (4000, None, None)
    assert "not known yet" in forecast_lines(unknown, 1)[-1]
    assert "about 0.1 hours with --jobs 2 (0.1 hours" in forecast_lines(new, 2)[1]


def test_finished_runs_count_no_more_and_tell_what_others_take(tmp_path):
    plan = planned(tmp_path)
    tokens = {cell.name: 1000 for cell in plan.cells}
    done = {"tiny-galore-s1.train": 100.0, "tiny-galore-s1.measure": 200.0, "pair-tiny-methods-s1": 9.0}
    left = forecast(plan, tokens, {"tiny": COSTS}, done, keep_checkpoints=False)
    assert (left.runs, left.tokens) == (3, 3000)
    full, other = 10 + 4 * 2 + 2 * 30 + 2 * 5, 100 + 200 + 2 * 5
    assert left.seconds == 2 * full + other + 2 * 5 + 2 * 2 * 7


def test_a_search_that_goes_on_is_estimated(tmp_path):
    changes = {**TUNED, "barriers": None, "downstream": None, "metrics": None}
    tokens = {"tiny-fullrank-s1": 10, "tiny-fullrank-s2": 10, "tiny-galore-s1": 10, "tiny-galore-s2": 10}
    plan = planned(tmp_path, {"galore": {(0, 0): 4.0, (-1, 0): 5.0}}, **changes)
    left = forecast(plan, tokens, {"tiny": COSTS}, {}, keep_checkpoints=False)
    assert (left.runs, left.tuning, left.tokens) == (9, 5, 90)


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """The folder that tells the stand-ins what goes wrong."""
    (tmp_path / "stub").mkdir()
    monkeypatch.setenv("STUB", str(tmp_path / "stub"))
    monkeypatch.setattr(study_stub, "STUB", tmp_path / "stub")
    return tmp_path / "stub"


def calls(stub):
    """What was run since this was asked last."""
    path = stub / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    path.write_text("")
    return lines


def contents(folder):
    """All files that the analysis may read, and those that a run keeps."""
    paths = [folder / "study.json", *sorted((folder / "runs").rglob("*"))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.is_file()}


def test_a_study_runs_everything_once_and_keeps_what_the_analysis_needs(tmp_path, stub):
    path, out = written(tmp_path), tmp_path / "out"
    complete, lines = study_stub.study(path, out)
    assert complete
    ran = calls(stub)
    assert [sum(line.startswith(kind) for line in ran) for kind in ("train", "measure", "evaluate")] == [4, 7, 4]
    assert ran.index("train tiny-galore-s1 from=0") < ran.index("measure tiny-galore-s1 runs/tiny-fullrank-s1")
    assert "measure tiny-fullrank-s2 runs/tiny-fullrank-s1" in ran
    record = json.loads((out / "study.json").read_text())
    assert [cell["role"] for cell in record["cells"]] == ["run"] * 4 + ["pair"] * 3
    assert {"name", "method", "overrides", "seed", "size", "steps", "baseline"} <= record["cells"][0].keys()
    held = {run.name: sorted(path.name for path in run.iterdir()) for run in (out / "runs").iterdir()}
    assert held["tiny-galore-s1"] == held["tiny-galore-s2"] == ["publish"]
    assert held["tiny-fullrank-s1"] == ["checkpoint-2", "checkpoint-4", "publish"], "later methods refer to it"
    assert any(
        line.startswith("started   tiny-galore-s1.train; running: tiny-galore-s1.train; left: ") for line in lines
    )
    before = contents(out)
    assert study_stub.study(path, out)[0]
    assert calls(stub) == []
    assert contents(out) == before


@pytest.mark.parametrize("launcher", ["two jobs", pytest.param("submitit", marks=pytest.mark.slow)])
def test_where_the_jobs_run_changes_nothing(launcher, tmp_path, stub):
    changes, options = TUNED, {"jobs": 2}
    if launcher == "submitit":
        changes = {"seeds": [1], "downstream": None}
        options = {"launcher": "slurm", "cluster": "local"}
    path = written(tmp_path, **changes)
    study_stub.study(path, tmp_path / "one")
    assert study_stub.study(path, tmp_path / "other", **options)[0]
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


def test_a_study_that_is_killed_at_every_moment_ends_as_one_that_is_not(tmp_path, stub):
    path = written(tmp_path, **TUNED, seeds=[1])
    study_stub.study(path, tmp_path / "whole")
    calls(stub)
    (stub / "kill").touch()
    command = [sys.executable, study_stub.__file__, "study", str(path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    killed = (stub / "killed").read_text().split()
    assert {"train-start", "train-2", "train-4", "train-end", "measure-start", "measure-end"} <= set(killed)
    assert {"evaluate-start", "evaluate-end", "barriers-start", "barriers-end"} <= set(killed)
    assert {"said-started-train", "said-done-train", "said-done-measure"} <= set(killed)
    ran = calls(stub)
    assert {"train tuning-tiny-galore-0_0 from=2", "train tuning-tiny-galore-0_0 from=4"} <= set(ran)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("trouble", ["fail", "diverge"])
def test_a_run_that_does_not_end_well_costs_itself_alone(trouble, tmp_path, stub):
    path, out = written(tmp_path), tmp_path / "out"
    study_stub.study(path, tmp_path / "whole")
    (stub / f"{trouble}-tiny-galore-s1").touch()
    complete, lines = study_stub.study(path, out)
    assert not complete
    said = {"fail": "tiny-galore-s1.train failed: error: out of luck", "diverge": "tiny-galore-s1.train diverged"}
    assert any(said[trouble] in line for line in lines[-3:])
    assert any("3 of 4 runs are trained" in line for line in lines)
    assert read_state(out, "tiny-galore-s2.evaluate").state == "done"
    calls(stub)
    (stub / f"{trouble}-tiny-galore-s1").unlink()
    complete, _ = study_stub.study(path, out)
    ran = calls(stub)
    if trouble == "diverge":
        assert not complete, "it would diverge again"
        assert ran == []
        return
    assert complete
    assert [line for line in ran if "-s2" in line and "-s1" not in line] == [], "nothing else is repeated"
    assert contents(out) == contents(tmp_path / "whole")


def test_a_run_without_a_whole_checkpoint_starts_anew(tmp_path, stub):
    (stub / "damaged-tiny-galore-s1").touch()
    assert study_stub.study(written(tmp_path, seeds=[1], downstream=None), tmp_path / "out")[0]
    log = (tmp_path / "out" / "logs" / "tiny-galore-s1.train.log").read_text()
    assert [line.split()[-1] for line in log.splitlines() if line.startswith("$")] == ["last", "--overwrite"]


def test_a_method_whose_reference_failed_waits_for_it(tmp_path, stub):
    path, out = written(tmp_path, seeds=[1]), tmp_path / "out"
    (stub / "fail-tiny-fullrank-s1").touch()
    complete, lines = study_stub.study(path, out)
    assert not complete
    assert any("tiny-galore-s1.measure left out: its baseline tiny-fullrank-s1" in line for line in lines)
    assert (out / "runs" / "tiny-galore-s1" / "checkpoint-2").is_dir(), "it is not measured yet"
    (stub / "fail-tiny-fullrank-s1").unlink()
    assert study_stub.study(path, out)[0]


def test_an_extended_study_repeats_nothing(tmp_path, stub):
    out = tmp_path / "out"
    study_stub.study(written(tmp_path), out)
    before = {name: text for name, text in contents(out).items() if name != "study.json"}
    calls(stub)
    changes = {
        "seeds": [1, 2, 3], "methods": {"fullrank": None, "galore": None, "fira": None},
        "barriers": {"methods": ["fullrank", "galore", "fira"], "seeds": ["galore"]},
    }  # fmt: skip
    complete, _ = study_stub.study(written(tmp_path, **changes), out)
    assert complete
    trained = [line for line in calls(stub) if line.startswith("train")]
    assert sorted(line.split()[1] for line in trained) == [
        "tiny-fira-s1", "tiny-fira-s2", "tiny-fira-s3", "tiny-fullrank-s3", "tiny-galore-s3",
    ]  # fmt: skip
    after = contents(out)
    for name, text in before.items():
        if name.endswith("report.json"):
            old, new = json.loads(text), json.loads(after[name])
            assert all(entry in new["metrics"] for entry in old["metrics"])
        else:
            assert after[name] == text


def test_other_settings_of_a_run_that_is_there_are_refused(tmp_path, stub):
    out = tmp_path / "out"
    study_stub.study(written(tmp_path), out)
    before = contents(out)
    with pytest.raises(ValueError, match="tiny-fullrank-s1 is finished with steps=4, and the study now says 8"):
        study_stub.study(written(tmp_path, steps=8), out)
    changed = {"methods": {"fullrank": None, "galore": {"settings": {"r": 8}}}}
    with pytest.raises(ValueError, match="tiny-galore-s1 is finished with r=None, and the study now says 8"):
        study_stub.study(written(tmp_path, **changed), out)
    assert contents(out) == before
    complete, lines = study_stub.study(written(tmp_path, metrics={"sequences": 4}), out)
    assert not complete
    assert any(
        "tiny-galore-s1.measure left out: its settings have changed, and the checkpoint of step 2" in line
        for line in lines
    )
    # threads are no part of a result
    assert study_stub.study(written(tmp_path, settings={"cpu_threads": 1}), tmp_path / "out")[0] is True


def test_a_folder_that_another_command_writes_is_refused(tmp_path, stub):
    out = tmp_path / "out"
    with locked(out / "study.lock", wait=False), pytest.raises(ValueError, match="is being written by another"):
        study_stub.study(written(tmp_path), out)
    assert calls(stub) == []
    # a job that outlives its study keeps the lock
    with locked(out / "study.lock", wait=False) as lock:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock])
    with pytest.raises(ValueError, match="is being written by another"):
        study_stub.study(written(tmp_path), out)
    child.communicate(b"\n")
    assert study_stub.study(written(tmp_path), out)[0]


def test_a_search_takes_finished_results_and_runs_the_rest(tmp_path, stub):
    record = {"recipe": "galore", "steps": 4, "seed": 0, "learning_rate": 1e-2, "other_lr_scale": 3.0}
    others = [{**record, "seed": 1}, {**record, "steps": 8}, {**record, "recipe": "fira"}]
    lines = [{**entry, "validation_loss": 4.5} for entry in (record, *others)]
    (tmp_path / "rates.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tuning = {**TUNED["tuning"], "results": "rates.jsonl"}
    assert study_stub.study(written(tmp_path, tuning=tuning), tmp_path / "out")[0]
    trained = [line.split()[1] for line in calls(stub) if "tuning-" in line]
    assert "tuning-tiny-galore-0_0" not in trained
    assert "tuning-tiny-galore-1_0" in trained
    found = json.loads((tmp_path / "out" / "study.json").read_text())["tuning"]["searches"]["galore"]
    assert found["bracketed"]
    assert found["learning_rate"] == pytest.approx(3.33e-3)
    assert found["learning_rate"] * found["other_lr_scale"] == pytest.approx(3e-2, rel=1e-2)
    # results are of one size, at its recipe's settings
    again = (
        {"tuning": {**tuning, "size": "nano"}, "sizes": ["nano"]},
        {"tuning": tuning, "settings": {"max_grad_norm": 1}},
    )
    for number, changes in enumerate(again):
        plan = load_plan(read_study(written(tmp_path, **changes)), tmp_path / f"new{number}", tmp_path, RECIPES)
        assert plan.points["galore"] == 0
    (tmp_path / "rates.jsonl").write_text('{"recipe": "galore"}\n')
    with pytest.raises(ValueError, match="line 1 of .* has no"):
        study_stub.study(written(tmp_path, tuning=tuning), tmp_path / "out")


def test_a_point_that_diverges_is_worse_and_one_that_fails_ends_its_search(tmp_path, stub):
    (stub / "diverge-tuning-tiny-galore-1_0").touch()
    assert study_stub.study(written(tmp_path, **TUNED), tmp_path / "out")[0]
    (stub / "fail-tuning-tiny-galore--1_0").touch()
    complete, lines = study_stub.study(written(tmp_path, **TUNED), tmp_path / "other")
    assert not complete
    assert any("tiny-galore-s1.train left out: the search for the rates of galore" in line for line in lines)
    assert read_state(tmp_path / "other", "tiny-fullrank-s2.evaluate").state == "done"


def test_a_dry_run_calibrates_once_and_trains_nothing(tmp_path, stub):
    path, out = written(tmp_path), tmp_path / "out"
    complete, lines = study_stub.study(path, out, dry_run=True)
    assert complete
    ran = calls(stub)
    assert all("calibration-tiny" in line for line in ran)
    costs = json.loads((out / "calibration.json").read_text())["tiny"]
    assert costs["step"] == pytest.approx(16 * 256 / 1000, abs=1e-3)
    assert any("to train: 4 of 4 runs, 0.1 million tokens" in line for line in lines)
    assert any("hours with --jobs 1" in line for line in lines)
    assert any("GB at the end" in line for line in lines)
    study_stub.study(path, out, dry_run=True)
    assert calls(stub) == []
    assert not list((out / "runs").iterdir())
    assert not (out / "study.json").exists()


def test_gpus_are_dealt_to_jobs(tmp_path, stub, monkeypatch):
    from hf_lowrank.study.launch import Local, devices

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,7,GPU-1")
    assert devices() == ["2", "5", "7", "GPU-1"]
    launcher = Local(tmp_path, 2, 2, None)
    assert [launcher._free.get() for _ in range(2)] == ["2,5", "7,GPU-1"]
    with pytest.raises(ValueError, match="--jobs 3 with 2 processes each need 6 GPUs, 4 are there: --jobs 2"):
        Local(tmp_path, 3, 2, None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices() == []
