"""`hf-lowrank measure`: words of the command line into options, progress and a summary on the terminal."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
from rich.console import Console

from hf_lowrank.data import DataArguments
from hf_lowrank.families.presets import PRESETS
from hf_lowrank.families.records import FAMILIES
from hf_lowrank.machine import launched, own_device
from hf_lowrank.measure.measure import MeasureOptions, measure
from hf_lowrank.measure.progress import ProgressBar
from hf_lowrank.methods.base import nearest
from hf_lowrank.report import read_report
from hf_lowrank.report.terminal import headline_table

__all__ = ["run_measure"]


def _families(only: str | None) -> tuple[str, ...]:
    if only is None:
        return FAMILIES
    chosen = [name.strip() for name in only.split(",") if name.strip()]
    for name in chosen:
        if name not in FAMILIES:
            known = list(FAMILIES)
            raise ValueError(f"--only {name}{nearest(name, known)}: the families are {', '.join(known)}")
    if not chosen:
        raise ValueError(f"--only {only!r} names nothing: the families are {', '.join(FAMILIES)}")
    return tuple(name for name in FAMILIES if name in chosen)


def _steps(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(step) for step in text.split(","))
    except ValueError:
        raise ValueError(f"--steps {text}: give whole numbers with commas, 70,140 for example") from None


def _data(given: dict[str, Any]) -> DataArguments | None:
    known = {key: value for key, value in given.items() if value is not None}
    if not known:
        return None
    if not known.keys() & {"dataset_name", "dataset_path"}:
        raise ValueError(f"--{min(known).replace('_', '-')} needs --dataset-name or --dataset-path: name the data")
    return DataArguments(**known)


def run_measure(
    runs: list[str],
    baseline: str | None,
    *,
    only: str | None,
    preset: str,
    sequences: int | None,
    steps: str | None,
    batch_size: int,
    device: str | None,
    output: Path | None,
    data: dict[str, Any],
) -> int:
    """Measure as the command line says, print the headline metrics; return how many units failed.

    Raises:
        ValueError: an argument makes no sense; the message names it.
    """
    if preset not in PRESETS:
        raise ValueError(f"--preset {preset}{nearest(preset, list(PRESETS))}: the presets are {', '.join(PRESETS)}")
    chosen = PRESETS[preset] if sequences is None else replace(PRESETS[preset], sequences=sequences)
    if chosen.sequences < 1 or batch_size < 1:
        raise ValueError(f"--sequences {sequences}, --batch-size {batch_size}: give 1 or more")
    options = MeasureOptions(
        families=_families(only),
        preset=chosen,
        batch_size=batch_size,
        steps=_steps(steps),
        data=_data(data),
        device=own_device(device),
        output=output,
    )
    datasets.disable_progress_bars()
    # of several processes the first one speaks
    console = Console(quiet=launched()[0] > 0)
    if baseline is None and "activation" in options.families:
        if only is not None:
            raise ValueError("--only activation compares with a full-rank run: name it with --baseline")
        console.print("no --baseline: activations and barriers to a full-rank run are left out")
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
