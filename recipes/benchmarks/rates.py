"""Tune the two learning rates of every method by one rule, then train each method with three other seeds.

    python recipes/benchmarks/rates.py                                # goes on in rates.jsonl beside this file: hours
    python recipes/benchmarks/rates.py --output mine.jsonl --methods fullrank galore --jobs 2
    python recipes/benchmarks/rates.py --summary                      # what is there, without a run

Every run is `recipes/pretrain.py` on the embedded corpus with one thread. A run that has finished is one line of JSON
in the output file; a command that was cut off goes on from there when it is given again. The runs of one seed see the
same sequences in the same order and start from the same weights, if the method starts from weights at all, so that
differences between methods are taken by seed.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_lowrank.study.search import RULE, Grid, Search, search

PRETRAIN = Path(__file__).parents[1] / "pretrain.py"
RESULTS = Path(__file__).with_suffix(".jsonl")
TUNING_SEED, SEEDS = 0, (1, 2, 3)
# recipe of the size tiny -> where its search starts: rate of the targets, of everything else
STARTS = {
    "fullrank": (1e-3, 1e-2),
    "galore": (1e-2, 1e-2),
    "fira": (1e-2, 1e-2),
    "frugal": (1e-3, 3e-3),
    "apollo": (3e-3, 1e-2),
    "sltrain": (3e-3, 1e-2),
    "cola": (6e-3, 1e-2),
    "relora": (3e-3, 1e-2),
    "lora": (3e-3, 1e-2),
    "apollo_mini": (3e-3, 1e-2),
    "muon": (3e-3, 1e-2),
    "lowrank": (3e-3, 1e-2),
    "stable_spam": (3e-3, 1e-2),
    "loro": (1e-2, 1e-2),
}


@dataclass(frozen=True)
class Run:
    """A run, by what tells it from the others."""

    recipe: str
    steps: int
    seed: int
    learning_rate: float
    other_lr_scale: float


class Results:
    """The finished runs in a file of one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.losses: dict[Run, tuple[float, float]] = {}
        self.seconds: dict[Run, float] = {}
        text = path.read_text() if path.is_file() else ""
        whole, _, cut_off = text.rpartition("\n")
        if cut_off:
            # the process was killed while it wrote the line
            path.write_text(whole + "\n" * bool(whole))
        for line in whole.splitlines():
            self._take(json.loads(line))

    def _take(self, record: dict[str, Any]) -> None:
        run = Run(**{key: record[key] for key in Run.__dataclass_fields__})
        numbers = (record["validation_loss"], record["stderr"])
        # JSON has no NaN: a run that diverged has null
        self.losses[run] = tuple(math.nan if number is None else number for number in numbers)  # type: ignore[assignment]
        self.seconds[run] = record["seconds"]

    def add(self, run: Run, loss: float | None, stderr: float | None, seconds: float) -> None:
        """Keep a finished run, in memory and in the file."""
        found = {"validation_loss": loss, "stderr": stderr, "seconds": round(seconds, 1)}
        record = {"size": "tiny", **asdict(run), **found}
        self._take(record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def searched(results: Results, recipe: str, steps: int, ratio: float) -> tuple[Search, Grid]:
    """Where the search for a recipe's rates stands."""
    grid, losses = Grid(*STARTS[recipe], ratio), {}
    for run, (loss, _) in results.losses.items():
        point = grid.point(run.learning_rate, run.other_lr_scale)
        if (run.recipe, run.steps, run.seed) == (recipe, steps, TUNING_SEED) and point is not None:
            losses[point] = loss
    return search(losses), grid


def ready(results: Results, recipes: list[str], steps: int, ratio: float) -> Iterator[Run]:
    """The runs that can start now: the points that the searches ask for, and the seeds of those that have ended."""
    for recipe in recipes:
        state, grid = searched(results, recipe, steps, ratio)
        for point in state.coming:
            yield Run(recipe, steps, TUNING_SEED, *grid.settings(point))
        for seed in SEEDS if state.bracketed else ():
            run = Run(recipe, steps, seed, *grid.settings(state.best))
            if run not in results.losses:
                yield run


def train(run: Run, folder: Path, flags: list[str]) -> tuple[float | None, float | None, float]:
    """Train; validation loss, its standard error (None: it diverged) and seconds. `RuntimeError` if that fails."""
    values = {
        "learning_rate": run.learning_rate, "other_lr_scale": run.other_lr_scale, "max_steps": run.steps,
        "seed": run.seed, "data_seed": run.seed, "eval_steps": run.steps, "save_strategy": "no", "metrics": "none",
        "cpu_threads": 1, "output_dir": folder,
    }  # fmt: skip
    words = [str(word) for key, value in values.items() for word in (f"--{key}", value)]
    recipe = PRETRAIN.parent / "configs" / "tiny" / f"{run.recipe}.yaml"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, str(PRETRAIN), str(recipe), *words, "--use_cpu", "--overwrite", *flags]
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        raise RuntimeError(f"{run} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    metrics = json.loads((folder / "publish" / "report.json").read_text())["metrics"]
    (loss,) = [m for m in metrics if m["name"] == "validation_loss" and m["step"] == run.steps]
    shutil.rmtree(folder)
    return loss["value"], loss["stderr"], seconds


def work(results: Results, recipes: list[str], options: argparse.Namespace, flags: list[str]) -> None:
    """Train until every search has ended and every seed is there."""
    with ThreadPoolExecutor(options.jobs) as pool:
        while runs := list(ready(results, recipes, options.steps, options.ratio))[: options.jobs]:
            folders = [options.runs / f"{run.recipe}-{job}" for job, run in enumerate(runs)]
            futures = [pool.submit(train, run, folder, flags) for run, folder in zip(runs, folders, strict=True)]
            for run, future in zip(runs, futures, strict=True):
                results.add(run, *future.result())
                print(run, results.losses[run][0], flush=True)


def summary(results: Results, recipes: list[str], steps: int, ratio: float) -> str:
    """What was found, as Markdown: the rule, and each recipe's rates and losses beside the first recipe's, by seed."""
    lines = [RULE, "", f"Neighbouring rates differ by a factor of {ratio:g}; {steps} steps; seed {TUNING_SEED}.", ""]
    lines += ["| recipe | start | learning rate | others' | points | minutes | loss | loss by seed | mean | paired |"]
    lines += ["|" + " --- |" * 10]
    reference: dict[int, float] = {}
    for recipe in recipes:
        state, grid = searched(results, recipe, steps, ratio)
        own = [run for run in results.losses if (run.recipe, run.steps) == (recipe, steps)]
        rate, scale = grid.settings(state.best)
        final = {seed: results.losses.get(Run(recipe, steps, seed, rate, scale), (math.nan,))[0] for seed in SEEDS}
        reference = reference or final
        cells = [
            recipe,
            " / ".join(f"{value:g}" for value in STARTS[recipe]),
            f"{rate:g}" + " (unfinished)" * (not state.bracketed),
            f"{scale:g}",
            str(sum(run.seed == TUNING_SEED for run in own)),
            f"{sum(results.seconds[run] for run in own) / 60:.0f}",
            f"{state.loss:.3f}",
            ", ".join("" if math.isnan(loss) else f"{loss:.3f}" for loss in final.values()),
            mean_error(list(final.values())),
            mean_error([final[seed] - reference[seed] for seed in SEEDS]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean_error(values: list[float]) -> str:
    """Mean and standard error over seeds; nothing if a seed is missing."""
    if any(math.isnan(value) for value in values):
        return ""
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}"


def main() -> None:
    """Read the arguments, do what is left to do, print what was found; further flags are the recipe's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="the file of finished runs")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "rates", help="folder for the runs under way")
    parser.add_argument("--methods", nargs="+", choices=list(STARTS), default=list(STARTS), metavar="RECIPE")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--ratio", type=float, default=3.0, help="of two neighbouring rates")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--summary", action="store_true", help="train nothing")
    options, flags = parser.parse_known_args()
    results = Results(options.output)
    if not options.summary:
        work(results, options.methods, options, flags)
    print(summary(results, options.methods, options.steps, options.ratio))


if __name__ == "__main__":
    main()
