"""`accelerate launch -m hf_lowrank`: two processes leave the files of one, also after one of them was killed."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from tiny_runs import METHODS, arguments, llama, make_trainer
from tiny_tasks import tokenizer, write_tasks

import hf_lowrank as lr

pytestmark = pytest.mark.slow
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with checkpoints at 2, 4 and 6, and a folder of tasks."""
    root = tmp_path_factory.mktemp("runs")
    args = arguments(root / "run", save_strategy="steps", save_steps=2)
    model = llama(max_position_embeddings=160)
    trainer = make_trainer(METHODS["sltrain"], args, model=model, processing_class=tokenizer())
    lr.attach(trainer)
    trainer.train()
    write_tasks(root / "tasks")
    return root


def command(processes, folder, *words):
    """The exit code of a command in a folder with one process or two, each with one thread, and what it prints."""
    launch = LAUNCH if processes == 2 else []
    done = subprocess.run(
        [sys.executable, *launch, "-m", "hf_lowrank", *map(str, words)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stdout, done.stderr


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def copies(trained, tmp_path):
    """The run once for one process and once for two; messages name its folder, so that it is called the same."""
    return {n: shutil.copytree(trained / "run", tmp_path / str(n) / "run").parent for n in (1, 2)}


def test_measurements_are_those_of_one_process(copies):
    outputs = {}
    for processes, folder in copies.items():
        # a checkpoint that was cut short fails in one process and is reported once
        weights = folder / "run" / "checkpoint-2" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        only = ["--only", "loss,spectral,interpolation,curvature", "--sequences", 4, "--device", "cpu"]
        code, outputs[processes], error = command(processes, folder, "measure", "run", *only)
        assert code == 1, error
    for output in outputs.values():
        assert output.count("step 2: loss: not measured") == 1
        assert output.count("holds report, tables, figures and card") == 1
    done = [sum(line.startswith(f"{n}/") for n in range(50) for line in out.splitlines()) for out in outputs.values()]
    assert done[1] < done[0], "the second process has done some, and said nothing"
    one, two = (contents(copies[n]) for n in (1, 2))
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []


def test_a_killed_evaluation_ends_as_that_of_one_process(copies, trained, launcher):
    tasks = ["--tasks", "a,b,c,d,e,tiny_group", "--include-path", trained / "tasks", "--device", "cpu"]
    words = ["evaluate", "run", *tasks, "--checkpoints", "4,6", "--seeds", "1,2", "--batch-size", 4]

    def evaluate(processes, **environment):
        environment = json.dumps({"COLUMNS": "200", **environment})
        return launcher.run("cli_worker", copies[processes or 1], environment, *words, processes=processes)

    codes, output = evaluate(None)
    assert codes == [0], output
    codes, _ = evaluate(2, DIE_IN="c")
    assert any(codes)
    codes, output = evaluate(2)
    assert codes == [0, 0], output
    assert output.count("holds report and card") == 1
    one, two = (contents(copies[n]) for n in (1, 2))
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []
