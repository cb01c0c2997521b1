"""Every metric over every checkpoint of runs, each result on disk as soon as it is there.

The work is a list of units (a family of metrics, a checkpoint, what it is compared with). A unit is done when its
fingerprint, of settings, sequences and weights, stands in `measured.json` of the run; a measurement that was killed
goes on with the first that is not.
"""

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hf_lowrank.data import DataArguments
from hf_lowrank.families.presets import PRESETS, Preset
from hf_lowrank.families.records import (
    FAMILIES,
    Measurement,
    Record,
    metrics_folder,
    read_measurement,
    write_measurement,
)
from hf_lowrank.measure.bench import Bench, PartialError
from hf_lowrank.measure.source import RunSource, open_run, rows_of
from hf_lowrank.measure.units import Unit, headline_of
from hf_lowrank.measure.write import write_map, write_run
from hf_lowrank.metrics.sequences import EvaluationSet
from hf_lowrank.report.files import atomic_path

__all__ = ["Options", "measure"]

logger = logging.getLogger(__name__)

STATE = "measured.json"
# raised when a metric's meaning changes, so that what was measured before is measured again
VERSION = 1


@dataclass(frozen=True)
class Options:
    """How runs are measured.

    Attributes:
        families: which metrics, of `FAMILIES`.
        preset: settings of each.
        batch_size: sequences in one forward pass.
        steps: checkpoints to measure; None for all.
        data: validation data to use instead of the runs' own.
        device: where to compute.
        token: of the Hub.
        output: folder for a single run's results instead of its own.
    """

    families: tuple[str, ...] = FAMILIES
    preset: Preset = field(default_factory=lambda: PRESETS["quick"])
    batch_size: int = 16
    steps: tuple[int, ...] | None = None
    data: DataArguments | None = None
    device: str = "cpu"
    token: str | None = None
    output: Path | None = None


class Watcher:
    """What is told how far a measurement is; this one says nothing."""

    def total(self, units: int) -> None:
        """How many units there are in all."""

    def unit(self, run: str, unit: str, skipped: bool) -> None:
        """A unit begins, or is skipped because it is done."""

    def point(self) -> None:
        """A piece of a unit is done."""

    def problem(self, run: str, unit: str, error: str) -> None:
        """A unit could not be measured."""


def measure(
    sources: list[str], baseline: str | None, options: Options, watcher: Watcher | None = None
) -> tuple[list[RunSource], int]:
    """Measure runs; see `Options`.

    Activations and cross-method barriers refer to the baseline; with several runs, barriers between all of them are
    measured at their last common step as well. A metric that fails on a checkpoint becomes a row with its reason, and
    the others are measured.

    Args:
        sources: runs, as `open_run` takes them.
        baseline: the full-rank run; None to leave out what refers to it.
        options: what to measure and how.
        watcher: is told what happens.

    Returns:
        The runs, and how many units failed.

    Raises:
        ValueError: a run, checkpoint or data set is not there, or the runs are of different sizes.
    """
    watcher = watcher or Watcher()
    if not sources:
        raise ValueError("no run to measure: give at least one")
    if options.output is not None and len(sources) > 1:
        raise ValueError(f"--output {options.output} is for one run, {len(sources)} are given: drop one of them")
    runs = [open_run(source, options.output, options.token) for source in sources]
    reference = None if baseline is None else _same_or_opened(baseline, sources, runs, options)
    _tell_apart([*sources, str(baseline)], runs if reference is None or reference in runs else [*runs, reference])
    if reference is None and options.families == ("activation",):
        raise ValueError("activations are compared with a baseline and none is given: add --baseline RUN")
    benches = [
        Bench(run, reference, [r for r in runs if r is not run], options.preset, options.device) for run in runs
    ]
    units = [list(bench.units(options.families, options.steps)) for bench in benches]
    watcher.total(sum(map(len, units)))
    failures = 0
    # the baseline first: its numbers go into the others' reports
    for bench, todo in sorted(zip(benches, units, strict=True), key=lambda item: item[0].run is not reference):
        if any(unit.family != "spectral" for unit in todo):
            rows = rows_of(bench.run, options.data)
            bench.evaluation = EvaluationSet.from_dataset(rows, options.preset.sequences, options.batch_size)
            bench.whole = EvaluationSet.from_dataset(rows, None, options.batch_size)
        try:
            failures += _measure_run(bench, todo, watcher)
        finally:
            # interrupted as well: what was measured so far belongs into the report
            write_run(bench.run, baseline=reference)
        bench.release()
    if len(runs) + (reference is not None and reference not in runs) > 1:
        write_map([*runs, *([reference] if reference is not None and reference not in runs else [])], runs)
    return runs, failures


