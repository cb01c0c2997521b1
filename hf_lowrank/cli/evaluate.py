"""`hf-lowrank evaluate`: progress and a table on the terminal."""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import datasets
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from hf_lowrank.downstream.evaluate import evaluate
from hf_lowrank.downstream.watcher import Failure, Watcher
from hf_lowrank.machine import keep_freed_memory
from hf_lowrank.options import EvaluateOptions
from hf_lowrank.report.tables import format_value

__all__ = ["run_evaluate"]


class _Bar(Watcher):
    """A progress bar over the harness's calls; what goes wrong is printed above it."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task = progress.add_task("reading tasks", total=None)
        self.begun, self.passes, self.label = 0, 0, ""

    def total(self, calls: int) -> None:
        self.progress.update(self.task, total=calls)

    def call(self, label: str, done: bool) -> None:
        self.label = f"{label}{' (done before)' if done else ''}"
        self.progress.update(self.task, completed=self.begun, description=self.label)
        self.begun, self.passes = self.begun + 1, 0
        # a log file has no bar
        if not done and not self.progress.console.is_terminal:
            self._say(f"{self.begun}/{self.progress.tasks[self.task].total:.0f} {label}", "")

    def forward(self) -> None:
        self.passes += 1
        self.progress.update(self.task, description=f"{self.label} \\[{self.passes}]")

    def failed(self, failure: Failure) -> None:
        where = "" if failure.run is None else f"{failure.run} step {failure.step} "
        self._say(f"{where}{failure.task}: not evaluated: {failure.reason}", "red")

    def note(self, text: str) -> None:
        self._say(text, "yellow")

    def _say(self, text: str, style: str) -> None:
        self.progress.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def run_evaluate(runs: list[str], options: EvaluateOptions) -> int:
    """Evaluate runs on tasks, print the results; return how many tasks failed.

    Raises:
        ValueError: an argument makes no sense; the message names it.
    """
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = replace(options, device=device)
    datasets.disable_progress_bars()
    # warnings of the tokenizers about forks, which the harness's bootstrap makes
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if device == "cpu":
        keep_freed_memory()
    # the harness's prints are kept from standard output, and with them whatever is not bound to it now
    # a file or a pipe has no width: lines in it are to be found by the tasks' names
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, redirect_stdout=False, redirect_stderr=False) as progress:
        found, failures = evaluate(runs, options, _Bar(progress))
        progress.update(progress.task_ids[0], completed=progress.tasks[0].total, description="evaluated")
    for run, entries in found:
        console.print(_table(run.name, entries))
        if (run.output / "publish" / "report.json").is_file():
            console.print(f"{run.output / 'publish'} holds report and card", markup=False)
    _print_failures(failures, console)
    return len(failures)


def _print_failures(failures: Sequence[Failure], console: Console) -> None:
    if failures:
        names = ", ".join(dict.fromkeys(failure.task for failure in failures))
        console.print(f"{len(failures)} evaluations failed, for the reasons above: {names}", style="red", markup=False)


def _table(name: str, entries: list[dict[str, Any]]) -> Table:
    columns = ("step", "task", "metric", "value", "chance", "items", "few-shot", "seeds", "")
    cells = [_cells(entry) for entry in entries]
    # a column that says nothing takes room from the names
    shown = [i for i in range(len(columns)) if any(row[i] for row in cells)]
    table = Table(title=name, title_justify="left")
    for i in shown:
        table.add_column(columns[i], overflow="fold", no_wrap=columns[i] in ("task", "value"))
    for row in cells:
        table.add_row(*(row[i] for i in shown))
    return table


def _cells(entry: dict[str, Any]) -> list[str]:
    settings = entry.get("settings") or {}
    seeds, cut = settings.get("seeds") or [], settings.get("truncated_requests")
    return [
        *(str(entry["step"]), entry["task"], entry["metric"], format_value(entry["value"], entry["stderr"])),
        f"{settings['chance']:.4g}" if "chance" in settings else "",
        str(settings.get("samples", "")),
        str(entry["num_fewshot"] or ""),
        ", ".join(str(seed) for seed in seeds if isinstance(seed, int)),
        f"{cut} requests cut" if cut else settings.get("note", ""),
    ]
