"""`hf-lowrank evaluate` on tiny runs: the harness's own numbers, resuming, and what cannot be evaluated."""

import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_runs import METHODS, arguments, llama, make_trainer
from tiny_tasks import tokenizer, write_tasks

import hf_lowrank as lr
from hf_lowrank.cli import main
from hf_lowrank.report.io import read_report
from hf_lowrank.report.items import ITEMS, items_of, read_items
from hf_lowrank.report.model import details

TASKS = ("pairs", "shots", "cloze", "rolling", "generated")
CONTEXT = 160


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks."""
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Makes runs of three steps, one a method; figures are left out, since drawing takes seconds."""
    root, made = tmp_path_factory.mktemp("runs"), {}

    def train(method):
        if method not in made:
            folder = root / method
            args = arguments(folder, max_steps=3, save_strategy="steps", save_steps=1, learning_rate=3e-2)
            model = llama(max_position_embeddings=CONTEXT)
            trainer = make_trainer(METHODS[method], args, model, processing_class=tokenizer())
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("hf_lowrank.run.report.draw_figures", lambda publish: [])
                lr.attach(trainer)
                trainer.train()
            made[method] = folder
        return made[method]

    return train


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a run that a test may change."""

    def copy(method="sltrain"):
        return shutil.copytree(trained(method), tmp_path / method)

    return copy


@pytest.fixture
def cli(monkeypatch, capsys, tasks):
    """Calls `hf-lowrank evaluate` with arguments: exit code, standard output and error."""

    def call(*argv):
        capsys.readouterr()
        monkeypatch.setenv("COLUMNS", "200")
        more = ["--include-path", tasks, "--device", "cpu", "--batch-size", 4]
        monkeypatch.setattr(sys, "argv", ["hf-lowrank", "evaluate", *map(str, [*more, *argv])])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code or 0, out=out, err=err)

    return call


@pytest.fixture(scope="module")
def processes(trained, tasks, tmp_path_factory):
    """What needs a process of its own, both at once: the harness's command line, and an evaluation that is killed."""
    out, run = tmp_path_factory.mktemp("out"), trained("sltrain")
    killed = shutil.copytree(run, out / "killed")
    ours = [sys.executable, "-c", "from hf_lowrank.cli import main; main()"]
    harness = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", *harness_arguments(tasks, out / "harness")]
    commands = {
        "harness": [*harness, "--model_args", f"pretrained={run / 'publish'}"],
        "killed": [*ours, "evaluate", killed, "--tasks", "a,b,c,d,e", "--include-path", tasks, "--device", "cpu"],
    }
    running = {
        name: subprocess.Popen(
            [str(word) for word in command],
            env=os.environ | {"DIE_IN": "c"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, command in commands.items()
    }
    yield SimpleNamespace(out=out, running=running, killed=killed)
    for process in running.values():
        process.kill()


def harness_arguments(tasks, output):
    common = ["--tasks", ",".join(TASKS), "--include_path", tasks, "--batch_size", 4]
    return [*map(str, common), "--output_path", str(output)]


@pytest.fixture(scope="module")
def theirs(processes):
    """What the harness finds on the exported dense model."""
    output, _ = processes.running["harness"].communicate(timeout=300)
    assert processes.running["harness"].returncode == 0, output
    return harness_results(processes.out / "harness")


def harness_results(output):
    """Task -> metric -> value or standard error from the file that the harness writes."""
    (path,) = output.rglob("results_*.json")
    results = json.loads(path.read_text())["results"]
    return {task: {k: v for k, v in values.items() if "," in k} for task, values in results.items()}


def rows(run):
    return json.loads((run / "publish" / "metrics" / "evaluations.json").read_text())


def entries(run, task=None, **fields):
    """Entries of the report by task or field."""
    found = [{**entry, "settings": details(entry)} for entry in read_report(run)["evaluations"]]
    return [e for e in found if task in (None, e["task"]) and all(e[k] == v for k, v in fields.items())]


def items(run, texts=False):
    return read_items(run / "publish" / "metrics" / ITEMS, texts)


def made_of(of_number):
    """The mean over the items of a number, and of a perplexity exp of it."""
    mean = np.average(of_number["value"], weights=of_number["weight"])
    return mean, np.exp(mean)


def numbers(run):
    return {(e["task"], e["metric"]): (e["value"], e["stderr"]) for e in entries(run)}


# ---- the numbers ----


def test_numbers_are_those_of_the_harness_on_the_exported_dense_model(cli, run, theirs):
    folder = run()
    done = cli(folder, "--tasks", ",".join(TASKS))
    assert done.code == 0, done.out
    found = numbers(folder)
    assert {task for task, _ in found} == set(TASKS) == set(theirs)
    for (task, metric), (value, stderr) in found.items():
        name, _, kept = metric.partition(",")
        kept = kept or "none"
        assert value == pytest.approx(theirs[task][f"{name},{kept}"], rel=1e-4), (task, metric)
        error = theirs[task][f"{name}_stderr,{kept}"]
        assert (stderr is None) == (error == "N/A")
        assert stderr is None or stderr == pytest.approx(error, rel=1e-4), (task, metric)
    assert sum(len(values) for values in theirs.values()) == 2 * len(found)
    # a formula, a bootstrap, none
    assert found["pairs", "acc"][1] > 0
    assert found["cloze", "perplexity"][1] > 0
    assert found["rolling", "bits_per_byte"][1] is None
    shots = entries(folder, "shots")[0]
    assert (shots["num_fewshot"], shots["step"], shots["task_version"], shots["limit"]) == (2, 3, 1.0, None)
    settings, about = shots["settings"], shots["about"]
    assert (settings["samples"], settings["context_length"]) == (24, CONTEXT)
    assert (about["chance"], about["form"]) == (0.5, "native")
    assert {e["metric"] for e in entries(folder, "generated")} == {"exact_match,whole", "exact_match,first"}
    # every number is made of its items, which are the documents
    table = items(folder)
    for entry in read_report(folder)["evaluations"]:
        of_number = items_of(table, entry)
        assert len(of_number) == 24
        assert of_number["group"].isna().all()
        perplexity = entry["metric"] == "perplexity"
        assert made_of(of_number)[perplexity] == pytest.approx(entry["value"], rel=1e-6), entry["metric"]
    assert set(table["step"]) == {3}
    assert table["settings"][0] == json.dumps(
        {"context_length": CONTEXT, "limit": None, "num_fewshot": 0, "seed": "0,1234,1234,1234"}
    )
    # the same documents in every task that reads them, in every metric
    assert table["item"].nunique() == 24
    assert set(table[table["metric"] == "acc"]["value"]) == {0.0, 1.0}


def test_the_harnesses_own_command_line_knows_our_models_and_tasks(
    trained, tasks, theirs, tmp_path, monkeypatch, capsys
):
    import lm_eval.tasks

    from hf_lowrank.cli import lm_eval as lm_eval_cli

    # without the harness's own folder, which takes seconds to read
    class Few(lm_eval_cli._TaskManager):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, include_defaults=False, **kwargs)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lm_eval.tasks.TaskManager)
    monkeypatch.setattr(lm_eval_cli, "_TaskManager", Few)

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["hf-lowrank", "lm-eval", *argv])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code

    model = ["--model", "hf-lowrank", "--model_args", f"pretrained={trained('sltrain')}"]
    assert call(*model, *harness_arguments(tasks, tmp_path)) == 0
    native = harness_results(tmp_path)
    for task, values in theirs.items():
        for key, value in values.items():
            assert native[task][key] == (value if value == "N/A" else pytest.approx(value, rel=1e-4)), (task, key)
    capsys.readouterr()
    assert call("ls", "groups", "--include_path", str(tasks)) == 0
    listed = capsys.readouterr().out
    assert "tiny_group" in listed
    assert call("run", "--model", "hf-lowrank", "--tasks", "pairs", "--model_args", "pretrained=x,dens=1") == 1
    assert call("run", "--no_such_flag", "1") == 2
    capsys.readouterr()
    assert call("--help") == 0
    assert "Language Model Evaluation Harness" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["sltrain", "relora", "lora"])
