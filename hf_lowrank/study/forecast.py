"""What a study will cost: runs, tokens, hours and disk, from a short calibration and from finished runs."""

from collections.abc import Mapping
from dataclasses import dataclass

from hf_lowrank.study.plan import Cell, Plan
from hf_lowrank.study.spec import Checkpoints

__all__ = ["SEARCH_POINTS", "Costs", "Forecast", "forecast", "measured_steps"]

# points that a search takes where nothing is known: five if its start is the best, and two for a step away from it
SEARCH_POINTS = 7


@dataclass(frozen=True)
class Costs:
    """What the work on a run of a size costs, as measured on this machine.

    Attributes:
        start: seconds of a training before its first step and after its last one.
        step: seconds of an optimizer step.
        measure, evaluate: seconds a checkpoint.
        pair: seconds of the barriers between two runs.
        checkpoint, publish: bytes of a checkpoint, and of what a finished run keeps.
    """

    start: float
    step: float
    measure: float
    evaluate: float
    pair: float
    checkpoint: int
    publish: int


@dataclass(frozen=True)
class Forecast:
    """What is left of a study.

    Attributes:
        runs: trainings to come, of `all_runs`.
        tuning: of these, trainings of searches; an estimate while a search goes on.
        tokens: of the trainings to come.
        seconds: of one job after the other; None if a size has not been calibrated.
        kept, peak: bytes at the end, and at most on the way; None likewise.
    """

    runs: int
    all_runs: int
    tuning: int
    tokens: int
    seconds: float | None
    kept: int | None
    peak: int | None


def measured_steps(wanted: Checkpoints, cell: Cell) -> tuple[int, ...]:
    """The steps of a run's checkpoints that are measured, or evaluated."""
    if isinstance(wanted, str):
        return cell.saved if wanted == "all" else cell.saved[-1:]
    return tuple(sorted(wanted))


def forecast(
    plan: Plan,
    tokens: Mapping[str, int],
    costs: Mapping[str, Costs],
    done: Mapping[str, float],
    keep_checkpoints: bool,
) -> Forecast:
    """Predict what is left.

    Args:
        tokens: of each run, by its name.
        costs: by size.
        done: seconds of the finished jobs, by name (`<run>.train`, `.measure`, `.evaluate`, a pair's name).
        keep_checkpoints: whether measured checkpoints stay.
    """
    left = [cell for cell in plan.cells if f"{cell.name}.train" not in done]
    searched = _points_left(plan)
    tuning = sum(searched.values())
    sums = {"runs": len(left) + tuning, "all_runs": len(plan.cells) + tuning, "tuning": tuning}
    to_train = sum(tokens[cell.name] for cell in left)
    if plan.study.tuning is not None:
        for label, points in searched.items():
            size = plan.study.tuning.size
            to_train += points * next(tokens[c.name] for c in plan.cells if (c.label, c.size) == (label, size))
    if set(plan.study.sizes) - costs.keys():
        return Forecast(**sums, tokens=to_train, seconds=None, kept=None, peak=None)
    seconds = sum(_seconds(plan, cell, costs[cell.size], done) for cell in plan.cells)
    if plan.study.tuning is not None:
        of_size = costs[plan.study.tuning.size]
        steps = plan.study.steps_at(plan.study.tuning.size)
        seconds += tuning * (of_size.start + steps * of_size.step)
    for pair in plan.pairs:
        if pair.name not in done:
            seconds += costs[pair.size].pair * len(pair.runs) * (len(pair.runs) - 1)
    kept, peak = _disk(plan, costs, keep_checkpoints)
    return Forecast(**sums, tokens=to_train, seconds=seconds, kept=kept, peak=peak)


def _points_left(plan: Plan) -> dict[str, int]:
    """Trainings that each search will still need."""
    return {
        label: max(len(state.coming), SEARCH_POINTS - plan.points[label]) if state.coming else 0
        for label, state in plan.searches.items()
    }


def _seconds(plan: Plan, cell: Cell, costs: Costs, done: Mapping[str, float]) -> float:
    """Seconds that a run still takes: of a finished run of the same method and size, or as calibrated."""
    study, total = plan.study, 0.0
    alike = [other.name for other in plan.cells if (other.label, other.size) == (cell.label, cell.size)]
    calibrated = {"train": costs.start + cell.steps * costs.step}
    if study.metrics is not None:
        calibrated["measure"] = costs.measure * len(measured_steps(study.metrics.checkpoints, cell))
    if study.downstream is not None:
        calibrated["evaluate"] = costs.evaluate * len(measured_steps(study.downstream.checkpoints, cell))
    for kind, seconds in calibrated.items():
        if f"{cell.name}.{kind}" not in done:
            known = [done[key] for name in alike if (key := f"{name}.{kind}") in done]
            total += sum(known) / len(known) if known else seconds
    return total


def _disk(plan: Plan, costs: Mapping[str, Costs], keep_checkpoints: bool) -> tuple[int, int]:
    """Bytes at the end, and at most: a run's checkpoints are there until what needs them is measured.

    The runs of one seed and size are trained together. The reference's checkpoints stay, since a method that is added
    later is compared with them. Of a run that is measured only the last checkpoint waits for
    its barriers.
    """
    kept = peak = 0
    waiting = {name for pair in plan.pairs for name in pair.runs}
    for seed, size in dict.fromkeys((cell.seed, cell.size) for cell in plan.cells):
        group = [cell for cell in plan.cells if (cell.seed, cell.size) == (seed, size)]
        checkpoint, publish = costs[size].checkpoint, costs[size].publish
        peak = max(peak, kept + sum(publish + len(cell.saved) * checkpoint for cell in group))
        for cell in group:
            stays = len(cell.saved) if keep_checkpoints or cell.label == plan.study.reference else 0
            kept += publish + checkpoint * (stays or int(cell.name in waiting))
    peak = max(peak, kept)
    if not keep_checkpoints:
        for cell in plan.cells:
            if cell.name in waiting and cell.label != plan.study.reference:
                kept -= costs[cell.size].checkpoint
    return kept, peak
