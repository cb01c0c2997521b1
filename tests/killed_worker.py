"""Runs that kill themselves at a chosen point and go on from their last checkpoint; every one in a fork of its own.

Usage: killed_worker.py FOLDER. Every method of `tiny_runs.METHODS` takes part. The result, case -> what differs from
the run that was never stopped (empty where nothing does), goes to FOLDER/killed.json.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_runs import METHODS, arguments, make_trainer, projected, restarted

import hf_lowrank as lr
import hf_lowrank.methods.relora as relora
from hf_lowrank.optim.matrix import Matrix

SAVE_STEPS, MAX_STEPS, MATRICES = 4, 12, 14


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_call(owner, name, count):
    """Let the function `name` of `owner` die at its `count`-th call."""
    original, calls = getattr(owner, name), [0]

    def counted(*args, **kwargs):
        calls[0] += 1
        if calls[0] == count:
            kill()
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def in_backward(trainer):
    calls = [0]

    def count(grad):
        calls[0] += 1
        if calls[0] == SAVE_STEPS + 2:
            kill()

    next(p for p in trainer.model.parameters() if p.requires_grad).register_hook(count)


def in_refresh(trainer):
    # refreshes are due in steps 1, 4 and 7, one call a matrix: this is in the middle of the third
    kill_at_call(Matrix, "set_projector", 2 * MATRICES + 5)


def in_update(trainer):
    kill_at_call(trainer.optimizer_cls_and_kwargs[0], "update", 6 * MATRICES + 5)


def in_merge(trainer):
    # restarts come before steps 4, 7 and 10: in the middle of the second
    kill_at_call(relora, "fold", MATRICES + 5)


def in_save(trainer):
    original = torch.save

    def cut_short(value, path, *args, **kwargs):
        original(value, path, *args, **kwargs)
        if str(path).endswith(f"checkpoint-{2 * SAVE_STEPS}/optimizer.pt"):
            with open(path, "r+b") as file:
                file.truncate(os.path.getsize(path) // 2)
            kill()

    torch.save = cut_short


def points(method):
    found = {"in the backward pass": in_backward, "in a save": in_save}
    if projected(METHODS[method]):
        found |= {"in a refresh": in_refresh, "in an update": in_update}
    if restarted(METHODS[method]):
        found["in a merge"] = in_merge
    return found


def train(folder, before=None, resume=False):
    args = arguments(folder, save_strategy="steps", save_steps=SAVE_STEPS, max_steps=MAX_STEPS, log_level="error")
    trainer = make_trainer(METHODS[method_of(folder)], args)
    if before is not None:
        before(trainer)
    trainer.train(resume_from_checkpoint=lr.last_checkpoint(folder) if resume else None)


def method_of(folder):
    return Path(folder).name.partition(" ")[0]


def forked(run, *args, **kwargs):
    """Exit status of `run` in a child of this process: torch is imported once for all of them."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            run(*args, **kwargs)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def differences(a, b):
    """Names of what differs between two runs' last checkpoints."""
    a, b = (folder / f"checkpoint-{MAX_STEPS}" for folder in (a, b))
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (a, b))
    found = [key for key in mine.keys() | theirs.keys() if not torch.equal(mine[key], theirs[key])]
    states = [torch.load(folder / "optimizer.pt", weights_only=True)["state"] for folder in (a, b)]
    for index, state in states[0].items():
        for key, value in state.items():
            if not torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][index][key])):
                found.append(f"optimizer {index} {key}")
    logs = []
    for folder in (a, b):
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        logs.append([(entry["step"], entry["loss"], entry["learning_rate"]) for entry in history if "loss" in entry])
    return found + [f"log at {x[0]}" for x, y in zip(*logs, strict=True) if x != y]


def main():
    folder, results = Path(sys.argv[1]), {}
    torch.set_num_threads(1)
    for method in METHODS:
        assert forked(train, folder / f"{method} whole") == 0
        for name, before in points(method).items():
            run = folder / f"{method} {name}"
            status = forked(train, run, before)
            if status != -signal.SIGKILL:
                results[run.name] = [f"ended with {status} instead of being killed"]
                continue
            if forked(train, run, resume=True) != 0:
                results[run.name] = ["could not go on"]
                continue
            results[run.name] = differences(run, folder / f"{method} whole")
    (folder / "killed.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