def test_native_and_dense_forms_give_the_same_answers(method, cli, run):
    folder = run(method)
    for form in ("native", "dense"):
        assert cli(folder, "--tasks", "pairs,cloze", "--form", form, "--bootstrap-iters", 100).code == 0
    forms = {form: [e for e in entries(folder) if e["about"]["form"] == form] for form in ("native", "dense")}
    assert len(forms["native"]) == len(forms["dense"]) == 4
    for native, dense in zip(forms["native"], forms["dense"], strict=True):
        assert native["metric"] == dense["metric"]
        assert native["value"] == pytest.approx(dense["value"], rel=1e-4)
        assert native["stderr"] == pytest.approx(dense["stderr"], rel=1e-4)


def test_a_model_without_a_dense_form_is_evaluated_as_trained(cli, run):
    folder = run("cola")
    assert cli(folder, "--tasks", "pairs").code == 0
    assert entries(folder, "pairs")[0]["about"]["form"] == "native"
    refused = cli(folder, "--tasks", "pairs", "--form", "dense")
    assert refused.code == 1
    assert "no dense form" in refused.out


def test_seeds_draw_other_examples_and_agree_within_their_standard_errors(cli, run):
    folder = run()
    assert cli(folder, "--tasks", "pairs,shots", "--seeds", "42,43,44,45,46").code == 0
    of_seeds = {
        task: [r for r in rows(folder) if r["task"] == task and r["metric"] == "acc"] for task in ("pairs", "shots")
    }
    # without examples a seed changes nothing, and the standard error is that of one
    same = {(r["value"], r["stderr"]) for r in of_seeds["pairs"]}
    assert [r["settings"]["seed"] for r in of_seeds["pairs"]] == [42, 43, 44, 45, 46]
    assert len(same) == 1
    (pairs,) = entries(folder, "pairs", metric="acc")
    assert (pairs["value"], pairs["stderr"]) == pytest.approx(same.pop())
    assert pairs["settings"]["seeds"] == [42, 43, 44, 45, 46]
    # with examples they differ, by no more than chance allows
    values = np.array([r["value"] for r in of_seeds["shots"]])
    errors = np.array([r["stderr"] for r in of_seeds["shots"]])
    assert len(set(values)) > 1
    gaps = np.abs(values[:, None] - values[None, :]) / np.sqrt(errors[:, None] ** 2 + errors[None, :] ** 2)
    assert gaps.max() < 3
    (shots,) = entries(folder, "shots")
    assert shots["value"] == pytest.approx(values.mean())
    assert shots["stderr"] == pytest.approx(np.sqrt((errors**2).mean() + values.var(ddof=1) / 5))
    # items of the seeds stay apart, and together they make up the number
    table = items(folder)
    of_task = table[(table["task"] == "shots")]
    assert [json.loads(s)["seed"] for s in of_task["settings"].unique()] == [42, 43, 44, 45, 46]
    assert of_task.groupby("settings", sort=False)["value"].mean().tolist() == pytest.approx(values.tolist())
    (entry,) = [e for e in read_report(folder)["evaluations"] if e["task"] == "shots"]
    assert made_of(items_of(table, entry))[0] == pytest.approx(values.mean())
    assert items_of(table[table["item"] != of_task["item"].iloc[0]], entry)["item"].nunique() == 23
    assert items_of(table.drop(of_task.index[0]), entry) is None, "an item of one seed is missing"


