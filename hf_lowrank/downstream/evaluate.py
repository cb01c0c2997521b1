"""Tasks over checkpoints of runs, each result on disk as soon as it is there.

One call of the harness is one task, one checkpoint and one seed. It is done when its fingerprint, of task, settings
and weights, stands in a row of the run's `evaluations.json`: an evaluation that was killed goes on with the first that
is not. The tasks of a group are called one by one too, and the group's own numbers made of theirs.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from hf_lowrank.downstream.catalogue import Loaded, TaskError, load_tasks, offline, short
from hf_lowrank.downstream.harness import Settings, evaluate_group, evaluate_task, quiet
from hf_lowrank.downstream.model import LowRankLM, load_checkpoint, load_tokenizer
from hf_lowrank.downstream.quick.generate import GROUP, TASKS, task_folder
from hf_lowrank.downstream.request import Request, checked_limit, read_requests
from hf_lowrank.downstream.results import (
    evaluation_entries,
    read_evaluations,
    replace_evaluations,
    write_evaluations,
)
from hf_lowrank.downstream.watcher import Failure, Watcher
from hf_lowrank.families.records import metrics_folder
from hf_lowrank.families.spaces import is_reparameterized
from hf_lowrank.measure.source import Checkpoint, RunSource, open_run
from hf_lowrank.measure.write import write_run
from hf_lowrank.options import EvaluateOptions
from hf_lowrank.report.model import details

__all__ = ["evaluate"]

logger = logging.getLogger(__name__)

# raised when what a row says changes its meaning, so that tasks are evaluated again
VERSION = 1
# stands for the digest of weights that are cut short
UNREADABLE = "unreadable"

Row = dict[str, Any]


@dataclass(frozen=True)
class _Model:
    """A checkpoint to evaluate, and what its results are known by."""

    run: RunSource
    checkpoint: Checkpoint
    weights: str
    known: str

    def fingerprint(self, request: Request, task: str, settings: Settings) -> str:
        """Of one call of the harness."""
        words = [VERSION, self.checkpoint.step, self.known, request.digest, task, repr(settings)]
        return hashlib.sha256(json.dumps(words).encode()).hexdigest()


def evaluate(
    sources: Sequence[str], options: EvaluateOptions, watcher: Watcher | None = None
) -> tuple[list[tuple[RunSource, list[Row]]], list[Failure]]:
    """Evaluate runs on tasks; see `EvaluateOptions`.

    A task that fails is reported and the others are evaluated.

    Args:
        sources: runs, as `open_run` takes them.
        options: what to evaluate and how.
        watcher: is told what happens.

    Returns:
        For each run the entries of its report that the command asked for, and what failed.

    Raises:
        ValueError: a task, run or checkpoint is not there, before any model is loaded.
    """
    watcher = watcher or Watcher()
    if not sources:
        raise ValueError("no run to evaluate: give at least one")
    if options.output is not None and len(sources) > 1:
        raise ValueError(f"--output {options.output} is for one run, {len(sources)} are given: drop one of them")
    manager, requests = _read(options, ())
    runs = [open_run(source, options.output, options.token) for source in sources]
    if folders := _unseen(runs, requests, options):
        manager, requests = _read(options, folders)
    models = [[_model(run, c, options) for c in _chosen(run, options.checkpoints)] for run in runs]
    failures: list[Failure] = []
    loaded = _load(manager, requests, [m for of_run in models for m in of_run], failures, watcher)
    kept: list[tuple[RunSource, list[Row]]] = []
    watcher.total(sum(len(r.leaves) * len(r.settings) for of_run in models for _ in of_run for r in requests))
    for run, of_run in zip(runs, models, strict=True):
        try:
            for model in of_run:
                _evaluate_model(model, requests, loaded, options, failures, watcher)
        finally:
            # interrupted as well: what was found so far belongs into the report
            if read_evaluations(metrics_folder(run.output)) is not None:
                write_run(run, figures=False)
        kept.append((run, _asked(run, of_run, requests, loaded)))
    return kept, failures


def _read(options: EvaluateOptions, folders: tuple[Path, ...]) -> tuple[TaskManager, list[Request]]:
    return read_requests(
        options.tasks,
        (*folders, *options.include),
        num_fewshot=options.num_fewshot,
        seeds=options.seeds,
        bootstrap_iterations=options.bootstrap_iterations,
        limit=checked_limit(options.limit),
    )


def _unseen(runs: Sequence[RunSource], requests: list[Request], options: EvaluateOptions) -> tuple[Path, ...]:
    """The folder with items of our own tasks that the runs were not trained on, where it is not the package's."""
    ours = any(leaf.startswith("hf_lowrank_") for request in requests for leaf in request.leaves)
    # who names a folder with these tasks has chosen the items
    if not ours or any((folder / f"{GROUP}.yaml").is_file() for folder in options.include):
        return ()
    folders = {task_folder(None if run.report is None else run.report["data"]): run.name for run in runs}
    if len(folders) > 1:
        raise ValueError(
            f"{' and '.join(folders.values())} hold out different files of the embedded corpus, so that they cannot "
            "answer the same items: evaluate them one by one"
        )
    return tuple(folder for folder in folders if folder != TASKS)


