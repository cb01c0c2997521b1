"""What a run of a size costs on this machine, from two runs of a few steps."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from hf_lowrank.report.files import atomic_path
from hf_lowrank.study.forecast import Costs
from hf_lowrank.study.jobs import Commands, Job, State, barriers_job, evaluate_job, measure_job, run_job, train_job
from hf_lowrank.study.plan import Cell, Pair, Plan
from hf_lowrank.study.spec import Study

__all__ = ["calibrate", "read_costs"]

FILE = "calibration.json"
# the second checkpoint has one before it, as most have
STEPS = (2, 4)


def read_costs(folder: Path) -> dict[str, Costs]:
    """The costs that are known, by size."""
    path = folder / FILE
    try:
        return {size: Costs(**costs) for size, costs in json.loads(path.read_text()).items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"{path} is damaged: remove it, and it is measured anew") from None


def calibrate(
    plan: Plan,
    recipes: Path,
    folder: Path,
    commands: Commands,
    tokens_per_step: Mapping[str, int],
    environment: Mapping[str, str],
    say: Callable[[str], None],
    lock: int | None = None,
) -> dict[str, Costs]:
    """Measure what the sizes cost that are not yet known, with the reference's recipe.

    Args:
        tokens_per_step: by size.
        environment: variables of the processes.

    Raises:
        ValueError: a command fails; the message names its log.
    """
    costs = read_costs(folder)
    for size in plan.study.sizes:
        if size in costs:
            continue
        say(f"calibrating {size}: {STEPS[-1]} steps, twice, and their metrics")
        costs[size] = _costs(plan, recipes, folder, commands, size, tokens_per_step[size], environment, lock)
        with atomic_path(folder / FILE) as temporary:
            temporary.write_text(json.dumps({name: asdict(cost) for name, cost in costs.items()}, indent=1) + "\n")
    return costs


def _costs(
    plan: Plan,
    recipes: Path,
    folder: Path,
    commands: Commands,
    size: str,
    tokens_per_step: int,
    environment: Mapping[str, str],
    lock: int | None,
) -> Costs:
    study = plan.study
    like = next(cell for cell in plan.cells if (cell.label, cell.size) == (study.reference, size))
    # the first run fills the cache of the data, which the others find filled
    first, second = (
        Cell(f"calibration-{size}-{n}", like.method, like.label, size, n, "run", STEPS[-1], STEPS, like.overrides)
        for n in (0, 1)
    )

    def seconds(job: Job) -> float:
        state: State = run_job(folder, job, environment, lock)
        if state.state != "done":
            log = folder / "logs" / f"{job.name}.log"
            raise ValueError(f"calibration of {size}: {job.kind} {state.state}: {state.reason} (all of it: {log})")
        return state.seconds

    seconds(train_job(commands, recipes, first))
    trained = seconds(train_job(commands, recipes, second))
    run = folder / "runs" / second.name
    speed = json.loads((run / "publish" / "report.json").read_text())["run"]["speed"]["tokens_per_second"]
    step = tokens_per_step / speed
    checkpoint, publish = _bytes(run / f"checkpoint-{STEPS[-1]}"), _bytes(run / "publish")
    at = Plan(_at_last(plan), (first, second), (), frozenset(), {}, {}, {})
    measured = evaluated = paired = 0.0
    if study.metrics is not None:
        measured = seconds(measure_job(commands, at, second, first.name))
    if study.downstream is not None:
        evaluated = seconds(evaluate_job(commands, at, second))
    if plan.pairs:
        # of the two directions the one to the baseline has been measured
        pair = Pair(f"calibration-{size}-pair", "seeds", size, (first.name, second.name))
        paired = seconds(barriers_job(commands, at, pair, pair.runs))
    for name in (first.name, second.name):
        shutil.rmtree(folder / "runs" / name)
    for path in (folder / "jobs").glob(f"calibration-{size}-*"):
        path.unlink()
    start = max(0.0, trained - STEPS[-1] * step)
    return Costs(round(start, 1), round(step, 3), measured, evaluated, paired, checkpoint, publish)


def _at_last(plan: Plan) -> Study:
    """The study with its metrics and tasks at the last step of a calibration alone."""
    study = plan.study
    changes = {"steps": STEPS[-1], "checkpoints": len(STEPS)}
    parts = {"metrics": study.metrics, "downstream": study.downstream}
    last = {key: part.model_copy(update={"checkpoints": "last"}) for key, part in parts.items() if part is not None}
    return study.model_copy(update={**changes, **last})


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
