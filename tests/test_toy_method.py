"""A projected method that is defined outside of the package goes everywhere that ours go."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import arguments, llama, make_trainer
from toy_method import ToyConfig, install

import hf_lowrank as lr
from hf_lowrank.methods import METHODS as REGISTERED
from hf_lowrank.methods.prepare import method_of, summary_of
from hf_lowrank.methods.summary import optimizer_state_bytes

ROOT = Path(__file__).parents[1]
TOY = ToyConfig(r=4, update_proj_gap=3)


@pytest.fixture(scope="module", autouse=True)
def _registered(toy_method):
    """The toy is registered in these tests."""


def python(code, *argv, path):
    """Run code in a process of its own, with the folders of `path` before ours."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, argv)],
        env={**os.environ, "PYTHONPATH": f"{path}:{ROOT}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the toy with checkpoints and a report."""
    folder = tmp_path_factory.mktemp("runs") / "toy"
    trainer = make_trainer(TOY, arguments(folder, max_steps=4, save_strategy="steps", save_steps=2))
    lr.attach(trainer)
    trainer.train()
    assert optimizer_state_bytes(trainer.optimizer.optimizer) == summary_of(trainer.model, TOY).state_bytes
    return folder


ELSEWHERE = """
import sys
from hf_lowrank.cli import main



def command(*words):
    sys.argv = ["hf-lowrank", *words]
    try:
        main()
    except SystemExit as end:
        assert not end.code, (words, end.code)


toy, bare, page = sys.argv[1:]
command("measure", toy, bare, "--only", "loss,spectral", "--steps", "4")
command("compare", toy, bare, "--output", page)
import hf_lowrank as lr
from hf_lowrank.methods.prepare import method_of

for folder in (toy + "/publish", toy + "/checkpoint-4"):
    print("method:", repr(method_of(lr.from_pretrained(folder))))
"""


def test_a_process_that_never_imported_it_measures_compares_and_loads_its_run(run, tmp_path):
    # the same run as a plain Trainer would leave it: its report is made from the checkpoints
    bare = shutil.copytree(run, tmp_path / "bare")
    (bare / "publish" / "report.json").unlink()
    page = tmp_path / "comparison"
    out = python(ELSEWHERE, run, bare, page, path=install(tmp_path / "site"))
    assert out.count(f"method: {TOY!r}") == 2
    for folder in (run, bare):
        report = json.loads((folder / "publish" / "report.json").read_text())
        facts = report["run"]
        assert (facts["method"], facts["method_label"], facts["dense_form"]) == ("toy", ToyConfig.label, True)
        assert facts["method_paper"] == dataclasses.asdict(ToyConfig.paper)
        assert {"loss", "spectral"} <= {entry["name"].partition("/")[0].split("_")[-1] for entry in report["metrics"]}
        card = (folder / "publish" / "README.md").read_text()
        assert f"[{ToyConfig.label}](https://arxiv.org/abs/{ToyConfig.paper.arxiv})" in card
        assert ToyConfig.paper.title in card
    assert "toy" in (page / "index.html").read_text()


@pytest.mark.slow
def test_its_run_killed_anywhere_goes_on_bit_for_bit(tmp_path):
    code = (
        "import killed_worker, tiny_runs, toy_method, toy_plugin\n"
        "tiny_runs.METHODS.clear()\n"
        "tiny_runs.METHODS['toy'] = toy_method.ToyConfig(r=4, update_proj_gap=3)\n"
        "killed_worker.main()\n"
    )
    python(code, tmp_path, path=Path(__file__).parent)
    results = json.loads((tmp_path / "killed.json").read_text())
    assert results == {
        f"toy {where}": [] for where in ("in the backward pass", "in a save", "in a refresh", "in an update")
    }


def test_a_checkpoint_of_a_method_that_is_not_there_says_what_to_install(run, monkeypatch):
    monkeypatch.delitem(REGISTERED, "toy")
    with pytest.raises(ValueError, match=r"unknown method 'toy'.*install or import that package"):
        lr.from_pretrained(run / "checkpoint-4")
    model = llama()
    model.config.lowrank = {**TOY.to_dict(), "form": "native", "structure": None}
    with pytest.raises(ValueError, match="unknown method 'toy'"):
        method_of(model)
