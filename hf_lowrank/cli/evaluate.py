"""`hf-lowrank evaluate`: progress and a table on the terminal."""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import datasets
from rich.console import Console
from rich.table import Table

from hf_lowrank.downstream.evaluate import evaluate
from hf_lowrank.machine import launched, own_device
from hf_lowrank.measure.progress import Failure, ProgressBar
from hf_lowrank.options import EvaluateOptions
from hf_lowrank.report.values import format_value

__all__ = ["run_evaluate"]


def run_evaluate(runs: list[str], options: EvaluateOptions) -> int:
    """Evaluate runs on tasks, print the results; return how many tasks failed.

    Raises:
        ValueError: an argument makes no sense; the message names it.
    """
    options = replace(options, device=own_device(options.device))
    datasets.disable_progress_bars()
    # warnings of the tokenizers about forks, which the harness's bootstrap makes
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # the harness's prints are kept from standard output, and with them whatever is not bound to it now
    # a file or a pipe has no width: lines in it are to be found by the tasks' names
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160
    # of several processes the first one speaks
    console = Console(file=sys.stdout, width=width, quiet=launched()[0] > 0)
    with ProgressBar(console, "evaluated") as progress:
        evaluated, failures = evaluate(runs, options, progress)
    # the others must not end the launch while the first one writes
    if launched()[0] > 0:
        return 0
    for run, entries in evaluated:
        console.print(_table(run.name, entries))
        if (run.output / "publish" / "report.json").is_file():
            console.print(f"{run.output / 'publish'} holds report and card", markup=False)
    _print_failures(failures, console)
    return len(failures)


def _print_failures(failures: Sequence[Failure], console: Console) -> None:
    if failures:
        names = ", ".join(dict.fromkeys(failure.name for failure in failures))
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
    settings, about = entry["settings"], entry["about"]
    seeds, cut = settings.get("seeds") or [], about.get("truncated_requests")
    return [
        *(str(entry["step"]), entry["task"], entry["metric"], format_value(entry["value"], entry["stderr"])),
        f"{about['chance']:.4g}" if "chance" in about else "",
        str(settings.get("samples", "")),
        str(entry["num_fewshot"] or ""),
        ", ".join(str(seed) for seed in seeds if isinstance(seed, int)),
        f"{cut} requests cut" if cut else about.get("note", ""),
    ]
