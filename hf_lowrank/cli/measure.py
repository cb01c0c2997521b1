"""`hf-lowrank measure`: progress and a summary on the terminal."""

from dataclasses import replace

import datasets
from rich.console import Console

from hf_lowrank.families import families
from hf_lowrank.machine import launched, own_device
from hf_lowrank.measure.measure import measure
from hf_lowrank.measure.progress import ProgressBar
from hf_lowrank.options import MeasureOptions
from hf_lowrank.report.io import read_report
from hf_lowrank.report.terminal import headline_table

__all__ = ["run_measure"]


def run_measure(runs: list[str], baseline: str | None, options: MeasureOptions) -> int:
    """Measure runs, print the headline metrics; return how many units failed.

    Raises:
        ValueError: an argument makes no sense; the message names it.
    """
    # wrong words are an error before anything is read
    chosen, _, _ = options.chosen_families, options.settings, options.data
    options = replace(options, device=own_device(options.device))
    datasets.disable_progress_bars()
    # of several processes the first one speaks
    console = Console(quiet=launched()[0] > 0)
    comparing = ", ".join(name for name in chosen if families()[name].needs_baseline)
    if baseline is None and comparing:
        if options.families is not None:
            raise ValueError(f"--only {comparing} compares with a full-rank run: name it with --baseline")
        console.print(f"no --baseline: {comparing} and barriers to a full-rank run are left out")
    with ProgressBar(console, "measured") as progress:
        measured, failures = measure(runs, baseline, options, progress)
    # the others must not end the launch while the first one writes
    if launched()[0] > 0:
        return 0
    for run in measured:
        console.print(headline_table(read_report(run.output), run.name))
        console.print(f"{run.output / 'publish'} holds report, tables, figures and card", markup=False)
    if failures:
        console.print(f"{failures} measurements failed: their rows say why", style="red")
    return failures
