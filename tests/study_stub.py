"""Stand-ins for the commands of a study, which write small files in milliseconds, and a study that runs them.

    study_stub.py study YAML OUTPUT                             # the study with the commands below, until it ends
    study_stub.py train|measure|evaluate ...                    # as recipes/pretrain.py and hf-lowrank take them

A training adds up a number step by step and saves it in its checkpoints, so that one that goes on wrongly ends with
another. Files in the folder STUB say what goes wrong: `fail-<run>` and `diverge-<run>` what happens to a run,
`kill` that everything is killed at the next moment at which nothing was killed yet; those are in `killed`.
"""

import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

STUB = Path(os.environ.get("STUB", "."))


def moment(name):
    """Kill the whole process group if the test asks for it and this moment has not been one yet."""
    record = STUB / "killed"
    seen = record.read_text().split() if record.exists() else []
    if (STUB / "kill").exists() and name not in seen:
        with record.open("a") as file:
            file.write(name + "\n")
        os.killpg(0, signal.SIGKILL)


def flags_of(words):
    flags, key = {}, None
    for word in words:
        if word.startswith("--"):
            key = word[2:]
            flags[key] = ""
        elif key is not None:
            flags[key] = f"{flags[key]} {word}".strip()
    return flags


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, sort_keys=True))


def log(*words):
    with (STUB / "calls").open("a") as file:
        file.write(" ".join(map(str, words)) + "\n")


def train(words):
    recipe, flags = Path(words[0]).stem, flags_of(words[1:])
    run, steps, every = Path(flags["output_dir"]), int(flags["max_steps"]), int(flags["save_steps"])
    moment("train-start")
    if (STUB / f"slow-{run.name}").exists():
        time.sleep(float((STUB / f"slow-{run.name}").read_text()))
    if "overwrite" in flags:
        shutil.rmtree(run)
    saved = sorted(int(path.name.rpartition("-")[2]) for path in run.glob("checkpoint-*"))
    start = saved[-1] if saved else 0
    total = json.loads((run / f"checkpoint-{start}" / "weights").read_text()) if start else 0
    log("train", run.name, f"from={start}")
    if (STUB / f"damaged-{run.name}").exists() and "overwrite" not in flags:
        write(run / "checkpoint-2" / "half", 0)
        print("error: cut short")
        sys.exit(2)
    if (STUB / f"fail-{run.name}").exists():
        print("error: out of luck")
        sys.exit(2)
    rate, scale = float(flags.get("learning_rate", 1e-3)), float(flags.get("other_lr_scale", 1))
    for step in range(start + 1, steps + 1):
        total += step * (1 + int(flags["seed"])) * len(recipe)
        if step % every == 0:
            write(run / f"checkpoint-{step}" / "weights", total)
            moment(f"train-{step}")
    # lowest at rates of 3e-3 and 3e-2
    loss = 4 + abs(rate - 3e-3) + abs(rate * scale - 3e-2) + total / 1e6
    value = None if (STUB / f"diverge-{run.name}").exists() else loss
    metrics = [{"name": "validation_loss", "value": value, "step": steps}]
    speed = {"speed": {"tokens_per_second": 1000.0}}
    write(run / "publish" / "report.json", {"metrics": metrics, "evaluations": [], "run": speed})
    write(run / "publish" / "model.safetensors", total)
    moment("train-end")


def weights(run, step):
    """A checkpoint, or of the last step what is published."""
    kept = run / f"checkpoint-{step}" / "weights"
    if not kept.exists() and json.loads((run / "publish" / "report.json").read_text())["metrics"][0]["step"] == step:
        kept = run / "publish" / "model.safetensors"
    return json.loads(kept.read_text())


def measure(words):
    runs = [Path(word) for word in words[: next(i for i, word in enumerate(words) if word.startswith("--"))]]
    flags = flags_of(words)
    steps = [int(step) for step in flags["steps"].split(",")]
    moment("barriers-start" if len(runs) > 1 else "measure-start")
    log("measure", *(run.name for run in runs), flags.get("baseline", ""))
    baseline = [Path(flags["baseline"])] if "baseline" in flags else []
    for run in runs:
        report = json.loads((run / "publish" / "report.json").read_text())
        others = [*baseline, *(other for other in runs if other != run)]
        for step in steps:
            for other in others or [run]:
                value = abs(weights(run, step) - weights(other, step))
                name = f"against/{other.name}"
                report["metrics"] = [m for m in report["metrics"] if (m["name"], m["step"]) != (name, step)]
                report["metrics"].append({"name": name, "value": value, "step": step})
        report["metrics"][1:] = sorted(report["metrics"][1:], key=lambda m: (m["name"], m["step"]))
        write(run / "publish" / "report.json", report)
    moment("barriers-end" if len(runs) > 1 else "measure-end")


def evaluate(words):
    run, flags = Path(words[0]), flags_of(words[1:])
    moment("evaluate-start")
    log("evaluate", run.name)
    report = json.loads((run / "publish" / "report.json").read_text())
    for step in map(int, flags["checkpoints"].split(",")):
        entry = {"task": flags["tasks"], "value": weights(run, step), "step": step}
        report["evaluations"] = [e for e in report["evaluations"] if e["step"] != step] + [entry]
    write(run / "publish" / "report.json", report)
    moment("evaluate-end")


def commands():
    from hf_lowrank.study.jobs import Commands

    script = (sys.executable, str(Path(__file__).resolve()))
    return Commands(*((*script, kind) for kind in ("train", "measure", "evaluate")))


def study(path, output, **options):
    """Run a study with the stand-ins; returns whether it is complete, and the lines that it said."""
    from hf_lowrank.options import StudyOptions
    from hf_lowrank.study.study import run_study

    lines, cluster = [], options.pop("cluster", "slurm")

    def say(line):
        lines.append(line)
        print(line, flush=True)
        job = re.match(r"(started|done) .*?\.([a-z]+)", line)
        moment("-".join(("said", *(job.groups() if job else ()))))

    complete = run_study(
        Path(path), StudyOptions(output=Path(output), **options), say, commands=commands(),
        tokens=lambda cell, words: 16 * 256, cluster=cluster, analyse=lambda folders, output: "analysed",
    )  # fmt: skip
    return complete, lines


def until_it_ends(path, output):
    """Run the study again and again, each time in a process group of its own, until it is not killed."""
    import hf_lowrank.study.study  # noqa: F401

    while True:
        child = os.fork()
        if child == 0:
            os.setsid()
            os._exit(0 if study(path, output)[0] else 1)
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    kind, *rest = sys.argv[1:]
    if kind == "study":
        until_it_ends(*rest)
    {"train": train, "measure": measure, "evaluate": evaluate}[kind](rest)
