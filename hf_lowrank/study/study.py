"""`run_study`: a study from its file, planned, run and analysed in its folder."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_lowrank.options import StudyOptions
from hf_lowrank.study.calibrate import calibrate, read_costs
from hf_lowrank.study.forecast import Costs, Forecast, forecast
from hf_lowrank.study.jobs import Commands, locked
from hf_lowrank.study.launch import Local, Submitted, devices, slot
from hf_lowrank.study.plan import Cell, Plan, check_cells
from hf_lowrank.study.runner import Runner, check_finished, done_jobs, load_plan
from hf_lowrank.study.spec import read_study

__all__ = ["analyse_study", "forecast_lines", "recipe_tokens", "run_study"]

Say = Callable[[str], None]


def recipe_tokens(recipes: Path, processes: int) -> Callable[[Cell, list[str]], int]:
    """A function that reads a run's command line as pretrain.py does, and gives the tokens of an optimizer step.

    Raises:
        ValueError: from the function: a flag is unknown, a value makes no sense, or a batch cannot be shared.
    """
    from hf_lowrank.arguments import parse_recipe

    def tokens(cell: Cell, words: list[str]) -> int:
        recipe = parse_recipe(words, recipes / "configs")
        args = recipe.training
        sequences = recipe.recipe.total_batch_size
        if sequences is None:
            sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
        if sequences % processes:
            raise ValueError(f"total_batch_size={sequences} cannot be shared among processes={processes}")
        return sequences * recipe.data.sequence_length

    return tokens


def analyse_study(folders: list[Path], output: Path) -> str:
    """Analyse the reports in folders; a line that says where the analysis is."""
    # scipy, scikit-learn and matplotlib are not needed to plan
    from hf_lowrank.study.analysis import analyse

    analyse(folders, output)
    return f"{os.path.relpath(output)} holds the analysis"


def run_study(
    path: Path,
    options: StudyOptions,
    say: Say,
    commands: Commands | None = None,
    tokens: Callable[[Cell, list[str]], int] | None = None,
    cluster: str = "slurm",
    analyse: Callable[[list[Path], Path], str] = analyse_study,
) -> bool:
    """Run a study, or with `options.dry_run` plan it; the same call goes on where an earlier one ended.

    Args:
        path: of the YAML file.
        say: is told what happens, in lines.
        commands: of the jobs; default: pretrain.py and `hf-lowrank`.
        tokens: as `recipe_tokens` gives it, which is the default.
        cluster: submitit's name of it, for `options.launcher` slurm.
        analyse: is called at the end with the study's folder, and returns a line.

    Returns:
        Whether everything is done; False if a run failed, diverged or was left out.

    Raises:
        ValueError: the file makes no sense, another command writes the folder, or the plan contradicts what is there.
    """
    study = read_study(path)
    recipes = (path.parent / study.recipes).resolve()
    folder = (options.output or Path("studies") / path.stem).resolve()
    tokens = tokens or recipe_tokens(recipes, study.processes)
    commands = commands or Commands.of(recipes, study.processes)
    plan = load_plan(study, folder, path.parent, recipes)
    counted = check_cells(plan, recipes, tokens)
    check_finished(plan, folder, recipes)
    try:
        with locked(folder / "study.lock", wait=False) as lock:
            if options.dry_run:
                steps = {cell.size: counted[cell.name] // cell.steps for cell in reversed(plan.cells)}
                environment = slot(options.jobs, ",".join(devices()[: study.processes]))
                costs = calibrate(plan, recipes, folder, commands, steps, environment, say, lock)
                _say_plan(plan, counted, costs, folder, options, say)
                return True
            if options.launcher == "slurm":
                launcher: Any = Submitted(folder, options.jobs, study.slurm, cluster)
            else:
                launcher = Local(folder, options.jobs, study.processes, lock)
            runner = Runner(study, folder, path.parent, recipes, commands, launcher, options.keep_checkpoints, say)
            _say_plan(plan, counted, read_costs(folder), folder, options, say)
            complete = runner.run()
            _say_end(runner, folder, say)
            try:
                say(analyse([folder], folder / "analysis"))
            except ValueError as error:
                complete = False
                say(f"no analysis: {error}")
    except BlockingIOError:
        raise ValueError(f"{folder} is being written by another command: wait for it, or end it") from None
    return complete


def _say_plan(
    plan: Plan, tokens: dict[str, int], costs: dict[str, Costs], folder: Path, options: StudyOptions, say: Say
) -> None:
    done = done_jobs(folder)
    say(f"{plan.study.title}: {len(plan.cells)} runs in {folder}")
    for label in plan.study.labels:
        cells = [cell for cell in plan.cells if cell.label == label]
        finished = sum(f"{cell.name}.train" in done for cell in cells)
        seeds = ", ".join(map(str, dict.fromkeys(cell.seed for cell in cells)))
        say(f"  {label}: {len(cells)} runs, {finished} done; seeds {seeds}; {_rates_line(plan, label)}")
    for line in forecast_lines(forecast(plan, tokens, costs, done, options.keep_checkpoints), options.jobs):
        say(line)


def _rates_line(plan: Plan, label: str) -> str:
    source = plan.study.method(label).rates_of or label
    if source in plan.searches:
        state = plan.searches[source]
        rate, scale = plan.grids[source].settings(state.best)
        points = plan.points[source]
        if state.coming:
            return f"rates of {source} are searched ({points} points known)"
        return f"rates {rate:g} and {rate * scale:g} from {points} points of {source}'s search"
    return f"rates of {source}'s recipe and settings"


def forecast_lines(left: Forecast, jobs: int) -> list[str]:
    """A forecast in words."""
    tuning = f", of which {left.tuning} tune rates (an estimate)" if left.tuning else ""
    lines = [f"to train: {left.runs} of {left.all_runs} runs{tuning}, {left.tokens / 1e6:.1f} million tokens"]
    if left.seconds is None or left.kept is None or left.peak is None:
        return [*lines, "hours and disk are not known yet: --dry-run measures a few steps of each size"]
    hours = left.seconds / 3600
    lines.append(f"about {hours / jobs:.1f} hours with --jobs {jobs} ({hours:.1f} hours of one job after the other)")
    lines.append(f"disk: {left.kept / 1e9:.2f} GB at the end, {left.peak / 1e9:.2f} GB at most")
    return lines


def _say_end(runner: Runner, folder: Path, say: Say) -> None:
    plan = runner.plan
    trained = sum(runner.is_trained(cell.name) for cell in plan.cells)
    say(f"{trained} of {len(plan.cells)} runs are trained; study.json, runs/ and logs/ are in {folder}")
    for name, why in runner.trouble.items():
        say(f"  {name} {why}")
    if runner.trouble:
        say("the same command tries again what failed or was left out")