def test_a_group_has_the_harnesses_mean_over_its_tasks(cli, run):
    folder = run()
    assert cli(folder, "--tasks", "tiny_group", "--limit", 10).code == 0
    (group,) = entries(folder, "tiny_group")
    parts = [entries(folder, name, metric="acc")[0] for name in ("pairs", "shots")]
    assert group["value"] == pytest.approx(sum(p["value"] for p in parts) / 2)
    assert group["task_version"] == "3"
    assert group["limit"] == 10
    assert group["settings"]["samples"] == 20
    of_group = items_of(
        items(folder), next(e for e in read_report(folder)["evaluations"] if e["task"] == "tiny_group")
    )
    assert made_of(of_group)[0] == pytest.approx(group["value"])
    assert [name.partition("/")[0] for name in of_group["item"]] == ["pairs"] * 10 + ["shots"] * 10
    again = cli(folder, "--tasks", "tiny_group", "--limit", 10)
    assert again.code == 0
    assert "tiny_group" in again.out


def test_items_that_share_their_answers_have_a_clustered_error(cli, run):
    folder = run()
    assert cli(folder, "--tasks", "hf_lowrank_cloze,hf_lowrank_words", "--limit", 16).code == 0
    by_task = {entry["task"]: entry for entry in read_report(folder)["evaluations"]}
    cloze, words = by_task["hf_lowrank_cloze"], by_task["hf_lowrank_words"]
    of_cloze = items_of(items(folder), cloze)
    right = of_cloze.groupby("group")["value"].sum().to_numpy()
    assert of_cloze.groupby("group").size().tolist() == [4] * 4
    assert cloze["stderr"] == pytest.approx(np.std(right, ddof=1) / np.sqrt(4) / 4)
    about = cloze["about"]
    assert (about["stderr"], about["groups"], about["dof"]) == ("over groups of items", 4, 3)
    assert "groups" not in words["about"]
    of_words = items_of(items(folder), words)
    assert of_words["group"].isna().all()
    assert words["stderr"] == pytest.approx(of_words["value"].sem())


