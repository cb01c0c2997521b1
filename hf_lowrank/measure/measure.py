"""Every metric over every checkpoint of runs; each result is written as soon as it is there.

The work is a list of units: a family of metrics, a checkpoint, what it is compared with. A unit is done when its
fingerprint, of settings, sequences and weights, stands in the run's `measured.json`. A measurement that was killed
continues with the units that are not done.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from hf_lowrank.families import Measurement, PartialError, Record, Unit
from hf_lowrank.families.family import get_family
from hf_lowrank.families.records import metrics_folder, read_measurement, write_measurement
from hf_lowrank.machine import launched
from hf_lowrank.measure.progress import Failure, Progress
from hf_lowrank.measure.runner import LOCK, Job, Work, run_jobs
from hf_lowrank.measure.source import RunSource, open_run, open_runs, rows_of
from hf_lowrank.measure.units import RunUnits
from hf_lowrank.measure.write import write_run, write_tables_across_runs
from hf_lowrank.metrics.sequences import EvaluationSet
from hf_lowrank.options import MeasureOptions
from hf_lowrank.report.files import atomic_path

__all__ = ["measure"]

logger = logging.getLogger(__name__)

STATE = "measured.json"
# is raised when a metric's meaning changes, so that earlier numbers are measured again
VERSION = 2


def measure(
    sources: list[str], baseline: str | None, options: MeasureOptions, progress: Progress | None = None
) -> tuple[list[RunSource], int]:
    """Measure runs; see `MeasureOptions`.

    Activations and cross-method barriers refer to the baseline; with several runs, barriers between all of them are
    measured at their last common step as well. A metric that fails on a checkpoint becomes a row with its reason, and
    the others are measured. In a launch of several processes each does some of the work, and the first one writes the
    reports.

    Args:
        sources: runs, as `open_run` takes them.
        baseline: the full-rank run; None to leave out what refers to it.
        options: what to measure and how.
        progress: is told what happens.

    Returns:
        The runs, and how many units failed.

    Raises:
        ValueError: a run, checkpoint or data set is not there, or the runs are of different sizes.
    """
    runs = open_runs(sources, options.output, options.token)
    reference = None if baseline is None else _same_or_opened(baseline, sources, runs, options)
    every_run = runs if reference is None or reference in runs else [*runs, reference]
    _tell_apart([*sources, str(baseline)], every_run)
    families, preset = options.chosen_families, options.settings
    if reference is None and all(get_family(name).needs_baseline for name in families):
        raise ValueError(f"{', '.join(families)}: compared with a baseline, and none is given: add --baseline RUN")
    device = options.device or "cpu"
    measured = [RunUnits(run, reference, [r for r in runs if r is not run], preset, device) for run in runs]
    units = [list(run_units.units(families, options.steps)) for run_units in measured]
    jobs = []
    # the baseline first: its numbers go into the others' reports
    for run_units, todo in sorted(zip(measured, units, strict=True), key=lambda item: item[0].run is not reference):
        if any(get_family(unit.family).sequences for unit in todo):
            rows = rows_of(run_units.run, options.data)
            run_units.few = EvaluationSet.from_dataset(rows, preset.sequences, options.batch_size)
            run_units.whole = EvaluationSet.from_dataset(rows, None, options.batch_size)
        work = [_Measuring(run_units, unit, todo) for unit in todo]
        jobs.append(Job(work, partial(write_run, run_units.run, baseline=reference), run_units.release))
    failures = run_jobs(jobs, runs[0].output / LOCK, progress or Progress())
    if len(every_run) > 1 and launched()[0] == 0:
        write_tables_across_runs(every_run, runs)
    return runs, len(failures)


def _tell_apart(sources: list[str], runs: list[RunSource]) -> None:
    """Runs of one name are called by where they lie."""
    names = [run.name for run in runs]
    for source, run in zip(sources, runs, strict=False):
        if names.count(run.name) > 1:
            run.name = source


def _same_or_opened(baseline: str, sources: list[str], runs: list[RunSource], options: MeasureOptions) -> RunSource:
    """The baseline, which may be one of the runs."""
    for source, run in zip(sources, runs, strict=True):
        if source == baseline or (Path(source).is_dir() and Path(source).resolve() == Path(baseline).resolve()):
            return run
    return open_run(baseline, token=options.token)


class _Measuring(Work):
    """A unit of a run's measurement, with what it leaves on disk: rows, records, and its mark in `measured.json`.

    Args:
        run_units: measures it.
        unit: what is measured.
        units: all units of the run, in the order in which their results are written.
    """

    def __init__(self, run_units: RunUnits, unit: Unit, units: list[Unit]) -> None:
        self.run_units, self.unit = run_units, unit
        run = run_units.run
        self.where, self.name, self.key = run.name, unit.label, f"{run.output}/{unit.key}"
        self.folder, self.state = metrics_folder(run.output), run.output / STATE
        self.order = [u for u in units if u.file == unit.file]

    @cached_property
    def fingerprint(self) -> str:
        return _fingerprint(self.run_units, self.unit)

    def is_done(self) -> bool:
        marked = _read_state(self.state).get(self.unit.key) == self.fingerprint
        # training on may have dropped its records
        return marked and bool(_earlier(self.folder, self.unit))

    def do(self, tick: Callable[[], Any]) -> Measurement:
        return self.run_units.do(self.unit, tick)

    def keep(self, result: Measurement) -> None:
        _replace(self.folder, self.unit, result, self.order)
        _mark(self.state, self.unit.key, self.fingerprint)

    def fail(self, error: Exception) -> Failure:
        part = error.part if isinstance(error, PartialError) else None
        reason = f"{type(error).__name__}: {error}" if part is None else str(error)
        # numbers that were measured before the checkpoint was damaged stay
        if not any(record.value is not None for record in _earlier(self.folder, self.unit)):
            _replace(self.folder, self.unit, self.unit.failed(reason, part), self.order)
        _mark(self.state, self.unit.key, "")
        return Failure(self.where, self.name, reason)


def _earlier(folder: Path, unit: Unit) -> list[Record]:
    """The records of a unit that are in the run's folder."""
    try:
        held = read_measurement(folder, unit.file)
    # damaged: as good as gone
    except Exception:
        return []
    return [] if held is None else [record for record in held.records if unit.owns_record(record)]


