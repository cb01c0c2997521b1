"""The jobs of a study: processes of existing commands, each with its log and its state in the study's folder.

A job is done when its state says so and what defines its result is what it was then. Everything else, above all a
training that goes on from its last checkpoint, is the commands' own.
"""

import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_lowrank.report.files import atomic_path
from hf_lowrank.study.forecast import measured_steps
from hf_lowrank.study.plan import Cell, Pair, Plan, recipe_words

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "IMMATERIAL", "Commands", "Job", "State", "barriers_job", "evaluate_job", "final_loss", "locked", "measure_job",
    "measured_families", "read_state",
    "run_job", "stop_children", "train_job",
]  # fmt: skip

# settings that say how a run is computed and not what comes out
IMMATERIAL = {"cpu_threads", "dataloader_num_workers", "dataloader_pin_memory", "license", "use_cpu"}


@dataclass(frozen=True)
class Commands:
    """The beginnings of the jobs' command lines."""

    train: tuple[str, ...]
    measure: tuple[str, ...]
    evaluate: tuple[str, ...]

    @classmethod
    def of(cls, recipes: Path, processes: int) -> "Commands":
        """pretrain.py of a folder and `hf-lowrank`, in one process or in several."""
        start: tuple[str, ...] = (sys.executable,)
        if processes > 1:
            # port 0 is one that is free: several launches share the machine
            launch = (
                "-m",
                "accelerate.commands.launch",
                "--num_processes",
                str(processes),
                "--main_process_port",
                "0",
            )
            start = (*start, *launch)
        package = (*start, "-m", "hf_lowrank")
        return cls((*start, str(recipes / "pretrain.py")), (*package, "measure"), (*package, "evaluate"))


@dataclass(frozen=True)
class Job:
    """A process of the study; paths in its command are relative to the study's folder.

    Attributes:
        name: of its log and its state.
        runs: it works on them.
        identity: what defines its result.
    """

    name: str
    kind: str
    runs: tuple[str, ...]
    command: tuple[str, ...]
    identity: dict[str, Any] = field(hash=False)


@dataclass(frozen=True)
class State:
    """How a job stands.

    Attributes:
        state: started, done, failed or diverged.
        identity: as the job's, when it was started.
        seconds: that its command took, over all its starts.
        reason: why it failed.
    """

    state: str
    identity: dict[str, Any] = field(hash=False)
    seconds: float = 0.0
    reason: str = ""

    @property
    def ended(self) -> bool:
        """Whether starting the job again would change nothing."""
        return self.state in ("done", "diverged")


def train_job(commands: Commands, recipes: Path, cell: Cell) -> Job:
    """The training of a run; it goes on from the run's last checkpoint."""
    output = f"runs/{cell.name}"
    flags = ("--output_dir", output, "--run_name", cell.name, "--data_cache", "data")
    identity = {
        "recipe": cell.method, "size": cell.size, "seed": cell.seed, "steps": cell.steps, "saved": list(cell.saved),
        "settings": {key: value for key, value in cell.overrides.items() if key not in IMMATERIAL},
    }  # fmt: skip
    command = (*commands.train, *recipe_words(cell, recipes), *flags, *_GO_ON)
    return Job(f"{cell.name}.train", "train", (cell.name,), command, identity)


def measured_families(only: list[str] | None, baseline: str | None) -> list[str] | None:
    """The families to measure, without those that compare with a baseline where there is none; None for all."""
    if only is None or baseline is not None:
        return only
    from hf_lowrank.families.family import get_family

    return [name for name in only if not get_family(name).needs_baseline]


def measure_job(commands: Commands, plan: Plan, cell: Cell, baseline: str | None) -> Job:
    """The metrics of a run over its checkpoints."""
    metrics = plan.study.metrics
    assert metrics is not None
    steps = measured_steps(metrics.checkpoints, cell)
    words = ["--preset", metrics.preset, "--steps", ",".join(map(str, steps))]
    only = measured_families(metrics.only, baseline)
    words += [] if only is None else ["--only", ",".join(only)]
    words += [] if metrics.sequences is None else ["--sequences", str(metrics.sequences)]
    words += [] if baseline is None else ["--baseline", f"runs/{baseline}"]
    identity = {**metrics.model_dump(exclude={"checkpoints"}), "steps": list(steps), "baseline": baseline}
    command = (*commands.measure, f"runs/{cell.name}", *words)
    return Job(f"{cell.name}.measure", "measure", (cell.name,), command, identity)


def evaluate_job(commands: Commands, plan: Plan, cell: Cell) -> Job:
    """A run's downstream tasks."""
    tasks = plan.study.downstream
    assert tasks is not None
    steps = measured_steps(tasks.checkpoints, cell)
    words = ["--tasks", ",".join(tasks.tasks), "--checkpoints", ",".join(map(str, steps))]
    words += [] if tasks.limit is None else ["--limit", f"{tasks.limit:g}"]
    words += [] if tasks.num_fewshot is None else ["--num-fewshot", str(tasks.num_fewshot)]
    words += [] if tasks.seeds is None else ["--seeds", ",".join(map(str, tasks.seeds))]
    identity = {**tasks.model_dump(exclude={"checkpoints"}), "steps": list(steps)}
    command = (*commands.evaluate, f"runs/{cell.name}", *words)
    return Job(f"{cell.name}.evaluate", "evaluate", (cell.name,), command, identity)


