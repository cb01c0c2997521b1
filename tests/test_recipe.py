"""recipes/pretrain.py from its command line: what it leaves on disk, how it goes on, what it refuses.

The fast part calls the recipe's `main` in this process, on a small text and a model of 20 thousand parameters.
"""

import contextlib
import importlib.util
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import hf_lowrank as lr
import hf_lowrank.run.report
from hf_lowrank.methods import METHODS as ALL_METHODS
from hf_lowrank.report.io import read_report, write_report

RECIPE = Path(__file__).parents[1] / "recipes" / "pretrain.py"
METHODS = ("fullrank", "galore", "sltrain")
OWN = {"fullrank": [], "galore": ["--r", "4", "--update_proj_gap", "3"], "sltrain": ["--r", "4", "--sparsity", "0.1"]}
STEPS, SAVED_AT, LENGTH, BATCH, EVALUATED = 4, 2, 32, 4, 7
MATRICES = 14
PERPLEXITY = {"eval_perplexity": "value", "eval_perplexity_stderr": "stderr"}


@pytest.fixture(scope="module")
def recipe():
    """The recipe as a module."""
    spec = importlib.util.spec_from_file_location("pretrain", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A text of 150 paragraphs, an empty one, and configs of small models."""
    folder = tmp_path_factory.mktemp("inputs")
    generator = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"]
    paragraphs = [" ".join(generator.choice(words) for _ in range(40)) for _ in range(150)]
    (folder / "text.txt").write_text("\n\n".join(paragraphs))
    (folder / "empty.txt").write_text("")
    (folder / "empty.jsonl").write_text("")
    (folder / "blank.jsonl").write_text('{"text": " "}\n{"text": ""}\n')
    shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    LlamaConfig(vocab_size=512, max_position_embeddings=64, **shape).save_pretrained(folder / "model")
    LlamaConfig(vocab_size=100, max_position_embeddings=64, **shape).save_pretrained(folder / "few-ids")
    LlamaConfig(vocab_size=512, max_position_embeddings=16, **shape).save_pretrained(folder / "short")
    return folder


def flags(inputs, method="galore", **changes):
    """A command line for a short run; `changes` replaces flags, None drops one."""
    values = {
        "method": method,
        "dataset_path": inputs / "text.txt",
        "validation_fraction": 0.2,
        "max_eval_sequences": EVALUATED,
        "vocab_size": 512,
        "sequence_length": LENGTH,
        "model_config": inputs / "model",
        "max_steps": STEPS,
        "warmup_steps": 1,
        "total_batch_size": BATCH,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": 4,
        "logging_steps": 1,
        "save_steps": SAVED_AT,
        "eval_steps": SAVED_AT,
        "metrics_every": SAVED_AT,
        "report_to": "none",
        "cpu_threads": 1,
        "use_cpu": "true",
        **changes,
    }
    return OWN.get(method, []) + [f"--{key}={value}" for key, value in values.items() if value is not None]


def call(recipe, argv):
    """Run `main`: exit code (0 when it returns), standard output and error."""
    out, err, threads = io.StringIO(), io.StringIO(), torch.get_num_threads()
    code = 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["pretrain.py", *map(str, argv)])
        try:
            recipe.main()
        except SystemExit as stop:
            code = stop.code
        finally:
            torch.set_num_threads(threads)
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


@pytest.fixture
def without_figures(monkeypatch):
    """Figures take most of a short run's time, and tests/report/test_figures.py looks at them."""
    monkeypatch.setattr(hf_lowrank.run.report, "draw_figures", lambda publish: [])


def state_of(folder):
    """Path, size and time of everything below a folder; None where there is no folder."""
    if not folder.exists():
        return None
    paths = [folder, *sorted(folder.rglob("*"))]
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}


@pytest.fixture(scope="module")
def finished(recipe, inputs, tmp_path_factory):
    """The three methods' runs: method -> folder and what the recipe printed."""
    runs = {}
    for method in METHODS:
        folder = tmp_path_factory.mktemp("runs") / method
        with pytest.MonkeyPatch.context() as patch:
            if method != "galore":
                patch.setattr(hf_lowrank.run.report, "draw_figures", lambda publish: [])
            done = call(recipe, flags(inputs, method, output_dir=folder))
        assert done.code == 0, done.err
        runs[method] = SimpleNamespace(folder=folder, out=done.out, err=done.err)
    return runs


