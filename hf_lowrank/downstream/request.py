"""What a user asks for: words for tasks and suites, with the settings that belong to them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lm_eval.tasks import TaskManager

from hf_lowrank.downstream.catalogue import Loaded, find_tasks, leaves, load_tasks, task_digest
from hf_lowrank.downstream.harness import Settings, quiet

__all__ = ["SUITES", "Request", "Suite", "checked_limit", "load_requests", "read_requests"]


@dataclass(frozen=True)
class Suite:
    """Tasks that are evaluated together.

    Attributes:
        tasks: tasks and groups, as the harness spells them.
        num_fewshot: examples in the prompt; None for each task's own number.
        seeds: None for the harness's own.
        bootstrap_iterations: None for the harness's own.
    """

    tasks: tuple[str, ...]
    num_fewshot: int | None = None
    seeds: tuple[int, ...] | None = None
    bootstrap_iterations: int | None = None


SUITES = {
    # arXiv 2605.13652 and its code: 0-shot, seeds 42 to 46, 1000 bootstrap iterations
    "study": Suite(
        (
            *("piqa", "copa", "mrpc", "rte", "mnli", "arc_easy", "blimp", "sst2", "qqp", "qnli", "boolq", "multirc"),
            *("cola", "wsc", "truthfulqa_mc1", "truthfulqa_mc2", "toxigen", "gsm8k", "ifeval"),
            "leaderboard_instruction_following",
        ),
        num_fewshot=0,
        seeds=(42, 43, 44, 45, 46),
        bootstrap_iterations=1000,
    ),
    # needs no network: text of the embedded corpus that no model trained on it has seen
    "quick": Suite(("hf_lowrank_quick",)),
}


@dataclass(frozen=True)
class Request:
    """A task or group that was asked for.

    Attributes:
        name: of the task or group.
        digest: of everything that defines it.
        leaves: the tasks in it.
        settings: one for each seed.
    """

    name: str
    digest: str
    leaves: tuple[str, ...]
    settings: tuple[Settings, ...]


def read_requests(
    words: Sequence[str],
    include: tuple[Path, ...] = (),
    *,
    num_fewshot: int | None = None,
    seeds: tuple[int, ...] | None = None,
    bootstrap_iterations: int | None = None,
    limit: float | None = None,
    log_items: bool = False,
) -> tuple[TaskManager, list[Request]]:
    """What words of a command line ask for; what is given here goes before a suite's own settings.

    Raises:
        ValueError: there is no such task.
    """
    suite_of: dict[str, str | None] = {}
    for word in (word.strip() for word in words):
        if word in SUITES:
            suite_of |= {name: word for name in SUITES[word].tasks if name not in suite_of}
        elif word:
            suite_of[word] = None
    if not suite_of:
        raise ValueError(f"no task to evaluate: name some, or a suite ({', '.join(SUITES)})")
    with quiet():
        manager, names = find_tasks(list(suite_of), include)
    requests = []
    for name in names:
        suite = SUITES.get(suite_of.get(name) or "")
        if suite is None:
            chosen = (num_fewshot, seeds, bootstrap_iterations)
        else:
            chosen = (
                suite.num_fewshot if num_fewshot is None else num_fewshot,
                suite.seeds if seeds is None else seeds,
                suite.bootstrap_iterations if bootstrap_iterations is None else bootstrap_iterations,
            )
        settings = tuple(Settings(chosen[0], limit, seed, chosen[2], log_items) for seed in chosen[1] or (None,))
        requests.append(Request(name, task_digest(manager, name), tuple(leaves(manager, name)), settings))
    return manager, requests


def load_requests(words: Sequence[str], include: tuple[Path, ...] = ()) -> list[tuple[Loaded, Settings]]:
    """The tasks that words ask for, with their data, and the settings of a suite's first seed.

    Raises:
        ValueError: there is no such task, or its data cannot be had.
    """
    manager, requests = read_requests(words, include)
    with quiet():
        return [(load_tasks(manager, request.name), request.settings[0]) for request in requests]


def checked_limit(limit: float | None) -> float | None:
    """A limit as the harness takes it, which reads 1.0 as one item.

    Raises:
        ValueError: it is neither a number of items nor a share.
    """
    if limit is None or 0 < limit < 1:
        return limit
    if not math.isfinite(limit) or limit < 1 or limit != int(limit):
        raise ValueError(f"limit {limit:g}: give a number of items, or a share between 0 and 1")
    return int(limit)
