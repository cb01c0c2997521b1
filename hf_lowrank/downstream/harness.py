"""One call of the harness: a task, a model, a seed, and the rows that come of it."""

import contextlib
import io
import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.api.group import Group
from lm_eval.api.model import CacheHook, CachingLM
from lm_eval.api.task import Task

from hf_lowrank.downstream.items import clustered_error, group_items, scored_items
from hf_lowrank.downstream.model import LowRankLM
from hf_lowrank.downstream.results import HARNESS_SEEDS
from hf_lowrank.families.records import finite

__all__ = ["Settings", "evaluate_group", "evaluate_task", "quiet"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How a task is evaluated.

    Attributes:
        num_fewshot: examples in the prompt; None for the task's own number, which also counts where the task fixes 0.
        limit: the first so many items, or a share below 1; None for all.
        seed: of Python, NumPy, torch and the few-shot sampler; None for the harness's own.
        bootstrap_iterations: of standard errors that have no formula; None for the harness's own 100,000.
        log_items: whether items are kept with prompt, target and answer; the numbers are the same.
    """

    num_fewshot: int | None = None
    limit: float | None = None
    seed: int | None = None
    bootstrap_iterations: int | None = None
    # no part of what identifies an evaluation
    log_items: bool = field(default=False, repr=False, compare=False)


def evaluate_task(
    model: LowRankLM,
    task: Task,
    settings: Settings,
    *,
    step: int | None,
    about: dict[str, Any],
    cache: Path | None = None,
) -> list[Row]:
    """Evaluate a task.

    Args:
        model: answers.
        task: with its data.
        settings: how.
        step: of the model.
        about: what the rows say of the model.
        cache: where the harness keeps answers, which the same requests take from there.

    Returns:
        A row a metric, with its `items`. Where these come in groups, the row has the clustered standard error.

    Raises:
        Exception: whatever the task's code and the model raise; where requests do not fit, a ValueError says so.
    """
    results = _answered(model, task, settings, cache)
    cut, name = model.overlong(task.instances), task.task_name
    defining = {
        "seed": HARNESS_SEEDS if settings.seed is None else settings.seed,
        "context_length": model.max_length,
        **({"add_special_tokens": False} if model.add_bos_token is False else {}),
    }
    about = {
        **about,
        **({"truncated_requests": cut, "requests": len(task.instances)} if cut else {}),
        **_chance(task.config.metadata),
    }
    common = {
        "task": name,
        "num_fewshot": results["n-shot"].get(name),
        "limit": settings.limit,
        "step": step,
        "task_version": _version(results["versions"].get(name)),
    }
    better = results["higher_is_better"].get(name, {})
    rows = _rows(results["results"][name], common, defining, about, better, settings)
    for row in rows:
        row["items"] = scored_items(results["samples"][name], task, row, settings.log_items)
        clustered = clustered_error(row["items"], row["value"])
        if clustered is not None:
            row["stderr"], groups = clustered
            row["about"] |= {"stderr": "over groups of items", "groups": groups, "dof": groups - 1}
    return rows


def _answered(model: LowRankLM, task: Task, settings: Settings, cache: Path | None) -> dict[str, Any]:
    """The harness's results."""
    _prepare(task, settings)
    iterations = settings.bootstrap_iterations
    try:
        # not simple_evaluate, which takes stock of the whole machine at every call
        results: dict[str, Any] | None = lm_eval.evaluate(
            model if cache is None else CachingLM(model, f"{cache}.db"),
            {"tasks": {task.task_name: task}, "groups": {}},
            limit=settings.limit,
            log_samples=True,
            **({} if iterations is None else {"bootstrap_iters": iterations}),
        )
    except AssertionError as error:
        answer = model.longest_answer(task.instances or [])
        if answer <= model.max_length:
            raise
        raise ValueError(
            f"answers of {answer} tokens do not fit into the model's context of {model.max_length}: take another "
            "task, or a longer --max-length where the model's positions allow it"
        ) from error
    finally:
        # the harness puts its cache between the model and whatever is asked of it next
        model.set_cache_hook(CacheHook(None))
    assert results is not None
    return results


def _prepare(task: Task, settings: Settings) -> None:
    """Seed everything and give the task its number of examples, as the harness's command line does."""
    python, *others = (int(seed) for seed in HARNESS_SEEDS.split(","))
    numpy, pytorch, fewshot = others
    if settings.seed is not None:
        python = numpy = pytorch = fewshot = settings.seed
    random.seed(python)
    np.random.seed(numpy)
    torch.manual_seed(pytorch)
    own = task.get_config("num_fewshot")
    # a task that fixes 0 means it
    if own != 0:
        task.set_config("num_fewshot", settings.num_fewshot if settings.num_fewshot is not None else own or 0)
    task.set_fewshot_seed(fewshot)


def evaluate_group(group: Group, rows: list[Row], settings: Settings, step: int | None) -> list[Row]:
    """The rows of a group, which the harness makes of its tasks' rows; none if it has no common metric.

    Args:
        group: with its tasks.
        rows: of all its tasks, for one seed, with their `items`.
        settings, step: as for the tasks.
    """
    names = {task.task_name for task in group.get_all_tasks()}
    inside = [row for row in rows if row["task"] in names]
    metrics: dict[str, dict[str, Any]] = {name: {} for name in names}
    for row in inside:
        metric, _, kept = row["metric"].partition(",")
        values = metrics[row["task"]]
        values["sample_len"] = row["settings"]["samples"]
        values[f"{metric},{kept or 'none'}"] = row["value"]
        values[f"{metric}_stderr,{kept or 'none'}"] = "N/A" if row["stderr"] is None else row["stderr"]
    if not group.has_aggregation or not inside:
        return []
    shots = {row["num_fewshot"] for row in inside}
    defining = {**_shared(inside, "settings", ("samples",)), "tasks": len(names)}
    left_out = (
        *("higher_is_better", "filter", "bootstrap_iterations", "chance", "note", "requests"),
        *("stderr", "groups", "dof"),
    )
    about = {**_shared(inside, "about", left_out), **_chance(group.metadata)}
    of_task = {row["task"]: row for row in inside}
    cut = sum(row["about"].get("truncated_requests", 0) for row in of_task.values())
    about |= {"truncated_requests": cut} if cut else {}
    common = {
        "task": group.name,
        "num_fewshot": shots.pop() if len(shots) == 1 else None,
        "limit": settings.limit,
        "step": step,
        "task_version": _version(group.version),
    }
    better = {row["metric"].partition(",")[0]: row["about"].get("higher_is_better") for row in inside}
    found = _rows(dict(group.aggregate(metrics)), common, defining, about, better, settings)
    by_size = {each.metric: each.weight_by_size for each in group.aggregate_metric_list or []}
    for row in found:
        parts = [part for part in inside if part["metric"] == row["metric"]]
        row["items"] = group_items(row, parts, by_size.get(row["metric"].partition(",")[0], False))
    return found


def _shared(rows: list[Row], part: str, left_out: tuple[str, ...]) -> dict[str, Any]:
    """What all rows say alike in `settings` or `about`."""
    return {
        key: value
        for key, value in rows[0][part].items()
        if key not in left_out and all(key in row[part] and row[part][key] == value for row in rows)
    }


def _rows(
    results: dict[str, Any],
    common: dict[str, Any],
    defining: dict[str, Any],
    about: dict[str, Any],
    better: dict[str, Any],
    settings: Settings,
) -> list[Row]:
    """The harness's `metric,filter` keys as rows; the filter is named if it is not the only one."""
    rows = []
    for key, value in results.items():
        metric, comma, kept = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float | np.number):
            continue
        error = results.get(f"{metric}_stderr,{kept}")
        stderr = finite(float(error)) if isinstance(error, int | float | np.number) else None
        number = finite(float(value))
        more = {**about, "higher_is_better": better.get(metric)}
        if kept != "none":
            more["filter"] = kept
        if settings.bootstrap_iterations is not None:
            more["bootstrap_iterations"] = settings.bootstrap_iterations
        if number is None:
            more["note"] = f"not finite: {value}"
        rows.append(
            {
                **common,
                "metric": metric if kept == "none" else f"{metric},{kept}",
                "value": number,
                "stderr": None if number is None else stderr,
                "settings": {**defining, "samples": int(results.get("sample_len", 0))},
                "about": more,
            }
        )
    return rows


def _chance(metadata: Any) -> dict[str, Any]:
    """What a model that knows nothing scores, where the task says it."""
    level = metadata.get("chance") if isinstance(metadata, dict) else None
    return {"chance": level} if isinstance(level, int | float) else {}


def _version(version: Any) -> float | str | None:
    return version if isinstance(version, int | float) or version is None else str(version)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the harness's bars, prints and warnings from the terminal: errors are raised, and rows hold the rest."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
