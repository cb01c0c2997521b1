"""Measuring and evaluating a run with two processes beside one, each with one thread, in one run.

    python recipes/benchmarks/processes.py                        # trains a run on the embedded corpus first
    python recipes/benchmarks/processes.py --run runs/galore --rounds 3 --output processes.json

The contenders take turns in every round, each on a fresh copy of the run; what counts are the ratios of their medians.
A process spends seconds on imports before it does any work. The ratio is shown with these seconds, as a user waits for
them, and without them: the seconds until a command that has no work left ends are taken off both.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PRETRAIN = Path(__file__).parents[1] / "pretrain.py"
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
PARTS = {
    "measure": ["measure", "run", "--only", "loss,spectral,interpolation,curvature,landscape", "--sequences", "4"],
    "evaluate": ["evaluate", "run", "--tasks", "quick", "--checkpoints", "all", "--limit", "100"],
}


def train(folder: Path, steps: int) -> Path:
    """A run of the recipe's embedded default with eight checkpoints."""
    words = ["--max_steps", steps, "--save_steps", max(1, steps // 8), "--output_dir", folder / "run"]
    words += ["--eval_strategy", "no", "--metrics", "none"]
    subprocess.run([sys.executable, PRETRAIN, *map(str, words)], check=True, stdout=subprocess.DEVNULL)
    return folder / "run"


def seconds(folder: Path, processes: int, part: str) -> float:
    """How long a command takes in a folder that holds the run."""
    launch = LAUNCH if processes == 2 else []
    command = [sys.executable, *launch, "-m", "hf_lowrank", *PARTS[part], "--device", "cpu"]
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"{part} with {processes} processes failed:\n{done.stderr[-3000:]}")
    return time.perf_counter() - start


def benchmark(run: Path, part: str, rounds: int) -> dict[str, Any]:
    """Seconds of one and two processes, with all the work and with none left, by round; and their ratios."""
    times: dict[str, list[float]] = {f"{n} {kind}": [] for n in (1, 2) for kind in ("in all", "without work")}
    for _ in range(rounds):
        for processes in (1, 2):
            with tempfile.TemporaryDirectory() as folder:
                shutil.copytree(run, Path(folder) / "run")
                times[f"{processes} in all"].append(seconds(Path(folder), processes, part))
                times[f"{processes} without work"].append(seconds(Path(folder), processes, part))
    medians = {name: statistics.median(values) for name, values in times.items()}
    alone, two = (medians[f"{n} in all"] - medians[f"{n} without work"] for n in (1, 2))
    ratios = {"imports included": medians["2 in all"] / medians["1 in all"], "imports excluded": two / alone}
    return {"seconds": medians, "rounds": times, "ratios": ratios}


def show(part: str, result: dict[str, Any]) -> None:
    """Print a part's numbers."""
    table = Table(title=f"{part}, one thread a process", title_justify="left")
    for column in ("processes", "in all", "without work"):
        table.add_column(column, justify="right")
    for processes in (1, 2):
        values = [result["seconds"][f"{processes} {kind}"] for kind in ("in all", "without work")]
        table.add_row(str(processes), *(f"{value:.1f} s" for value in values))
    console = Console(width=140)
    console.print(table)
    console.print(*(f"two over one, {name}: {value:.2f}" for name, value in result["ratios"].items()), sep="\n")


def main() -> None:
    """Run the parts that were asked for, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, default=None, help="a run with checkpoints; default: one is trained")
    parser.add_argument("--steps", type=int, default=40, help="steps of the run that is trained")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=None, help="JSON file")
    options = parser.parse_args()
    result: dict[str, Any] = {"cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as folder:
        run = options.run or train(Path(folder), options.steps)
        for part in options.parts:
            result[part] = benchmark(run, part, options.rounds)
            show(part, result[part])
            if options.output is not None:
                options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
