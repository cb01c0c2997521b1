"""Tasks over checkpoints of runs; each result is written as soon as it is there.

A unit of work is one task, one checkpoint and one seed. It is done when its fingerprint, of task, settings and
weights, stands in a row of the run's `evaluations.json`. An evaluation that was killed continues with the units that
are not done. The tasks of a group are units of their own; the last of them adds the group's numbers.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from lm_eval.api.group import Group
from lm_eval.tasks import TaskManager

from hf_lowrank.downstream.catalogue import Loaded, TaskError, load_tasks, offline, short
from hf_lowrank.downstream.harness import Settings, evaluate_group, evaluate_task, quiet
from hf_lowrank.downstream.items import LARGEST_TEXTS, texts_size
from hf_lowrank.downstream.model import LowRankLM, load_checkpoint, load_tokenizer, model_facts
from hf_lowrank.downstream.quick.generate import GROUP, TASKS, task_folder
from hf_lowrank.downstream.request import Request, checked_limit, read_requests
from hf_lowrank.downstream.results import (
    evaluation_entries,
    read_evaluations,
    replace_evaluations,
    with_items,
    write_evaluations,
)
from hf_lowrank.families.records import metrics_folder
from hf_lowrank.machine import launched
from hf_lowrank.measure.progress import Failure, Progress
from hf_lowrank.measure.runner import LOCK, Job, Work, run_jobs
from hf_lowrank.measure.source import Checkpoint, RunSource, open_runs
from hf_lowrank.measure.write import write_run
from hf_lowrank.options import EvaluateOptions

__all__ = ["evaluate"]

# is raised when the meaning of a row changes, so that tasks are evaluated again
VERSION = 2
# stands for the digest of weights that are cut short
UNREADABLE = "unreadable"

Row = dict[str, Any]


def evaluate(
    sources: Sequence[str], options: EvaluateOptions, progress: Progress | None = None
) -> tuple[list[tuple[RunSource, list[Row]]], list[Failure]]:
    """Evaluate runs on tasks; see `EvaluateOptions`.

    A task that fails is reported and the others are evaluated. In a launch of several processes each evaluates some
    of the tasks, and the first one writes the reports.

    Args:
        sources: runs, as `open_run` takes them.
        options: what to evaluate and how.
        progress: is told what happens.

    Returns:
        For each run the entries of its report that the command asked for, and what failed.

    Raises:
        ValueError: a task, run or checkpoint is not there, before any model is loaded.
    """
    progress = progress or Progress()
    manager, requests = _read(options, ())
    runs = open_runs(sources, options.output, options.token)
    if folders := _unseen(runs, requests, options):
        manager, requests = _read(options, folders)
    held: list[_Model] = []
    models = [[_Model(run, c, options, progress, held) for c in _chosen(run, options.checkpoints)] for run in runs]
    loaded, failures = _load(manager, requests, [m for of_run in models for m in of_run], progress)
    if options.log_items:
        _check_texts(models, requests, loaded, progress)
    jobs = []
    for run, of_run in zip(runs, models, strict=True):
        work = [unit for model in of_run for request in requests for unit in _units(model, request, loaded)]
        order = {unit.fingerprint: place for place, unit in enumerate(work)}
        for unit in work:
            unit.order = order
        jobs.append(Job(work, partial(_report, run)))
    try:
        failures += run_jobs(jobs, runs[0].output / LOCK, progress)
    finally:
        for model in held:
            model.release()
    return [(run, _asked(run, of_run, requests, loaded)) for run, of_run in zip(runs, models, strict=True)], failures


def _report(run: RunSource) -> None:
    if read_evaluations(metrics_folder(run.output)) is not None:
        write_run(run, figures=False)


def _read(options: EvaluateOptions, folders: tuple[Path, ...]) -> tuple[TaskManager, list[Request]]:
    return read_requests(
        options.tasks,
        (*folders, *options.include),
        num_fewshot=options.num_fewshot,
        seeds=options.seeds,
        bootstrap_iterations=options.bootstrap_iterations,
        limit=checked_limit(options.limit),
        log_items=options.log_items,
    )


def _unseen(runs: Sequence[RunSource], requests: list[Request], options: EvaluateOptions) -> tuple[Path, ...]:
    """The folder with items of our own tasks that the runs were not trained on, if it is not the package's."""
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
        return run.checkpoints if checkpoints == "all" else [run.final]
    run.check_steps(checkpoints)
    return [c for c in run.checkpoints if c.step in checkpoints]


def _load(
    manager: TaskManager, requests: list[Request], models: list["_Model"], progress: Progress
) -> tuple[dict[str, Loaded], list[Failure]]:
    """The tasks that something is left to do for, with their data: what is missing is known before hours of work."""
    loaded, failures = {}, []
    with ExitStack() as stack:
        for request in requests:
            if all(model.has_done(request) for model in models):
                continue
            try:
                with quiet():
                    loaded[request.name] = load_tasks(manager, request.name)
            except TaskError as error:
                failures.append(Failure("", request.name, str(error)))
                progress.failed(failures[-1])
                if error.unreachable:
                    stack.enter_context(offline())
    return loaded, failures