def barriers_job(commands: Commands, plan: Plan, pair: Pair, runs: tuple[str, ...]) -> Job:
    """The barriers between the last checkpoints of those runs of a group that have any."""
    metrics, last = plan.study.metrics, plan.study.saved_steps(pair.size)[-1]
    preset, sequences = ("quick", None) if metrics is None else (metrics.preset, metrics.sequences)
    words = ["--only", "interpolation", "--preset", preset, "--steps", str(last)]
    words += [] if sequences is None else ["--sequences", str(sequences)]
    identity = {"preset": preset, "sequences": sequences, "step": last, "runs": list(runs)}
    command = (*commands.measure, *(f"runs/{run}" for run in runs), *words)
    return Job(pair.name, "barriers", runs, command, identity)


def read_state(folder: Path, name: str) -> State | None:
    """How a job stands; None if it was never started."""
    try:
        return State(**json.loads((folder / "jobs" / f"{name}.json").read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise ValueError(f"{folder / 'jobs' / name}.json is damaged: remove it, and the job is done again") from None


def _write_state(folder: Path, name: str, state: State) -> None:
    with atomic_path(folder / "jobs" / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(asdict(state), indent=1, sort_keys=True) + "\n")


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[int]:
    """Hold a file's lock; processes that inherit the descriptor hold it with us, until the last one has ended.

    Raises:
        BlockingIOError: another process holds it, and `wait` is false.
    """
    if fcntl is None:
        raise ValueError("this system has no file locks, which keep two commands from writing one study")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield descriptor
    finally:
        # closed and not unlocked: a child that goes on keeps it
        os.close(descriptor)


# the end of a training's command
_GO_ON = ("--resume_from_checkpoint", "last")
# seconds between two looks at a process
_PAUSE = 0.02
_children: set[subprocess.Popen[bytes]] = set()
_stopping = threading.Event()


def stop_children() -> None:
    """End the processes of this study and wait for them; they go on from what they have saved."""
    _stopping.set()
    for child in list(_children):
        child.terminate()
    for child in list(_children):
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=60)


def run_job(folder: Path, job: Job, environment: Mapping[str, str], inherited: int | None = None) -> State:
    """Do a job that is not done; return how it ended.

    Args:
        folder: of the study.
        environment: variables beside this process's own.
        inherited: descriptor of a lock that the process holds as long as it lives.
    """
    with locked(folder / "jobs" / f"{job.name}.lock", wait=True):
        before = read_state(folder, job.name)
        if before is not None and before.ended and before.identity == job.identity:
            return before
        spent = 0.0 if before is None else before.seconds
        _write_state(folder, job.name, State("started", job.identity, spent))
        start = time.monotonic()
        code, log = _run(folder, job, environment, inherited)
        spent = round(spent + time.monotonic() - start, 1)
        state = State("done", job.identity, spent)
        if _stopping.is_set():
            state = State("started", job.identity, spent)
        elif code != 0:
            state = State("failed", job.identity, spent, _reason(code, log))
        elif job.kind == "train":
            state = _trained(folder, job, spent)
        _write_state(folder, job.name, state)
        return state


def _run(folder: Path, job: Job, environment: Mapping[str, str], inherited: int | None) -> tuple[int, Path]:
    log = folder / "logs" / f"{job.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    code = _process(folder, job.command, environment, inherited, log)
    if code != 0 and job.kind == "train" and not _stopping.is_set() and _is_damaged(folder / "runs" / job.runs[0]):
        # an earlier process was killed while it saved its first checkpoint: there is nothing to go on from
        again = (*job.command[: -len(_GO_ON)], "--overwrite")
        code = _process(folder, again, environment, inherited, log)
    return code, log


def _process(
    folder: Path, command: Sequence[str], environment: Mapping[str, str], inherited: int | None, log: Path
) -> int:
    """Run a command to its end; what it prints goes to the log."""
    with log.open("ab") as output:
        output.write(f"$ {' '.join(command)}\n".encode())
        output.flush()
        child = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, pass_fds=() if inherited is None else (inherited,),
        )  # fmt: skip
        _children.add(child)
        if _stopping.is_set():
            # stop_children may have looked before the child was there
            child.terminate()
        try:
            # looked at and not waited for: a signal handler that stops the child must be able to wait for it
            while (code := child.poll()) is None:
                time.sleep(_PAUSE)
            return code
        except BaseException:
            # it holds the study's lock
            child.terminate()
            child.wait()
            raise
        finally:
            _children.discard(child)


def _is_damaged(run: Path) -> bool:
    """Whether a run has checkpoints and none is complete."""
    if not list(run.glob("checkpoint-*")):
        return False
    from hf_lowrank.checkpoints import last_checkpoint

    return last_checkpoint(run) is None


def _reason(code: int, log: Path) -> str:
    """The last line of a log that says something."""
    if code < 0:
        return f"killed by signal {-code}"
    # what the last process printed after its command
    last = ("\n" + log.read_text(errors="replace")).rpartition("\n$ ")[2]
    said = [line.strip() for line in last.splitlines()[1:] if line.strip()]
    errors = [line for line in said if line.startswith("error:")]
    return (errors or said or [f"exit code {code}"])[-1][:300]


def final_loss(folder: Path, run: str, step: int) -> float:
    """A run's validation loss at a step; NaN if it diverged.

    Raises:
        ValueError: its report does not have it.
    """
    path = folder / "runs" / run / "publish" / "report.json"
    try:
        metrics = json.loads(path.read_text())["metrics"]
        (value,) = [m["value"] for m in metrics if m["name"] == "validation_loss" and m["step"] == step]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} has no validation loss of step {step} ({type(error).__name__})") from error
    # JSON has no NaN
    return math.nan if value is None else float(value)


def _trained(folder: Path, job: Job, seconds: float) -> State:
    try:
        loss = final_loss(folder, job.runs[0], job.identity["steps"])
    except ValueError as error:
        return State("failed", job.identity, seconds, str(error))
    if math.isfinite(loss):
        return State("done", job.identity, seconds)
    return State("diverged", job.identity, seconds, "its validation loss is not finite")