def _chosen(run: RunSource, checkpoints: str | tuple[int, ...]) -> list[Checkpoint]:
    if isinstance(checkpoints, str):
        return run.checkpoints if checkpoints == "all" else run.checkpoints[-1:]
    run.check_steps(checkpoints)
    return [c for c in run.checkpoints if c.step in checkpoints]


def _model(run: RunSource, checkpoint: Checkpoint, options: EvaluateOptions) -> _Model:
    try:
        weights, files = checkpoint.digest, sorted(checkpoint.folder.glob("tokenizer*"))
    # cut short while it was saved: it is reported where it is to be loaded
    except (OSError, ValueError):
        weights, files = UNREADABLE, []
    tokenizer = options.tokenizer or [
        hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()
    ]
    known = json.dumps([weights, tokenizer, options.form, options.dtype, options.max_length])
    return _Model(run, checkpoint, weights, known)


def _load(
    manager: TaskManager, requests: list[Request], models: list[_Model], failures: list[Failure], watcher: Watcher
) -> dict[str, Loaded]:
    """The tasks that something is left to do for, with their data: what is missing is known before hours of work."""
    rows = {str(m.run.output): read_evaluations(metrics_folder(m.run.output)) or [] for m in models}
    loaded = {}
    with ExitStack() as stack:
        for request in requests:
            if all(_is_done(model, request, rows[str(model.run.output)]) for model in models):
                continue
            try:
                with quiet():
                    loaded[request.name] = load_tasks(manager, request.name)
            except TaskError as error:
                failures.append(Failure(None, None, request.name, str(error)))
                watcher.failed(failures[-1])
                if error.unreachable:
                    stack.enter_context(offline())
    return loaded


def _is_done(model: _Model, request: Request, rows: list[Row]) -> bool:
    """Whether nothing of a request is left to do; a group is, when its last seed's own call has left its mark."""
    held = {fingerprint for row in rows for fingerprint in (row.get("fingerprint"), row.get("group_fingerprint"))}
    return all(model.fingerprint(request, request.name, settings) in held for settings in request.settings)


def _evaluate_model(
    model: _Model,
    requests: list[Request],
    loaded: dict[str, Loaded],
    options: EvaluateOptions,
    failures: list[Failure],
    watcher: Watcher,
) -> None:
    run, step, folder = model.run, model.checkpoint.step, metrics_folder(model.run.output)
    rows = read_evaluations(folder)
    if rows is None:
        # of a run that lies elsewhere: its results stay beside those found here
        own = run.output == run.root or run.report is None
        rows = [
            {**entry, "settings": details(entry), "about": {}, "fingerprint": None, "weights": None}
            for entry in ([] if own or run.report is None else run.report["evaluations"])
        ]
    stale = [row for row in rows if row["step"] == step and row.get("weights") not in (None, model.weights)]
    if stale and model.weights != UNREADABLE:
        watcher.note(f"{run.name} step {step}: {len(stale)} results of other weights at this step are dropped")
        rows = [row for row in rows if row not in stale]
    with ExitStack() as stack:
        language_model: LowRankLM | None = None
        for request in requests:
            label = f"{run.name} step {step}"
            if _is_done(model, request, rows):
                for task in request.leaves or (request.name,):
                    for _ in request.settings:
                        watcher.call(f"{label} {task}", True)
                continue
            if request.name not in loaded:
                continue
            try:
                if language_model is None:
                    with quiet():
                        language_model = _language_model(model, options, watcher)
                    noted = _noted(language_model)
                    cache = _cache(model, requests, options, stack)
            # one checkpoint that is cut short, or has no such form, must not cost the others
            except Exception as error:
                for name in (r.name for r in requests if r.name in loaded and not _is_done(model, r, rows)):
                    failures.append(Failure(run.name, step, name, short(error)))
                    watcher.failed(failures[-1])
                return
            for settings in request.settings:
                call = _Call(model, request, loaded[request.name], settings, noted, cache)
                rows = call.do(language_model, rows, failures, watcher)