@pytest.fixture
def held(finished, tmp_path):
    """A copy of the finished GaLore run, to see that it is left alone."""
    shutil.copytree(finished["galore"].folder, tmp_path / "held", copy_function=shutil.copy2)
    return tmp_path / "held"


@pytest.mark.parametrize("best", [False, True])
def test_a_finished_run_is_left_alone(best, recipe, inputs, held):
    def state():
        return {path.relative_to(held): path.read_bytes() for path in held.rglob("*") if path.is_file()}

    if best:
        # its report is of an earlier step than its last
        report = read_report(held / "publish")
        facts = {"steps": 2, "best_of": {"steps": STEPS, "metric": "eval_loss"}}
        write_report({**report, "run": {**report.run, **facts}}, held / "publish" / "report.json")
    before = state()
    done = call(recipe, flags(inputs, "galore", output_dir=held, resume_from_checkpoint="last"))
    assert (done.code, state() == before) == (0, True)
    assert f"is the last of {STEPS} steps: nothing to do" in done.out


def refused(recipe, argv, folders, tmp_path, monkeypatch):
    """The one line a command line is refused with; nothing below `folders` and the working folder has changed."""
    cwd = tmp_path / "cwd"
    cwd.mkdir(exist_ok=True)
    monkeypatch.chdir(cwd)
    before = [state_of(folder) for folder in (cwd, *folders)]
    done = call(recipe, argv)
    assert [state_of(folder) for folder in (cwd, *folders)] == before
    assert done.code == 2, done.err
    # `datasets` shows its progress on standard error as well
    lines = [line for line in done.err.splitlines() if line.strip()]
    assert "Traceback" not in done.err
    assert lines[-1].startswith("error: "), lines
    assert sum("error:" in line for line in lines) == 1
    return lines[-1]


def test_a_warm_start(recipe, inputs, finished, tmp_path, monkeypatch):
    run = shutil.copytree(finished["fullrank"].folder, tmp_path / "source")
    source = run / f"checkpoint-{SAVED_AT}"
    argv = flags(inputs, "galore", init_from=source, validation_fraction=0.3, output_dir=tmp_path / "other")
    said = refused(recipe, argv, [run], tmp_path, monkeypatch)
    assert "was trained with another tokenizer (hash" in said
    assert said.endswith("give its tokenizer with --tokenizer_name")
    done = call(recipe, flags(inputs, "galore", init_from=source, output_dir=tmp_path / "warm"))
    assert done.code == 0, done.err
    # its source is not needed to go on
    shutil.rmtree(source)
    last = flags(inputs, "galore", init_from=source, output_dir=tmp_path / "warm", resume_from_checkpoint="last")
    (tmp_path / "warm" / "publish" / "report.json").unlink()
    shutil.rmtree(tmp_path / "warm" / f"checkpoint-{STEPS}")
    done = call(recipe, last)
    assert done.code == 0, done.err
    start = read_report(tmp_path / "warm").run.init_from
    assert (start.source, start.method, start.step, start.form) == (str(source), "fullrank", SAVED_AT, "dense")


# ---- what is refused before training ----