def _tell_apart(sources: list[str], runs: list[RunSource]) -> None:
    """Runs of one name are called by where they lie."""
    names = [run.name for run in runs]
    for source, run in zip(sources, runs, strict=False):
        if names.count(run.name) > 1:
            run.name = source


def _same_or_opened(baseline: str, sources: list[str], runs: list[RunSource], options: Options) -> RunSource:
    """The baseline, which may be one of the runs."""
    for source, run in zip(sources, runs, strict=True):
        if source == baseline or (Path(source).is_dir() and Path(source).resolve() == Path(baseline).resolve()):
            return run
    return open_run(baseline, token=options.token)


def _measure_run(bench: Bench, units: list[Unit], watcher: Watcher) -> int:
    run, failures = bench.run, 0
    folder, state = metrics_folder(run.output), _State(run.output / STATE)
    for unit in units:
        try:
            fingerprint = _fingerprint(bench, unit)
            done = state.holds(unit.key, fingerprint) and _is_there(folder, unit)
            watcher.unit(run.name, unit.label, done)
            if done:
                continue
            found, error = bench.do(unit, watcher.point), None
        # one metric, or one checkpoint that is cut short, must not cost the others
        except Exception as raised:
            if isinstance(raised, PartialError):
                error, partial = str(raised), raised.found
            else:
                error, partial = f"{type(raised).__name__}: {raised}", Measurement([], [])
            found = _failed(unit, error, partial)
            fingerprint = ""
            failures += 1
            watcher.problem(run.name, unit.label, error)
        # what was measured before the checkpoint was damaged stays
        if error is None or not _has_numbers(folder, unit):
            _replace(folder, unit, found)
        state.note(unit.key, fingerprint)
    return failures


def _failed(unit: Unit, error: str, found: Measurement) -> Measurement:
    """What was found of a unit, with rows that say which headline metrics could not be measured, and why."""
    note = {"note": error} if unit.other is None else {"note": error, "other": unit.other}
    names = {record.name for record in found.records}
    records = [
        Record(name, None, None, unit.step, note, unit.space) for name in headline_of(unit) if name not in names
    ]
    return Measurement(found.records + records, found.rows)


def _has_numbers(folder: Path, unit: Unit) -> bool:
    """Whether an earlier measurement of a unit gave numbers."""
    return any(record.value is not None for record in _earlier(folder, unit))


def _is_there(folder: Path, unit: Unit) -> bool:
    """Whether a unit's records are still in the run's folder: training on may have dropped them."""
    return bool(_earlier(folder, unit))


def _earlier(folder: Path, unit: Unit) -> list[Record]:
    """The records of a unit that are in the run's folder."""
    try:
        found = read_measurement(folder, unit.file)
    # damaged: as good as gone
    except Exception:
        return []
    return [] if found is None else [record for record in found.records if unit.owns_record(record)]


def _replace(folder: Path, unit: Unit, found: Measurement) -> None:
    """Put a unit's results in the place of what it found before."""
    try:
        before = read_measurement(folder, unit.file) or Measurement([], [])
    # damaged: it costs the earlier numbers, not these
    except Exception as error:
        logger.warning("%s in %s cannot be read and is written anew: %s", unit.file, folder, error)
        before = Measurement([], [])
    records = [r for r in before.records if not unit.owns_record(r)] + found.records
    rows = [r for r in before.rows if not unit.owns_row(r)] + found.rows
    records.sort(key=lambda r: r.step)
    rows.sort(key=lambda r: r["step"])
    write_measurement(folder, unit.file, Measurement(records, rows))


def _fingerprint(bench: Bench, unit: Unit) -> str:
    settings = getattr(bench.preset, unit.family, None)
    known = {
        "version": VERSION,
        "unit": unit.key,
        "settings": None if settings is None else asdict(settings),
        "evaluation": None if unit.family == "spectral" else bench.sequences(unit).digest(),
        "weights": [checkpoint.digest for checkpoint in unit.checkpoints],
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()


class _State:
    """Which units are done, by their fingerprints; written after every one of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._done: dict[str, str] = dict(json.loads(path.read_text()))
        except FileNotFoundError:
            self._done = {}
        except ValueError as error:
            logger.warning("%s cannot be read (%s): everything is measured again", path, error)
            self._done = {}

    def holds(self, key: str, fingerprint: str) -> bool:
        """Whether a unit is done with this fingerprint."""
        return self._done.get(key) == fingerprint

    def note(self, key: str, fingerprint: str) -> None:
        """Note a unit as done, or with an empty fingerprint as not."""
        self._done[key] = fingerprint
        with atomic_path(self.path) as path:
            path.write_text(json.dumps(self._done, indent=1, sort_keys=True) + "\n")
