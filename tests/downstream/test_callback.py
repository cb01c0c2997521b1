"""EvaluationCallback: tasks at a cadence in any Trainer, into the log and the report."""

import json
import math

import pytest
import torch
from tiny_runs import METHODS, arguments, llama, make_trainer, weights
from tiny_tasks import tokenizer, write_tasks

import hf_lowrank as lr
from hf_lowrank.families import callback as base
from hf_lowrank.report.io import read_report
from hf_lowrank.report.items import ITEMS, read_items

NAMES = ["step", "task", "metric"]
SAVING = dict(max_steps=4, save_strategy="steps", save_steps=2)


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """Without figures, which take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_lowrank.run.report.draw_figures", lambda publish: [])
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def trainer(folder, method="sltrain", **changes):
    made = arguments(folder, **{**SAVING, **changes})
    model = llama(max_position_embeddings=160)
    return make_trainer(METHODS[method], made, model, processing_class=tokenizer())


def callback(tasks, names=("tiny_group", "cloze"), **settings):
    return lr.EvaluationCallback(names, **{"every": 2, "limit": 8, "include_path": tasks, "budget": None, **settings})


def items(folder):
    return read_items(folder / "publish" / "metrics" / ITEMS)


def logged(trainer, key):
    return {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}


@pytest.fixture(scope="module")
def trained(tasks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    made = trainer(folder)
    lr.attach(made, callback(tasks))
    made.train()
    return folder, made


def test_numbers_are_logged_and_stand_in_the_report(trained):
    folder, made = trained
    entries = read_report(folder)["evaluations"]
    assert {(e["step"], e["task"]) for e in entries} == {
        (step, task) for step in (2, 4) for task in ("pairs", "shots", "tiny_group", "cloze")
    }
    assert {(e["limit"], e["about"]["form"]) for e in entries} == {(8, "native")}
    for entry in entries:
        assert logged(made, f"eval_{entry['task']}/{entry['metric']}")[entry["step"]] == entry["value"]
    assert "| pairs | acc |" in (folder / "publish" / "README.md").read_text()


def test_they_are_those_of_the_checkpoint(trained, tasks, tmp_path):
    from hf_lowrank.downstream.evaluate import evaluate
    from hf_lowrank.options import EvaluateOptions

    folder, _ = trained
    options = EvaluateOptions(("tiny_group", "cloze"), "all", limit=8, include=(tasks,), output=tmp_path / "elsewhere")
    ((_, found),), failures = evaluate([str(folder)], options)
    assert failures == []
    expected = {(e["step"], e["task"], e["metric"]): e for e in found}
    entries = read_report(folder)["evaluations"]
    assert len(entries) == len(expected) == 12
    for entry in entries:
        other = expected[entry["step"], entry["task"], entry["metric"]]
        assert entry["value"] == pytest.approx(other["value"], rel=1e-5)
        assert entry["stderr"] == pytest.approx(other["stderr"], rel=1e-5)
    # and so are their items
    ours, theirs = (
        items(place).sort_values([*NAMES, "item"], ignore_index=True) for place in (folder, tmp_path / "elsewhere")
    )
    assert ours.drop(columns="value").equals(theirs.drop(columns="value"))
    assert ours["value"].to_numpy() == pytest.approx(theirs["value"].to_numpy(), rel=1e-5)
    assert set(ours["task"]) == {"pairs", "shots", "tiny_group", "cloze"}


@pytest.mark.parametrize("attach", [False, True], ids=["bare", "attached"])
def test_training_is_bit_identical_with_and_without_it(attach, tasks, tmp_path):
    plain = trainer(tmp_path / "plain")
    if attach:
        lr.attach(plain)
    plain.train()
    expected = weights(plain.model)
    measured = trainer(tmp_path / "measured")
    if attach:
        lr.attach(measured, callback(tasks))
    else:
        measured.add_callback(callback(tasks))
    measured.train()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in weights(measured.model).items())
    assert list(logged(measured, "eval_pairs/acc")) == [2, 4]
    rows = json.loads((tmp_path / "measured" / "publish" / "metrics" / "evaluations.json").read_text())
    assert {row["step"] for row in rows} == {2, 4}


def test_a_resumed_run_keeps_what_was_evaluated_before(tasks, tmp_path):
    first = trainer(tmp_path)
    lr.attach(first, callback(tasks))
    first.train()
    before = read_report(tmp_path)["evaluations"]
    second = trainer(tmp_path)
    lr.attach(second, callback(tasks, limit=6))
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    after = read_report(tmp_path)["evaluations"]
    assert [e for e in after if e["step"] == 2] == [e for e in before if e["step"] == 2]
    assert {(e["step"], e["limit"]) for e in after} == {(2, 8), (4, 6)}
    assert items(tmp_path).groupby("step")["item"].nunique().to_dict() == {2: 8 + 16, 4: 6 + 12}
    third = trainer(tmp_path)
    lr.attach(third)
    third.train()
    assert read_report(tmp_path)["evaluations"] == []


def test_a_task_that_breaks_ends_the_evaluations_and_not_the_training(tasks, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("FAIL_IN", "c")
    made, evaluation = trainer(tmp_path), callback(tasks, "c")
    lr.attach(made, evaluation)
    made.train()
    assert made.state.global_step == 4
    assert evaluation.failed == "RuntimeError: this task is broken"
    assert "downstream failed at step 2 and is switched off" in caplog.text


def test_the_budget_holds_for_it_too(tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "GRACE", 0.0)
    made = trainer(tmp_path)
    lr.attach(made, callback(tasks, "pairs", every=1, budget=1e-9))
    made.train()
    # the first one, whose cost is not known yet, and the end
    assert max(logged(made, "eval_pairs/acc")) == 4
    assert len(logged(made, "eval_pairs/acc")) <= 2


def test_what_cannot_be_meant_is_refused_before_training(tasks, tmp_path, go_offline, monkeypatch):
    with pytest.raises(ValueError, match="limit 0"):
        callback(tasks, limit=0)
    with pytest.raises(ValueError, match="there is no such folder"):
        callback(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no task to evaluate"):
        callback(tasks, "")
    go_offline()
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="needs the data set somebody/questions"):
        callback(tasks, "remote")
    made = make_trainer(METHODS["sltrain"], arguments(tmp_path))
    with pytest.raises(ValueError, match="no tokenizer"):
        lr.attach(made, callback(tasks))


@pytest.mark.slow
def test_numbers_do_not_depend_on_the_processes(launcher, tasks, tmp_path):
    for processes in (1, 2):
        launcher("evaluation_worker", tasks, tmp_path, processes=processes)
    alone, shared = (json.loads((tmp_path / f"evaluated-{n}.json").read_text()) for n in (1, 2))
    assert alone.keys() == shared.keys()
    # a process alone shards nothing
    assert {key.split()[0] for key in alone} == {"fullrank", "sltrain", "trained"}
    for key, value in alone.items():
        assert math.isclose(shared[key], value, rel_tol=1e-9), key