def test_items_are_kept_with_what_was_asked_and_answered_where_that_is_wanted(cli, run, monkeypatch):
    folder = run()
    tasks = ("--tasks", "tiny_group,cloze,rolling,generated", "--limit", 6)
    assert cli(folder, *tasks).code == 0
    plain = items(folder, texts=True)
    assert "prompt" not in plain
    monkeypatch.setattr("hf_lowrank.downstream.evaluate.LARGEST_TEXTS", 100)
    refused = cli(folder, *tasks, "--log-items")
    assert refused.code == 2
    assert "more than the 0 MB that are published with its metrics: take a --limit" in refused.err
    monkeypatch.undo()
    done = cli(folder, *tasks, "--log_samples")
    assert "prompts, targets and answers have about 0.00" in " ".join(done.out.split())
    texts = items(folder, texts=True)
    assert texts[plain.columns].equals(plain), "the results are the same"
    kinds = {name: of_task.iloc[0] for name, of_task in texts.groupby("task")}
    pairs = texts[(texts["task"] == "pairs") & (texts["metric"] == "acc")]
    assert ((pairs["answer"] == pairs["target"]) == (pairs["value"] == 1)).all()
    assert (pairs["answer"].str.len() == 2).all()
    assert kinds["shots"]["prompt"].endswith(pairs["prompt"].iloc[0])
    assert len(kinds["shots"]["prompt"]) > 2 * len(pairs["prompt"].iloc[0])
    whole = texts[texts["metric"] == "exact_match,whole"]
    assert ((whole["answer"] == whole["target"]) == (whole["value"] == 1)).all()
    assert whole["answer"].nunique() > 1
    assert kinds["rolling"]["prompt"] == pairs["prompt"].iloc[0]
    # without the wish they stay
    again = cli(folder, *tasks)
    assert "before compression" not in again.out
    assert items(folder, texts=True).equals(texts)


# ---- what is kept and what is done again ----


def test_an_evaluation_that_was_killed_goes_on_with_the_next_task(cli, processes, tasks):
    process = processes.running["killed"]
    output, _ = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, output
    folder, log = processes.killed, tasks / "answered.log"
    assert [r["task"] for r in rows(folder)] == ["a", "b"]
    log.write_text("")
    arguments_ = (folder, "--tasks", "a,b,c,d,e")
    assert cli(*arguments_).code == 0
    assert sorted(set(log.read_text().split())) == ["c", "d", "e"]
    assert [e["task"] for e in entries(folder)] == ["a", "b", "c", "d", "e"]
    assert "| c | acc |" in (folder / "publish" / "README.md").read_text()
    log.write_text("")
    again = cli(*arguments_)
    assert (again.code, log.read_text()) == (0, "")
    # a tag stands for its tasks
    assert cli(folder, "--tasks", "letters").code == 0
    assert log.read_text() == ""
    # other settings are other evaluations
    assert cli(folder, "--tasks", "a", "--limit", 5).code == 0
    assert set(log.read_text().split()) == {"a"}


def test_a_crash_in_the_third_task_of_five_costs_that_task(cli, run, monkeypatch):
    folder = run()
    monkeypatch.setenv("FAIL_IN", "c")
    done = cli(folder, "--tasks", "a,b,c,d,e", "--limit", 4)
    assert done.code == 1
    assert "sltrain step 3 c: not evaluated: RuntimeError: this task is broken" in done.out
    assert [e["task"] for e in entries(folder)] == ["a", "b", "d", "e"]
    monkeypatch.delenv("FAIL_IN")
    assert cli(folder, "--tasks", "a,b,c,d,e", "--limit", 4).code == 0
    assert sorted(e["task"] for e in entries(folder)) == ["a", "b", "c", "d", "e"]


def test_checkpoints_limits_and_weights_are_told_apart(cli, run):
    folder = run()
    assert cli(folder, "--tasks", "pairs", "--checkpoints", "1,3", "--limit", 0.5).code == 0
    assert [(e["step"], e["limit"], e["settings"]["samples"]) for e in entries(folder, metric="acc")] == [
        (1, 0.5, 12),
        (3, 0.5, 12),
    ]
    # all of the items stand for part of them
    assert cli(folder, "--tasks", "pairs", "--checkpoints", "all").code == 0
    assert [(e["step"], e["limit"]) for e in entries(folder, metric="acc")] == [(1, None), (2, None), (3, None)]
    shutil.copy(folder / "checkpoint-1" / "model.safetensors", folder / "checkpoint-3" / "model.safetensors")
    done = cli(folder, "--tasks", "pairs")
    assert "of other weights at this step are dropped" in done.out
    first, _, third = (e["value"] for e in entries(folder, metric="acc"))
    assert first == third
    table = items(folder)
    whole = table[(table["metric"] == "acc") & table["settings"].str.contains('"limit": null')]
    values = [whole[whole["step"] == step]["value"].tolist() for step in (1, 3)]
    assert values[0] == values[1]
    # of the first two evaluations of part of the items nothing is left out and nothing is there twice
    assert sorted(json.loads(s)["limit"] or 0 for s in table["settings"].unique()) == [0, 0.5]
    # a damaged table costs the earlier items
    (folder / "publish" / "metrics" / ITEMS).write_text("PAR1")
    with pytest.raises(ValueError, match="not readable as results by item"):
        items(folder)
    assert cli(folder, "--tasks", "cloze", "--limit", 3).code == 0
    assert set(items(folder)["task"]) == {"cloze"}


def test_measuring_and_training_on_keep_what_was_evaluated(cli, run, monkeypatch):
    folder = run()
    assert cli(folder, "--tasks", "pairs", "--checkpoints", "all").code == 0
    monkeypatch.setattr("hf_lowrank.run.report.draw_figures", lambda publish: [])
    args = arguments(folder, max_steps=3, save_strategy="steps", save_steps=1, learning_rate=3e-2)

    def train(checkpoint):
        model = llama(max_position_embeddings=CONTEXT)
        trainer = make_trainer(METHODS["sltrain"], args, model, processing_class=tokenizer())
        lr.attach(trainer)
        trainer.train(resume_from_checkpoint=checkpoint)

    assert set(items(folder)["step"]) == {1, 2, 3}
    train(str(folder / "checkpoint-2"))
    assert {e["step"] for e in entries(folder)} == {1, 2}
    assert set(items(folder)["step"]) == {1, 2}
    train(None)
    assert entries(folder) == []
    assert not (folder / "publish" / "metrics" / ITEMS).exists()


def test_a_published_repo_is_evaluated_into_a_folder_of_its_own(cli, run, hub, tmp_path, monkeypatch):
    folder = run()
    assert cli(folder, "--tasks", "cloze", "--bootstrap-iters", 50).code == 0
    lr.push(folder, repo_id="user/tiny")
    assert f"metrics/{ITEMS}" in hub.repo("user/tiny").files()
    assert f"metrics/{ITEMS}" in hub.repo("user/tiny").files("step-3")
    monkeypatch.chdir(tmp_path)
    assert cli("user/tiny@step-3", "--tasks", "pairs").code == 0
    output = tmp_path / "measured" / "user--tiny"
    assert {e["task"] for e in entries(output)} == {"cloze", "pairs"}
    assert read_report(output)["metrics"] == read_report(folder)["metrics"]
    assert (output / "publish" / "README.md").is_file()


# ---- what cannot be evaluated ----