def _check_texts(
    models: list[list["_Model"]], requests: list[Request], loaded: dict[str, Loaded], progress: Progress
) -> None:
    """Say how much text the items of a run get, or refuse to publish so much."""
    most = 0
    for of_run in models:
        size = 0
        for request in requests:
            times = sum(not model.has_done(request) for model in of_run)
            tasks = loaded[request.name].tasks.values() if request.name in loaded else ()
            for settings in request.settings if times else ():
                size += times * sum(texts_size(task, settings.limit, settings.num_fewshot) for task in tasks)
        most = max(most, size)
    if most > LARGEST_TEXTS:
        raise ValueError(
            f"--log-items: prompts, targets and answers would have about {most / 1e6:,.0f} MB a run, more than the "
            f"{LARGEST_TEXTS / 1e6:,.0f} MB that are published with its metrics: take a --limit, fewer tasks, seeds "
            "or checkpoints; the results themselves are kept by item without it"
        )
    if most:
        progress.note(f"prompts, targets and answers have about {most / 1e6:.2g} MB a run before compression")


class _Model:
    """A checkpoint to evaluate: what its results are known by, and its model while it is needed.

    Args:
        run, checkpoint: what is evaluated.
        options: how.
        progress: is told of forward passes, and of results of other weights.
        held: the checkpoint whose model is in memory; all checkpoints share this list.
    """

    def __init__(
        self,
        run: RunSource,
        checkpoint: Checkpoint,
        options: EvaluateOptions,
        progress: Progress,
        held: list["_Model"],
    ) -> None:
        self.run, self.checkpoint, self.options, self.progress, self.held = run, checkpoint, options, progress, held
        self.where, self.folder = f"{run.name} step {checkpoint.step}", metrics_folder(run.output)
        try:
            self.weights, files = checkpoint.digest, sorted(checkpoint.folder.glob("tokenizer*"))
        # cut short while it was saved: that is reported if it is to be loaded
        except (OSError, ValueError):
            self.weights, files = UNREADABLE, []
        tokenizer = options.tokenizer or [
            hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()
        ]
        self.known = json.dumps([self.weights, tokenizer, options.form, options.dtype, options.max_length])
        self._language_model: LowRankLM | None = None
        self._problem: Exception | None = None
        self._answers: tempfile.TemporaryDirectory[str] | None = None
        rows = self.rows()
        if stale := len(rows) - len(self.without_stale(rows)):
            progress.note(f"{self.where}: {stale} results of other weights at this step are dropped")

    def fingerprint(self, request: Request, task: str, settings: Settings) -> str:
        """Of a task, or of a whole group, with one seed."""
        words = [VERSION, self.checkpoint.step, self.known, request.digest, task, repr(settings)]
        return hashlib.sha256(json.dumps(words).encode()).hexdigest()

    def rows(self) -> list[Row]:
        """The run's rows; the results of a run that lies elsewhere stay beside those that are added here."""
        rows = read_evaluations(self.folder)
        if rows is None and self.run.output != self.run.root and self.run.report is not None:
            rows = [{**entry, "fingerprint": None, "weights": None} for entry in self.run.report["evaluations"]]
        return rows or []

    def done(self) -> list[Row]:
        """The rows that stand for evaluations which need not be done again."""
        # of an evaluation without prompts, targets and answers they cannot be had afterwards
        return [row for row in self.rows() if row.get("logged") or not self.options.log_items]

    def without_stale(self, rows: list[Row]) -> list[Row]:
        """The rows without those that other weights gave at this step."""
        if self.weights == UNREADABLE:
            return rows
        own = (None, self.weights)
        return [row for row in rows if row["step"] != self.checkpoint.step or row.get("weights") in own]

    def has_done(self, request: Request) -> bool:
        """Whether nothing of a request is left to do; a group's mark stands in the last row of its tasks."""
        held = {row.get(key) for row in self.done() for key in ("fingerprint", "group_fingerprint")}
        return all(self.fingerprint(request, request.name, settings) in held for settings in request.settings)

    def language_model(self) -> LowRankLM:
        """The model, loaded once; so is the error if it cannot be."""
        if self._problem is not None:
            raise self._problem
        if self._language_model is None:
            while self.held:
                self.held.pop().release()
            self.held.append(self)
            try:
                tokenizer = load_tokenizer(self.checkpoint, self.options.tokenizer)
                loaded = load_checkpoint(
                    self.checkpoint, self.options.form, self.options.dtype, self.options.device or "cpu"
                )
                size, length = self.options.batch_size, self.options.max_length
                tick = self.progress.tick
                self._language_model = LowRankLM(loaded, tokenizer, batch_size=size, max_length=length, progress=tick)
            except Exception as error:
                self._problem = error
                raise
        return self._language_model

    def cache(self, several_seeds: bool) -> Path | None:
        """Where the harness keeps answers: without few-shot examples, later seeds ask what the first has asked."""
        # a database for each process
        name = hashlib.sha256(self.known.encode()).hexdigest()[:16] + (f"-{launched()[0]}" if launched()[0] else "")
        if self.options.cache is not None:
            return self.options.cache / name
        if several_seeds and self._answers is None:
            self._answers = tempfile.TemporaryDirectory(prefix="hf-lowrank-")
        return None if self._answers is None else Path(self._answers.name) / name

    def release(self) -> None:
        """Forget the model and its answers."""
        self._language_model = None
        if self._answers is not None:
            self._answers.cleanup()
            self._answers = None