@dataclass(frozen=True)
class _Call:
    """A task or group with one seed."""

    model: _Model
    request: Request
    loaded: Loaded
    settings: Settings
    noted: dict[str, Any]
    cache: Path | None

    def do(
        self,
        language_model: LowRankLM,
        rows: list[Row],
        failures: list[Failure],
        watcher: Watcher,
    ) -> list[Row]:
        """Evaluate what is not done, write after every task; the rows with the new ones."""
        run, step, folder = self.model.run, self.model.checkpoint.step, metrics_folder(self.model.run.output)
        found: list[Row] = []
        whole = True
        for name, task in self.loaded.tasks.items():
            fingerprint = self.model.fingerprint(self.request, name, self.settings)
            label = f"{run.name} step {step} {name}" + ("" if self.settings.seed is None else f" {self.settings.seed}")
            before = [row for row in rows if row.get("fingerprint") == fingerprint]
            watcher.call(label, bool(before))
            if before:
                found += before
                continue
            try:
                with quiet():
                    new = evaluate_task(
                        language_model, task, self.settings, step=step, noted=self.noted, cache=self.cache
                    )
            # one task, whose code is other people's, must not cost the others
            except Exception as error:
                failures.append(Failure(run.name, step, name, short(error)))
                watcher.failed(failures[-1])
                whole = False
                continue
            new = [self._marked(row, fingerprint) for row in new]
            found += new
            cut = new[0]["settings"].get("truncated_requests") if new else None
            if cut and self.settings == self.request.settings[0]:
                requests, room = new[0]["settings"]["requests"], language_model.max_length
                watcher.note(
                    f"{label}: {cut} of {requests} requests are longer than {room} tokens and cut on the left"
                )
            rows = replace_evaluations(rows, new)
            write_evaluations(folder, rows)
        return self._aggregated(rows, found, folder) if whole and self.loaded.groups else rows

    def _aggregated(self, rows: list[Row], found: list[Row], folder: Path) -> list[Row]:
        """The rows with those of the groups; the mark that a group is done stands in the last row of its tasks."""
        mark = self.model.fingerprint(self.request, self.request.name, self.settings)
        new = [
            row
            for group in self.loaded.groups
            for row in evaluate_group(group, found, self.settings, found[0]["step"])
        ]
        rows = replace_evaluations(rows, [self._marked(row, f"{mark}:{row['task']}") for row in new])
        rows = [{**row, "group_fingerprint": mark} if row == found[-1] else row for row in rows]
        write_evaluations(folder, rows)
        return rows

    def _marked(self, row: Row, fingerprint: str) -> Row:
        # what rows of several seeds must share to be averaged, beside what they say themselves
        definition = hashlib.sha256(f"{self.model.known} {row['task_version']}".encode()).hexdigest()
        return {**row, "fingerprint": fingerprint, "weights": self.model.weights, "definition": definition}


def _language_model(model: _Model, options: EvaluateOptions, watcher: Watcher) -> LowRankLM:
    tokenizer = load_tokenizer(model.checkpoint, options.tokenizer)
    loaded = load_checkpoint(model.checkpoint, options.form, options.dtype, options.device or "cpu")
    return LowRankLM(
        loaded,
        tokenizer,
        batch_size=options.batch_size,
        max_length=options.max_length,
        progress=watcher.forward,
    )


def _noted(language_model: LowRankLM) -> dict[str, Any]:
    """What the rows say of the model."""
    form = "native" if is_reparameterized(language_model.model) else "dense"
    return {"form": form, "dtype": str(language_model.model.dtype).removeprefix("torch.")}


def _cache(model: _Model, requests: list[Request], options: EvaluateOptions, stack: ExitStack) -> Path | None:
    """Where the harness keeps answers: without few-shot examples, later seeds ask what the first has asked."""
    name = hashlib.sha256(model.known.encode()).hexdigest()[:16]
    if options.cache is not None:
        return options.cache / name
    if any(len(request.settings) > 1 for request in requests):
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hf-lowrank-"))) / name
    return None


def _asked(run: RunSource, models: list[_Model], requests: list[Request], loaded: dict[str, Loaded]) -> list[Row]:
    """The report's entries for the checkpoints and tasks of this command, a group's own before those in it."""
    entries = evaluation_entries(read_evaluations(metrics_folder(run.output)) or [])
    names: dict[str, None] = {}
    for request in requests:
        held = loaded.get(request.name)
        groups = () if held is None else tuple(group.name for group in held.groups)
        names |= dict.fromkeys((request.name, *groups, *request.leaves, *(() if held is None else held.tasks)))
    order = {name: place for place, name in enumerate(names)}
    steps = {model.checkpoint.step for model in models}
    chosen = [entry for entry in entries if entry["task"] in order and entry["step"] in steps]
    return sorted(chosen, key=lambda entry: (entry["step"], order[entry["task"]]))