def test_a_task_that_needs_the_network_is_one_line_and_the_others_go_on(cli, run, go_offline, monkeypatch):
    folder = run()
    go_offline()
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    done = cli(folder, "--tasks", "remote,pairs", "--limit", 4)
    assert done.code == 1
    (line,) = [line for line in done.out.splitlines() if line.startswith("remote:")]
    assert "needs the data set somebody/questions, which is not in this machine's cache" in line
    assert "give the same command once where there is a network, or take tasks that need none" in line
    assert {e["task"] for e in entries(folder)} == {"pairs"}


def test_a_context_that_is_too_short_is_said_and_noted(cli, run):
    folder = run()
    done = cli(folder, "--tasks", "shots", "--max-length", 16)
    assert done.code == 0
    settings = entries(folder, "shots")[0]["about"]
    assert 0 < settings["truncated_requests"] <= settings["requests"] == 48
    assert f"{settings['truncated_requests']} of 48 requests are longer than 16 tokens and cut on the left" in done.out
    failed = cli(folder, "--tasks", "generated", "--max-length", 4)
    assert failed.code == 1
    assert "answers of 5 tokens do not fit into the model's context of 4" in failed.out


def test_an_unknown_task_is_refused_before_anything_is_loaded(cli, tasks, monkeypatch):
    monkeypatch.setattr("hf_lowrank.downstream.evaluate.open_runs", None)
    refused = cli("nowhere", "--tasks", "pairs,arc_eazy")
    assert refused.code == 2
    assert refused.err.startswith("error: no task 'arc_eazy' (did you mean 'arc_easy'?)")
    assert refused.err.count("\n") == 1
    refused = cli("nowhere", "--tasks", "unfinished")
    assert refused.code == 2
    assert "group 'unfinished': no task 'hf_lowrank_word' (did you mean 'hf_lowrank_words'?)" in refused.err
    # the study's names are the harness's
    from hf_lowrank.downstream.request import read_requests

    _, requests = read_requests(["study", "pairs"], (tasks,))
    assert len(requests) == 21
    blimp = next(request for request in requests if request.name == "blimp")
    assert len(blimp.leaves) == 67
    assert [s.seed for s in blimp.settings] == [42, 43, 44, 45, 46]
    assert {(s.num_fewshot, s.bootstrap_iterations) for s in blimp.settings} == {(0, 1000)}
    assert [s.seed for s in requests[-1].settings] == [None]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tasks", ","], "no task to evaluate"),
        (["--tasks", "pairs", "--limit", "0"], "limit 0"),
        (["--tasks", "pairs", "--seeds", "a"], "--seeds a"),
        (["--tasks", "pairs", "--checkpoints", "7"], "no checkpoint of step 7; it has 1, 2, 3"),
        (["--tasks", "pairs", "--checkpoints", "first"], "give last, all or whole numbers"),
        (["--tasks", "pairs", "--form", "densse"], "did you mean 'dense'?"),
        (["--tasks", "pairs", "--batch-size", "0"], "--batch-size 0"),
        (["--tasks", "pairs", "--include-path", "nowhere"], "nowhere: there is no such folder"),
    ],
)
def test_what_cannot_be_meant_is_one_line(argv, message, cli, trained):
    refused = cli(trained("sltrain"), *argv)
    assert refused.code == 2
    assert message in refused.err
    assert refused.err.count("\n") == 1


def test_a_tokenizer_that_appends_its_end_does_not_cost_the_answers_their_first_token(trained):
    from hf_lowrank.downstream.model import LowRankLM
    from hf_lowrank.hub.load import from_pretrained

    plain, ending = tokenizer(), tokenizer()
    from tokenizers.processors import TemplateProcessing

    ending.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    assert ending.encode("a")[-1] == 0
    model = from_pretrained(trained("sltrain"))
    pairs = [LowRankLM(model, t, batch_size=2)._encode_pair("abc", "de") for t in (plain, ending)]
    assert pairs[0] == pairs[1]
    assert len(pairs[0][1]) == 2


def test_a_model_that_sees_its_answers_is_refused():
    pytest.importorskip("lm_eval")
    from transformers import BertConfig, BertLMHeadModel

    from hf_lowrank.downstream.model import LowRankLM

    words = tokenizer()
    sizes = dict(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    with pytest.raises(ValueError, match="BertLMHeadModel sees later tokens"):
        LowRankLM(BertLMHeadModel(BertConfig(**sizes)), words)
    LowRankLM(BertLMHeadModel(BertConfig(**sizes, is_decoder=True)), words)