def _replace(folder: Path, unit: Unit, result: Measurement, order: list[Unit]) -> None:
    """Put a unit's results in the place of its earlier ones, by step and then in the order of the units.

    The files do not depend on the order in which the units were done.
    """
    try:
        before = read_measurement(folder, unit.file) or Measurement()
    # damaged: it costs the earlier numbers, not these
    except Exception as error:
        logger.warning("%s in %s cannot be read and is written anew: %s", unit.file, folder, error)
        before = Measurement()

    def place(step: int, owns: Callable[[Unit], bool]) -> tuple[int, int]:
        return step, next((i for i, other in enumerate(order) if other.step == step and owns(other)), -1)

    records = [r for r in before.records if not unit.owns_record(r)] + result.records
    rows = [r for r in before.rows if not unit.owns_row(r)] + result.rows
    records.sort(key=lambda r: place(r.step, lambda other: other.owns_record(r)))
    rows.sort(key=lambda r: place(int(r["step"]), lambda other: other.owns_row(r)))
    write_measurement(folder, unit.file, Measurement(records, _with_all_columns(rows)))


def _with_all_columns(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with equal keys, in the order in which the rows fill them; those that no row fills are last."""
    filled = dict.fromkeys(key for row in rows for key, value in row.items() if value is not None and value == value)
    empty = sorted({key for row in rows for key in row} - filled.keys())
    return [{key: row.get(key) for key in filled} | dict.fromkeys(empty) for row in rows]


def _fingerprint(run_units: RunUnits, unit: Unit) -> str:
    settings, sequences = run_units.settings(unit), run_units.sequences(unit)
    ingredients = {
        "version": VERSION,
        "unit": unit.key,
        "settings": None if settings is None else asdict(settings),
        "evaluation": None if sequences is None else sequences.digest(),
        "weights": [checkpoint.digest for checkpoint in unit.checkpoints],
    }
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True, default=str).encode()).hexdigest()


def _read_state(path: Path) -> dict[str, str]:
    """Fingerprints of the units that are done, by key."""
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        logger.warning("%s cannot be read (%s): everything is measured again", path, error)
        return {}


def _mark(path: Path, key: str, fingerprint: str) -> None:
    """Mark a unit as done, or with an empty fingerprint as not."""
    state = _read_state(path) | {key: fingerprint}
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(state, indent=1, sort_keys=True) + "\n")