BAD = {
    "unknown method": ({"method": "galor"}, ["unknown method 'galor'", "did you mean 'galore'?"]),
    "unknown flag": ({"learning_rat": 1}, ["unknown flag '--learning_rat=1'", "did you mean 'learning_rate'?"]),
    "another method's flag": ({"sparsity": 0.1}, ["it is a setting of sltrain, not of galore"]),
    "missing file": ({"dataset_path": "missing.txt"}, ["'missing.txt' does not exist"]),
    "empty file": ({"dataset_path": "INPUTS/empty.txt"}, ["'empty.txt' is empty"]),
    "empty data set": ({"dataset_path": "INPUTS/empty.jsonl"}, ["empty.jsonl' is empty"]),
    "blank documents": ({"dataset_path": "INPUTS/blank.jsonl"}, ["all its documents are blank"]),
    "sequence longer than the data": ({"sequence_length": 10**6}, ["tokens, sequence_length is 1000000"]),
    "sequence longer than the model": ({"model_config": "INPUTS/short"}, ["sequence_length=32", "16 positions"]),
    "vocabulary mismatch": (
        {"model_config": "INPUTS/few-ids"},
        ["the tokenizer gives ids up to", "vocabulary of 100"],
    ),
    "missing model config": ({"model_config": "/no/such"}, ["unknown model '/no/such'"]),
    "unknown model size": ({"model_config": None, "model_size": "61m"}, ["--model_size 61m", "did you mean '60m'?"]),
    "batch that cannot be split": (
        {"total_batch_size": 10, "per_device_train_batch_size": 4},
        ["--total_batch_size 10 is no multiple of 4"],
    ),
    "rank above min(m, n)": ({"r": 17}, ["r=17 is above min(m, n) = 16 of layer model.layers.0.self_attn.q_proj"]),
    "no layer matches": (
        {"target_modules": "query"},
        ["no layer matches target_modules=['query']", "self_attn.q_proj, self_attn.k_proj", "mlp.down_proj, lm_head"],
    ),
    "no such pattern": ({"target_modules": "("}, ["target_modules='(' is no regular expression"]),
    "rate that is no number": ({"learning_rate": "nan"}, ["--learning_rate nan"]),
    "negative rate": ({"learning_rate": -1}, ["--learning_rate -1.0"]),
    "no steps": ({"max_steps": "0"}, ["--max_steps 0: give 1 or more"]),
    "word for a number": ({"max_steps": "abc"}, ["--max_steps", "'abc'"]),
    "reporter that is not installed": ({"report_to": "flyte"}, ["flytekit"]),
    "unknown reporter": ({"report_to": "tensorbord"}, ["tensorbord is not supported"]),
    "overwrite and resume": ({"overwrite": "true", "resume_from_checkpoint": "last"}, ["exclude each other"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_overwrites_nothing(case, recipe, inputs, held, tmp_path, monkeypatch):
    changes, parts = BAD[case]
    changes = {key: value and str(value).replace("INPUTS", str(inputs)) for key, value in changes.items()}
    argv = flags(inputs, **{"overwrite": "true", "output_dir": held, **changes})
    line = refused(recipe, argv, [held], tmp_path, monkeypatch)
    for part in parts:
        assert part in line
    assert (held / "publish" / "report.json").is_file()


def test_a_bad_yaml_file_is_one_line(recipe, inputs, tmp_path, monkeypatch):
    path = tmp_path / "recipe.yaml"
    path.write_text("learning_rte: 1e-2\n")
    line = refused(
        recipe, [path, *flags(inputs, output_dir=tmp_path / "run")], [tmp_path / "run"], tmp_path, monkeypatch
    )
    assert line == f"error: {path}: unknown key 'learning_rte' (did you mean 'learning_rate'?)"
    line = refused(recipe, ["missing.yaml"], [tmp_path / "run"], tmp_path, monkeypatch)
    assert line.startswith("error: 'missing.yaml': there is no such file")


def test_what_is_refused_while_parsing_says_nothing_else(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call(recipe, ["--method", "galor"])
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        f"error: unknown method 'galor' (did you mean 'galore'?); the methods are {', '.join(sorted(ALL_METHODS))}\n"
    )


def test_a_folder_that_holds_a_run_is_refused(recipe, inputs, held, tmp_path, monkeypatch):
    line = refused(recipe, flags(inputs, output_dir=held), [held], tmp_path, monkeypatch)
    assert f"{held} already holds a run" in line
    for way_out in ("--resume_from_checkpoint last", "--overwrite", "--output_dir"):
        assert way_out in line


@pytest.mark.parametrize("part", ["publish", "checkpoint-2", "spectral_snapshots"])
def test_a_part_of_a_run_is_a_run(part, recipe, inputs, held, tmp_path, monkeypatch):
    for path in held.iterdir():
        if path.name != part:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    line = refused(recipe, flags(inputs, output_dir=held), [held], tmp_path, monkeypatch)
    assert f"already holds a run ({part})" in line


def cut(path):
    """Leave half of a file, as a full disk or a kill does."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"])
@pytest.mark.parametrize("damage", [cut, Path.unlink], ids=["cut", "missing"])
def test_a_damaged_checkpoint_is_refused(name, damage, recipe, inputs, held, tmp_path, monkeypatch):
    checkpoint = held / "checkpoint-4"
    damage(checkpoint / name)
    argv = flags(inputs, output_dir=held, resume_from_checkpoint=checkpoint)
    line = refused(recipe, argv, [held], tmp_path, monkeypatch)
    assert str(checkpoint) in line
    assert name in line


@pytest.mark.parametrize("name", ["no-such-folder", "publish"])
def test_what_is_no_checkpoint_is_refused(name, recipe, inputs, held, tmp_path, monkeypatch):
    argv = flags(inputs, output_dir=held, resume_from_checkpoint=held / name)
    assert str(held / name) in refused(recipe, argv, [held], tmp_path, monkeypatch)


@pytest.mark.parametrize("where", ["last", "by name"])
@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("sltrain", [], "method is 'galore' there, 'sltrain' here"),
        ("fullrank", [], "method is 'galore' there, 'fullrank' here"),
        ("galore", ["--r=5"], "r is 4 there, 5 here"),
        ("galore", ["--scale=0.5"], "scale is 0.25 there, 0.5 here"),
    ],
)
def test_another_methods_checkpoint_is_refused(
    method, changes, message, where, recipe, inputs, held, tmp_path, monkeypatch
):
    resume = "last" if where == "last" else held / "checkpoint-2"
    argv = flags(inputs, method, output_dir=held, resume_from_checkpoint=resume) + changes
    line = refused(recipe, argv, [held], tmp_path, monkeypatch)
    assert "belongs to another run" in line
    assert message in line


def test_another_sparse_support_is_refused(recipe, inputs, finished, tmp_path, monkeypatch):
    folder = tmp_path / "held"
    shutil.copytree(finished["sltrain"].folder, folder)
    argv = flags(inputs, "sltrain", output_dir=folder, resume_from_checkpoint="last", seed=7)
    assert "belongs to another run" in refused(recipe, argv, [folder], tmp_path, monkeypatch)


# ---- what a run leaves behind ----


def dense_names(folder):
    return set(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_the_folder_that_the_design_describes(method, finished):
    folder = finished[method].folder
    assert {path.name for path in folder.iterdir()} == {
        "checkpoint-2",
        "checkpoint-4",
        "evaluation.parquet",
        "publish",
        "spectral_snapshots",
    }
    publish = folder / "publish"
    expected = {
        "README.md",
        "report.json",
        "metrics",
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "lowrank_config.json",
        *(["figures"] if method == "galore" else []),
        *(["native"] if method == "sltrain" else []),
    }
    assert {path.name for path in publish.iterdir()} == expected
    assert {path.name for path in (publish / "metrics").iterdir()} == {
        "spectral.json",
        "spectral.parquet",
        "training.parquet",
        "validation.json",
        "validation.samples.parquet",
    }
    assert not [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".partial"))]
    for step in (2, 4):
        lr.check_checkpoint(folder / f"checkpoint-{step}")
        config = json.loads((folder / f"checkpoint-{step}" / "config.json").read_text())
        assert config["lowrank"]["method"] == method
        loaded = torch.load(folder / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)
        assert loaded["state"]
    card = (publish / "README.md").read_text()
    assert card.startswith("---\n")
    assert {"fullrank": "full-rank", "galore": "GaLore", "sltrain": "SLTrain"}[method] in card


def test_figures_are_png_files(finished):
    figures = sorted((finished["galore"].folder / "publish" / "figures").iterdir())
    assert [path.name for path in figures] == ["loss.png", "spectra_over_depth.png", "spectra_over_steps.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for path in figures)
    card = (finished["galore"].folder / "publish" / "README.md").read_text()
    assert all(f"figures/{path.name}" in card for path in figures)


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_published_as_trained_and_dense(method, finished):
    folder = finished[method].folder
    trained = load_file(folder / "checkpoint-4" / "model.safetensors")
    again = lr.from_pretrained(folder)
    for name, tensor in trained.items():
        assert torch.equal(again.state_dict()[name], tensor), name
    plain = AutoModelForCausalLM.from_pretrained(folder / "publish").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "publish")
    ids = tokenizer("alpha beta gamma delta", return_tensors="pt").input_ids
    with torch.no_grad():
        assert (plain(ids).logits - again(ids).logits).abs().max() < 1e-4
    assert any("sparse_values" in name for name in trained) == (method == "sltrain")
    assert not any("sparse_values" in name for name in dense_names(folder / "publish"))


@pytest.mark.parametrize("method", METHODS)
def test_the_report_says_what_was_run(method, finished, inputs):
    folder = finished[method].folder
    report = read_report(folder / "publish")
    run = report["run"]
    assert (run["name"], run["method"], run["steps"], run["max_steps"]) == (method, method, STEPS, STEPS)
    assert run["tokens_seen"] == STEPS * BATCH * LENGTH
    assert run["world_size"] == 1
    assert run["batch"] == {"per_device": 4, "gradient_accumulation": 1, "world_size": 1, "global_sequences": 4}
    assert run["model"]["parameters"] == sum(p.numel() for p in lr.from_pretrained(folder).parameters())
    assert run["optimizer_state_bytes"]["measured"] == run["optimizer_state_bytes"]["predicted"] > 0
    assert run["wall_time_seconds"] > 0
    assert run["command"][:3] == ["accelerate", "launch", "recipes/pretrain.py"]
    assert f"--method={method}" in run["command"]
    assert str(folder) not in report.model_dump_json()
    rank = {"fullrank": None, "galore": 4, "sltrain": 4}[method]
    assert run["method_config"].get("r") == rank
    assert report["data"]["sequence_length"] == LENGTH
    assert report["data"]["name"] == "text.txt"


@pytest.mark.parametrize("method", METHODS)
def test_the_report_holds_validation_and_spectra(method, finished):
    folder = finished[method].folder
    metrics = read_report(folder / "publish")["metrics"]
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    evaluated = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    named = {entry["name"]: entry for entry in metrics if entry["step"] == STEPS}
    # Trainer's is a mean of batch means; all rows are equally long here, but the last batch is smaller
    assert named["validation_loss"]["value"] == pytest.approx(evaluated[-1], rel=1e-5)
    assert named["validation_loss"]["stderr"] > 0
    # through `evaluate`, in Trainer's own log
    logged = {key: [entry[key] for entry in state["log_history"] if key in entry] for key in PERPLEXITY}
    assert [len(values) for values in logged.values()] == [len(evaluated)] * 2
    for key, part in PERPLEXITY.items():
        assert named["perplexity"][part] == pytest.approx(logged[key][-1], rel=1e-5)
    assert named["validation_loss"]["settings"]["sequences"] == EVALUATED
    assert named["validation_loss"]["settings"]["tokens"] == EVALUATED * (LENGTH - 1)
    assert {entry["step"] for entry in metrics if entry["name"] == "spectral/weight/stable_rank"} == {0, 2, 4}
    rows = pd.read_parquet(folder / "publish" / "metrics" / "spectral.parquet")
    assert rows.groupby("step").size().to_dict() == {0: MATRICES, 2: MATRICES, 4: MATRICES}
    assert rows["error"].isna().all()
    curve = pd.read_parquet(folder / "publish" / "metrics" / "training.parquet").set_index("step")
    assert curve["loss"].notna().sum() == STEPS
    assert curve["eval_loss"].dropna().tolist() == pytest.approx(evaluated)


@pytest.mark.parametrize("method", METHODS)
def test_sizes_are_shown_before_and_after(method, finished):
    out = " ".join(finished[method].out.split())
    assert "target layers" in out
    assert "self_attn.q_proj" in out
    assert "parameters trained" in out
    assert "optimizer state predicted" in out
    assert out.index("target layers") < out.index("Optimizer state (AdamW's:")
    assert f"settings from {RECIPE.parent / 'configs' / 'tiny' / f'{method}.yaml'}" in out
    assert f"step {STEPS}/{STEPS} loss" in out
    assert "{" not in out, "a line a log, not a dictionary"
    assert "%|" not in finished[method].err, "no bars in a file"


# ---- going on, and starting anew ----


def files_equal(a, b, *names):
    for name in names:
        mine, theirs = load_file(a / name), load_file(b / name)
        assert mine.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert torch.equal(mine[key], tensor), (name, key)


def optimizers_equal(a, b):
    mine, theirs = (torch.load(folder / "optimizer.pt", weights_only=True)["state"] for folder in (a, b))
    assert mine.keys() == theirs.keys()
    for index, state in theirs.items():
        assert mine[index].keys() == state.keys()
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(mine[index][key]), torch.as_tensor(value)), (index, key)


def losses(checkpoint):
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return [(entry["step"], entry["loss"]) for entry in state["log_history"] if "loss" in entry]


HOW = {"galore": "last", "sltrain": "checkpoint-2", "fullrank": "true"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("without_figures")
def test_a_run_goes_on_from_its_last_checkpoint_and_can_be_overwritten(method, recipe, inputs, finished, tmp_path):
    whole, folder = finished[method].folder, tmp_path / "again"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoint-4")
    resume = folder / HOW[method] if "-" in HOW[method] else HOW[method]
    done = call(recipe, flags(inputs, method, output_dir=folder, resume_from_checkpoint=resume))
    assert done.code == 0, done.err
    assert f"going on from {folder / 'checkpoint-2'}" in done.out
    files_equal(folder, whole, "checkpoint-4/model.safetensors", "publish/model.safetensors")
    optimizers_equal(folder / "checkpoint-4", whole / "checkpoint-4")
    assert losses(folder / "checkpoint-4") == losses(whole / "checkpoint-4")
    mine, theirs = read_report(folder / "publish"), read_report(whole / "publish")
    assert (mine["run"]["steps"], mine["run"]["tokens_seen"]) == (STEPS, theirs["run"]["tokens_seen"])
    assert mine["run"]["wall_time_seconds"] > 0
    spectra = [r for r in mine["metrics"] if r["name"].startswith(("spectral/weight", "validation", "perplexity"))]
    assert spectra == [
        r for r in theirs["metrics"] if r["name"].startswith(("spectral/weight", "valid", "perplexity"))
    ]

    before = load_file(folder / "publish" / "model.safetensors")
    argv = flags(inputs, method, output_dir=folder, overwrite="true", seed=3, save_steps=3, max_steps=3, eval_steps=3)
    (folder / "notes.txt").write_text("mine")
    card = folder / "publish" / "README.md"
    card.write_text(card.read_text() + "Mine.\n")
    done = call(recipe, argv)
    assert done.code == 0, done.err
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-3"]
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "README.edited.md").read_text().endswith("Mine.\n")
    assert "Mine." not in card.read_text()
    report = read_report(folder / "publish")
    assert (report["run"]["steps"], report["run"]["seeds"]["seed"]) == (3, 3)
    assert report["run"]["tokens_seen"] == 3 * BATCH * LENGTH
    assert {entry["step"] for entry in report["metrics"] if entry["step"] is not None} <= {0, 2, 3}
    after = load_file(folder / "publish" / "model.safetensors")
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])


def test_last_is_refused_where_no_checkpoint_is_complete(recipe, inputs, held, tmp_path, monkeypatch):
    # starting anew would overwrite what may still be mended
    for checkpoint in held.glob("checkpoint-*"):
        cut(checkpoint / "model.safetensors")
    argv = flags(inputs, output_dir=held, resume_from_checkpoint="last")
    line = refused(recipe, argv, [held], tmp_path, monkeypatch)
    assert f"{held / 'checkpoint-4'} is cut short: model.safetensors" in line


@pytest.mark.usefixtures("without_figures")
def test_last_skips_a_checkpoint_that_a_kill_cut_short(recipe, inputs, finished, tmp_path, caplog):
    whole, folder = finished["fullrank"].folder, tmp_path / "killed"
    shutil.copytree(whole, folder)
    cut(folder / "checkpoint-4" / "optimizer.pt")
    done = call(recipe, flags(inputs, "fullrank", output_dir=folder, resume_from_checkpoint="last"))
    assert done.code == 0, done.err
    assert f"{folder / 'checkpoint-4'} is cut short: optimizer.pt" in caplog.text
    assert f"going on from {folder / 'checkpoint-2'}" in done.out
    files_equal(folder, whole, "checkpoint-4/model.safetensors")
    optimizers_equal(folder / "checkpoint-4", whole / "checkpoint-4")


@pytest.mark.usefixtures("without_figures")
def test_last_starts_where_there_is_nothing_to_go_on_from(recipe, inputs, finished, tmp_path):
    # so that a job's command line is the same for its first start and for every restart
    folder = tmp_path / "run"
    done = call(recipe, flags(inputs, "fullrank", output_dir=folder, resume_from_checkpoint="last"))
    assert done.code == 0, done.err
    assert "going on from" not in done.out
    files_equal(folder, finished["fullrank"].folder, "checkpoint-4/model.safetensors")


# ---- many processes ----


def environment(**changes):
    """The environment of a recipe in a subprocess: no network, one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **changes}


@pytest.mark.slow
def test_a_real_process_ends_with_code_2_and_one_line(tmp_path):
    command = [sys.executable, str(RECIPE), "--learning_rat", "1"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: unknown flag '--learning_rat' (did you mean 'learning_rate'?)\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_embedded_default_learns(tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", str(RECIPE)]
    started = time.monotonic()
    done = subprocess.run(
        launch, cwd=tmp_path, env=environment(HF_HOME=str(tmp_path / "hf")), capture_output=True, text=True
    )
    print(f"the embedded default took {time.monotonic() - started:.0f} s")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "step 140/140" in done.stdout, "one line a log"
    folder = tmp_path / "runs" / "tiny-galore"
    assert {path.name for path in folder.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (70, 140)}
    for checkpoint in folder.glob("checkpoint-*"):
        lr.check_checkpoint(checkpoint)
    publish = folder / "publish"
    assert {path.name for path in publish.iterdir()} >= {
        "README.md",
        "report.json",
        "metrics",
        "figures",
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "lowrank_config.json",
    }
    report = read_report(publish)
    assert report["run"]["method_config"]["r"] == 32
    assert report["run"]["tokens_seen"] == 140 * 16 * 256
    assert report["run"]["optimizer_state_bytes"]["measured"] == report["run"]["optimizer_state_bytes"]["predicted"]
    values = {entry["name"]: entry["value"] for entry in report["metrics"] if entry["step"] == 140}
    print(f"validation loss {values['validation_loss']:.3f}, perplexity {values['perplexity']:.1f}")
    assert values["validation_loss"] < 4.2
    state = json.loads((folder / "checkpoint-140" / "trainer_state.json").read_text())
    evaluated = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    assert evaluated[-1] < 4.2
    assert values["validation_loss"] == pytest.approx(evaluated[-1], rel=1e-4)
    ids = AutoTokenizer.from_pretrained(publish)("import os\n", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.isfinite(AutoModelForCausalLM.from_pretrained(publish)(ids).logits).all()


# every command line in one launch, since a launch takes longer than the training; what a process other than the
# first opens for writing, removes or renames below the runs is written down
MANY = """
import importlib.util, json, os, sys

recipe, runs, notes, commands = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
rank = int(os.environ["RANK"])
touched = []

def watch(event, args):
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if rank and (writes or event in ("os.rename", "os.remove", "os.rmdir")) and runs in str(args[0]):
        touched.append([event, str(args[0])])

sys.addaudithook(watch)
spec = importlib.util.spec_from_file_location("pretrain", recipe)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for command in commands:
    sys.argv = [recipe, *command]
    module.main()
with open(os.path.join(notes, f"{rank}.json"), "w") as file:
    json.dump(touched, file)
"""


@pytest.fixture(scope="module")
def two_processes(inputs, tmp_path_factory):
    """The three methods' runs of `finished`, each by two processes: method -> folder; and what process 1 touched."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "many.py").write_text(MANY)
    runs, notes = folder / "runs", folder / "notes"
    notes.mkdir()
    changes = {"per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    commands = [flags(inputs, method, output_dir=runs / method, **changes) for method in METHODS]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(folder / "many.py"), str(RECIPE), str(runs), str(notes), json.dumps(commands)]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    touched = json.loads((notes / "1.json").read_text())
    return SimpleNamespace(runs=runs, out=done.stdout, touched=touched, cwd=folder)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_what_one_does(method, finished, two_processes):
    one, two = finished[method].folder, two_processes.runs / method
    mine, theirs = (load_file(folder / "checkpoint-4" / "model.safetensors") for folder in (two, one))
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if tensor.is_floating_point():
            assert (mine[name] - tensor).norm() <= 1e-3 * tensor.norm(), name
        else:
            assert torch.equal(mine[name], tensor), name
    values = []
    for folder in (one, two):
        report = read_report(folder / "publish")
        found = {entry["name"]: entry for entry in report["metrics"] if entry["step"] == STEPS}
        values.append([found["validation_loss"], found["perplexity"]])
        assert report["run"]["tokens_seen"] == STEPS * BATCH * LENGTH
    for a, b in zip(*values, strict=True):
        assert a["value"] == pytest.approx(b["value"], rel=1e-4)
        assert a["stderr"] == pytest.approx(b["stderr"], rel=1e-2)
        assert a["settings"] == b["settings"], "the rows that fill up the last batch are not counted"


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_one_report_speaks_for_both_processes(method, finished, two_processes):
    run = read_report(two_processes.runs / method / "publish")["run"]
    assert run["world_size"] == 2
    assert run["batch"] == {"per_device": 2, "gradient_accumulation": 1, "world_size": 2, "global_sequences": 4}

    def listing(folder):
        paths = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        return {path for path in paths if "rng_state" not in path and "figures" not in path}

    assert listing(two_processes.runs / method) == listing(finished[method].folder)
    rng = sorted(path.name for path in (two_processes.runs / method / "checkpoint-4").glob("rng_state*"))
    assert rng == ["rng_state_0.pth", "rng_state_1.pth"]


@pytest.mark.slow
def test_the_first_process_alone_writes_and_prints(two_processes):
    assert [path for _, path in two_processes.touched if "rng_state" not in path] == []
    assert two_processes.out.count("target layers") == len(METHODS)
    assert two_processes.out.count("Peak memory") == len(METHODS)


def wait_for(condition, process, log, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the run ended before it could be killed: {log.read_text()[-500:]}"
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["galore", "sltrain"])
@pytest.mark.usefixtures("without_figures")
def test_a_killed_run_goes_on_bit_for_bit(method, recipe, inputs, tmp_path):
    changes = {"max_steps": 120, "save_steps": 20, "eval_strategy": "no", "metrics": "none", "disable_tqdm": "true"}
    folder, whole = tmp_path / "killed", tmp_path / "whole"
    log = tmp_path / "log"
    command = [sys.executable, str(RECIPE), *flags(inputs, method, output_dir=folder, **changes)]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment(), start_new_session=True)
        try:
            wait_for((folder / "checkpoint-20" / "trainer_state.json").is_file, process, log)
            logged = log.read_text().count("  loss ")
            wait_for(lambda: log.read_text().count("  loss ") >= logged + 5, process, log)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "checkpoint-120").exists()
    resumed = call(recipe, flags(inputs, method, output_dir=folder, resume_from_checkpoint="last", **changes))
    assert resumed.code == 0, resumed.err
    assert "going on from" in resumed.out
    assert call(recipe, flags(inputs, method, output_dir=whole, **changes)).code == 0
    files_equal(folder, whole, "checkpoint-120/model.safetensors", "publish/model.safetensors")
    optimizers_equal(folder / "checkpoint-120", whole / "checkpoint-120")
    assert losses(folder / "checkpoint-120") == losses(whole / "checkpoint-120")
    assert read_report(folder / "publish")["run"]["tokens_seen"] == 120 * BATCH * LENGTH
