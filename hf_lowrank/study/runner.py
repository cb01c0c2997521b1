"""A study from its file to its analysis: what is done is left alone, what fails costs its run and not the others.

The folder holds all there is to know: `study.json` (the plan), `runs/<cell>/`, `jobs/` (how each job stands), `logs/`
and `data/` (tokenizer and rows, which the runs share). The same command goes on where an earlier one ended.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_lowrank.report.files import atomic_path
from hf_lowrank.study.jobs import (
    IMMATERIAL,
    Commands,
    Job,
    State,
    barriers_job,
    evaluate_job,
    final_loss,
    measure_job,
    measured_families,
    read_state,
    train_job,
)
from hf_lowrank.study.launch import Launcher
from hf_lowrank.study.plan import Cell, Losses, Plan, make_plan, plan_record, tuning_cell
from hf_lowrank.study.search import Point
from hf_lowrank.study.spec import Study

__all__ = ["Runner", "check_finished", "done_jobs", "known_losses", "load_plan"]

# what a run leaves beside what the analysis reads: publish/, metrics and the validation rows
_WEIGHTS = ("spectral_snapshots", "interpolation_snapshots", "*.safetensors", "training_args.bin")


# of several differences between what a run was and is, these are named first: others follow from them
_TOLD_FIRST = ("recipe", "steps")


def known_losses(study: Study, folder: Path, beside: Path, recipes: Path) -> Losses:
    """The losses of all points of searches that are known, of this folder and of the study's file of results.

    Args:
        beside: folder of the YAML file.
    """
    if study.tuning is None:
        return {}
    tuning = study.tuning
    losses: dict[str, dict[Point, float]] = {label: {} for label in tuning.starts}
    plan, steps = make_plan(study, recipes), study.steps_at(study.tuning.size)
    if tuning.results is not None:
        path = beside / tuning.results
        if not path.is_file():
            raise ValueError(f"tuning.results: {path} does not exist: correct it, or drop it")
        # these are of a size's recipe as it is, and anything else that is set makes another run
        changed = study.settings.keys() - IMMATERIAL
        for record in _records(path):
            label, size = str(record["recipe"]), record.get("size", "tiny")
            if changed or label not in losses or (size, record["steps"], record["seed"]) != (
                tuning.size, steps, tuning.seed,
            ):  # fmt: skip
                continue
            method = study.method(label)
            if study.recipe(label) != label or method.settings or method.sizes.get(tuning.size):
                continue
            point = plan.grids[label].point(record["learning_rate"], record["other_lr_scale"])
            loss = record["validation_loss"]
            if point is not None:
                losses[label][point] = math.nan if loss is None else loss
    for label, known in losses.items():
        prefix = f"tuning-{tuning.size}-{label}-"
        for path in sorted((folder / "jobs").glob(f"{prefix}*.train.json")):
            i, underscore, j = path.name.removeprefix(prefix).removesuffix(".train.json").partition("_")
            # of another method whose name begins alike
            if not underscore or not all(part.removeprefix("-").isdigit() for part in (i, j)):
                continue
            point = int(i), int(j)
            state = read_state(folder, path.name.removesuffix(".json"))
            wanted = train_job(Commands((), (), ()), recipes, tuning_cell(plan, label, point))
            if state is not None and state.ended and state.identity == wanted.identity:
                known[point] = final_loss(folder, wanted.runs[0], steps)
    return losses


def _records(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            missing = {"recipe", "steps", "seed", "learning_rate", "other_lr_scale", "validation_loss"} - record.keys()
        except (ValueError, AttributeError):
            raise ValueError(f"tuning.results: line {number} of {path} is no JSON object: remove it") from None
        if missing:
            raise ValueError(f"tuning.results: line {number} of {path} has no {min(missing)}: remove it")
        yield record


def load_plan(study: Study, folder: Path, beside: Path, recipes: Path) -> Plan:
    """The plan with what is known of its searches."""
    return make_plan(study, recipes, known_losses(study, folder, beside, recipes))


def done_jobs(folder: Path) -> dict[str, float]:
    """Seconds of the jobs that need not be started again, by name."""
    names = [path.name.removesuffix(".json") for path in sorted((folder / "jobs").glob("*.json"))]
    states = {name: read_state(folder, name) for name in names}
    return {name: state.seconds for name, state in states.items() if state is not None and state.ended}


def check_finished(plan: Plan, folder: Path, recipes: Path) -> None:
    """Refuse a plan in which a run that has begun has other settings.

    Raises:
        ValueError: names the run, the setting, and what it was and is.
    """
    for cell in plan.cells:
        job = train_job(Commands((), (), ()), recipes, cell)
        state = read_state(folder, job.name)
        if state is None or cell.label in plan.waiting or state.identity == job.identity:
            continue
        was, now = _flat(state.identity), _flat(job.identity)
        key = next(key for key in {**dict.fromkeys(_TOLD_FIRST), **was, **now} if was.get(key) != now.get(key))
        what = "is finished" if state.ended else "has begun"
        raise ValueError(
            f"{cell.name} {what} with {key}={was.get(key)!r}, and the study now says {now.get(key)!r}: change it "
            f"back, give another --output, or remove {folder / 'runs' / cell.name} and its files in "
            f"{folder / 'jobs'} to train it again"
        )


def _flat(identity: dict[str, Any]) -> dict[str, Any]:
    return {**{k: v for k, v in identity.items() if k != "settings"}, **identity.get("settings", {})}


@dataclass
class Runner:
    """Runs a study's stages, one after the other.

    Attributes:
        beside: folder of the YAML file.
        say: is told what happens, in lines.
        trouble: what failed, diverged or was left out, by the job's name, and why.
    """

    study: Study
    folder: Path
    beside: Path
    recipes: Path
    commands: Commands
    launcher: Launcher
    keep_checkpoints: bool
    say: Callable[[str], None]
    trouble: dict[str, str] = field(default_factory=dict)
    plan: Plan = field(init=False)
    _left: int = 0

    def run(self) -> bool:
        """Do all that is left; whether everything is done."""
        self._plan()
        self._tune()
        self._left = self._count()
        groups = dict.fromkeys((cell.seed, cell.size) for cell in self.plan.cells)
        for seed, size in groups:
            group = [cell for cell in self.plan.cells if (cell.seed, cell.size) == (seed, size)]
            cells = [cell for cell in group if self._has_rates(cell)]
            self._stage(f"train-{size}-s{seed}", [train_job(self.commands, self.recipes, cell) for cell in cells])
            self._measure(f"{size}-s{seed}", cells)
            self._barriers(f"{size}-s{seed}", "methods", {cell.name for cell in group})
            self._remove_checkpoints(cells, last_too=False)
        self._barriers("seeds", "seeds", {cell.name for cell in self.plan.cells})
        self._remove_checkpoints(self.plan.cells, last_too=True)
        return not self.trouble

    def _plan(self) -> None:
        self.plan = load_plan(self.study, self.folder, self.beside, self.recipes)
        check_finished(self.plan, self.folder, self.recipes)
        with atomic_path(self.folder / "study.json") as temporary:
            temporary.write_text(json.dumps(plan_record(self.plan), indent=1) + "\n")

    def _tune(self) -> None:
        """Run the points that the searches ask for, all searches at once, until none asks."""
        gone: set[str] = set()
        while True:
            points: list[tuple[str, Point]] = [
                (label, point) for label, s in self.plan.searches.items() if label not in gone for point in s.coming
            ]
            if not points:
                break
            cells = [tuning_cell(self.plan, label, point) for label, point in points]
            jobs = [train_job(self.commands, self.recipes, cell) for cell in cells]
            self._left = len(jobs)
            self._stage("tuning", jobs, diverged_is_trouble=False)
            gone |= {cell.label for job, cell in zip(jobs, cells, strict=True) if job.name in self.trouble}
            self._plan()
            self._remove_tuned()
        self._remove_tuned()
        for label, state in self.plan.searches.items():
            if not state.coming and not state.bracketed:
                best = "every point diverged" if math.isinf(state.loss) else f"its best loss is {state.loss:.4g}"
                self.trouble[f"tuning of {label}"] = f"ended at its limit of points, {best}"

    def _remove_tuned(self) -> None:
        """Remove the weights of the points that are known: their losses are all that is needed."""
        for name in done_jobs(self.folder):
            if name.startswith("tuning-"):
                run = name.removesuffix(".train")
                self._remove(run, (*_WEIGHTS, "checkpoint-*", "publish/*.safetensors", "publish/native"))

    def _has_rates(self, cell: Cell) -> bool:
        if cell.label not in self.plan.waiting:
            return True
        source = self.study.method(cell.label).rates_of or cell.label
        if source not in self.plan.searches or cell.size not in self.study.tuned_sizes():
            return True
        self.trouble[f"{cell.name}.train"] = f"left out: the search for the rates of {source} did not end"
        return False

    def _measure(self, group: str, cells: Sequence[Cell]) -> None:
        trained = [cell for cell in cells if self.is_trained(cell.name)]
        measure, evaluate = [], []
        for cell in trained:
            baseline = self.plan.baseline(cell)
            if self.study.metrics is not None:
                state = None if baseline is None else read_state(self.folder, f"{baseline.name}.train")
                if baseline is not None and (state is None or not state.ended):
                    self.trouble[f"{cell.name}.measure"] = f"left out: its baseline {baseline.name} is not trained"
                else:
                    # one that diverged has nothing to compare with
                    name = baseline.name if baseline is not None and self.is_trained(baseline.name) else None
                    if measured_families(self.study.metrics.only, name) != []:
                        measure.append(measure_job(self.commands, self.plan, cell, name))
            if self.study.downstream is not None:
                evaluate.append(evaluate_job(self.commands, self.plan, cell))
        self._stage(f"measure-{group}", [job for job in measure if self._has_checkpoints(job)])
        self._stage(f"evaluate-{group}", [job for job in evaluate if self._has_checkpoints(job)])

    def _has_checkpoints(self, job: Job) -> bool:
        """Whether the checkpoints that a job needs are there; a finished job needs none."""
        state = read_state(self.folder, job.name)
        if state is not None and state.ended and state.identity == job.identity:
            return True
        for run in filter(None, (*job.runs, job.identity.get("baseline"))):
            missing = [s for s in job.identity["steps"] if not (self._run(run) / f"checkpoint-{s}").is_dir()]
            if missing:
                changed = "its settings have changed, and " if state is not None and state.ended else ""
                self.trouble[job.name] = (
                    f"left out: {changed}the checkpoint of step {missing[0]} of {run} is not there: put it back, or "
                    f"remove {run}'s files in jobs/ and runs/ to train it again"
                )
                return False
        return True

    def _barriers(self, group: str, kind: str, among: set[str]) -> None:
        jobs = []
        for pair in self.plan.pairs:
            runs = tuple(run for run in pair.runs if run in among and self.is_trained(run))
            if pair.kind == kind and set(pair.runs) <= among and len(runs) > 1:
                jobs.append(barriers_job(self.commands, self.plan, pair, runs))
        self._stage(f"barriers-{group}", jobs)

    def _stage(self, stage: str, jobs: Sequence[Job], diverged_is_trouble: bool = True) -> None:
        """Run the jobs of a stage that are not done."""
        todo = []
        for job in jobs:
            state = read_state(self.folder, job.name)
            if state is not None and state.ended and state.identity == job.identity:
                self._take(job, state, diverged_is_trouble)
            else:
                todo.append(job)
        running: list[str] = []

        def started(job: Job) -> None:
            running.append(job.name)
            self.say(f"started   {job.name}; running: {', '.join(running)}; left: {self._left}")

        def ended(job: Job) -> None:
            running.remove(job.name)
            self._left = max(0, self._left - 1)

        for job, state in self.launcher.run(stage, todo, started, ended) if todo else ():
            why = f": {state.reason}" if state.reason else ""
            self.say(f"{state.state:<9} {job.name} after {state.seconds:.0f} s; left: {self._left}{why}")
            self._take(job, state, diverged_is_trouble)

    def _take(self, job: Job, state: State, diverged_is_trouble: bool) -> None:
        if state.state == "failed" or (state.state == "diverged" and diverged_is_trouble):
            self.trouble[job.name] = f"{state.state}: {state.reason}"

    def _count(self) -> int:
        """Jobs that are not done."""
        done = done_jobs(self.folder)
        kinds = ["train"] + ["measure"] * (self.study.metrics is not None)
        kinds += ["evaluate"] * (self.study.downstream is not None)
        names = [f"{cell.name}.{kind}" for cell in self.plan.cells for kind in kinds]
        return sum(name not in done for name in (*names, *(pair.name for pair in self.plan.pairs)))

    def is_trained(self, run: str) -> bool:
        """Whether a run has ended without diverging."""
        state = read_state(self.folder, f"{run}.train")
        return state is not None and state.state == "done"

    def _run(self, run: str) -> Path:
        return self.folder / "runs" / run

    def _is_done(self, name: str) -> bool:
        state = read_state(self.folder, name)
        return state is not None and state.state == "done" and name not in self.trouble

    def _remove_checkpoints(self, cells: Sequence[Cell], last_too: bool) -> None:
        """Remove the checkpoints of runs that nothing needs any more.

        The reference's stay: a method that is added later is compared with them.
        """
        for cell in cells:
            if self.keep_checkpoints or cell.label == self.study.reference:
                continue
            needed = [f"{cell.name}.train"]
            needed += [f"{cell.name}.measure"] * (self.study.metrics is not None)
            needed += [f"{cell.name}.evaluate"] * (self.study.downstream is not None)
            pairs = [pair for pair in self.plan.pairs if cell.name in pair.runs]
            if last_too:
                needed += [pair.name for pair in pairs]
            if not all(self._is_done(name) for name in needed):
                continue
            last = () if last_too or not pairs else (f"checkpoint-{cell.saved[-1]}",)
            self._remove(cell.name, (*_WEIGHTS, "checkpoint-*"), last)

    def _remove(self, run: str, patterns: Sequence[str], but: Sequence[str] = ()) -> None:
        for path in (path for pattern in patterns for path in self._run(run).glob(pattern)):
            if path.name not in but:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