def _units(model: _Model, request: Request, loaded: dict[str, Loaded]) -> list["_Evaluating"]:
    """The units of a request: its tasks, each with every seed."""
    held = loaded.get(request.name)
    # what a group defines in place is known only once it is loaded
    names = list(dict.fromkeys((*request.leaves, *(() if held is None else sorted(held.tasks)))))
    if held is not None:
        names = [name for name in names if name in held.tasks]
    elif not model.has_done(request):
        return []
    return [
        _Evaluating(model, request, names, name, settings, held) for name in names for settings in request.settings
    ]


class _Evaluating(Work):
    """A task on a checkpoint with one seed.

    Args:
        model: answers.
        request: what the user asked for: the task or a group that holds it.
        names: all tasks of the request.
        task: name of the task.
        settings: with the seed.
        loaded: the request with its data; None if it was done before.
    """

    # places of the run's fingerprints, by which its rows are sorted
    order: dict[str, int]

    def __init__(
        self, model: _Model, request: Request, names: list[str], task: str, settings: Settings, loaded: Loaded | None
    ) -> None:
        self.model, self.request, self.names, self.task, self.settings = model, request, names, task, settings
        self.loaded = loaded
        self.fingerprint = model.fingerprint(request, task, settings)
        self.where, self.name = model.where, task if settings.seed is None else f"{task} {settings.seed}"
        self.key = f"{model.run.output}/{self.fingerprint}"

    def is_done(self) -> bool:
        return self.loaded is None or any(row.get("fingerprint") == self.fingerprint for row in self.model.done())

    def do(self, tick: Callable[[], Any]) -> list[Row]:
        assert self.loaded is not None
        with quiet():
            language_model = self.model.language_model()
            about = model_facts(language_model.model)
            cache = self.model.cache(len(self.request.settings) > 1)
            step, task = self.model.checkpoint.step, self.loaded.tasks[self.task]
            rows = evaluate_task(language_model, task, self.settings, step=step, about=about, cache=cache)
        cut = rows[0]["about"].get("truncated_requests") if rows else None
        if cut and self.settings == self.request.settings[0]:
            requests, room = rows[0]["about"]["requests"], language_model.max_length
            self.model.progress.note(
                f"{self.where} {self.name}: {cut} of {requests} requests are longer than {room} tokens and cut on the "
                "left"
            )
        return [self._marked(row, self.fingerprint) for row in rows]

    def keep(self, result: list[Row]) -> None:
        rows = replace_evaluations(self.model.without_stale(self.model.rows()), result)
        if self.loaded is not None and self.loaded.groups:
            rows = self._with_groups(rows, self.loaded.groups)
        # the group's own rows follow those of its last task
        rows.sort(key=lambda row: self.order.get(str(row.get("fingerprint")).partition(":")[0], -1))
        write_evaluations(self.model.folder, rows)

    def fail(self, error: Exception) -> Failure:
        # what keeps a checkpoint from being loaded is said once for all tasks of a request
        name = self.request.name if error is self.model._problem else self.task
        return Failure(self.where, name, short(error))

    def _with_groups(self, rows: list[Row], groups: Sequence[Group]) -> list[Row]:
        """The rows with those of the groups, once all their tasks are there.

        The mark that a group is done stands in the last row of its tasks.
        """
        wanted = [self.model.fingerprint(self.request, name, self.settings) for name in self.names]
        inside = sorted(
            (row for row in rows if row.get("fingerprint") in wanted), key=lambda row: wanted.index(row["fingerprint"])
        )
        if {row["fingerprint"] for row in inside} != set(wanted):
            return rows
        mark = self.model.fingerprint(self.request, self.request.name, self.settings)
        step = self.model.checkpoint.step
        parts = with_items(self.model.folder, inside)
        new = [row for group in groups for row in evaluate_group(group, parts, self.settings, step)]
        rows = replace_evaluations(rows, [self._marked(row, f"{wanted[-1]}:{row['task']}") for row in new])
        return [{**row, "group_fingerprint": mark} if row is inside[-1] else row for row in rows]

    def _marked(self, row: Row, fingerprint: str) -> Row:
        # what rows of several seeds must share to be averaged, beside what they say themselves
        definition = hashlib.sha256(f"{self.model.known} {row['task_version']}".encode()).hexdigest()
        marks = {"fingerprint": fingerprint, "weights": self.model.weights, "definition": definition}
        return {**row, **marks, **({"logged": True} if self.settings.log_items else {})}


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
