"""From the harness's samples to results by item, and the standard error of items that come in groups."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.task import Task

from hf_lowrank.families.records import finite

__all__ = ["LARGEST_TEXTS", "clustered_error", "group_items", "scored_items", "texts_size"]

Row = dict[str, Any]

# bytes of prompts, targets and answers that may be published with a run's metrics
LARGEST_TEXTS = 256 * 2**20
# documents from which the size of all is estimated
_ESTIMATED_FROM = 32
# aggregations of the harness over (log-likelihood, weight) or log-likelihoods -> what an item's loss is divided by
_OF_LIKELIHOODS = {"perplexity": 1.0, "weighted_perplexity": 1.0, "bits_per_byte": math.log(2)}


def scored_items(samples: Sequence[Mapping[str, Any]], task: Task, row: Row, texts: bool = False) -> list[Row]:
    """The items of one number of a task.

    Args:
        samples: what the harness logs of every document.
        task: that was evaluated; its metadata may name the field of a document by which items are grouped
            (`group_by`).
        row: the number, with `metric` and `value`.
        texts: add prompt, target and answer.

    Returns:
        A row an item, with the columns of `hf_lowrank.report.items` that differ between items. None at all if the
        metric is no mean over items.
    """
    metric, _, kept = row["metric"].partition(",")
    aggregation = getattr(task.aggregation().get(metric), "__name__", "")
    group_by = (task.config.metadata or {}).get("group_by")
    items = []
    for sample in samples:
        if sample["filter"] != (kept or "none") or metric not in sample:
            continue
        scored = _score(sample[metric], aggregation)
        if scored is None:
            return []
        items.append(
            {
                "item": f"{sample['doc_id']}-{sample['doc_hash'][:8]}",
                "group": None if group_by is None else str(sample["doc"][group_by]),
                "value": finite(scored[0]),
                "weight": scored[1],
                **(_texts(sample, task) if texts else {}),
            }
        )
    return items if _slope(items, row["value"]) is not None else []


def _score(value: Any, aggregation: str) -> tuple[float, float] | None:
    """An item's value and weight."""
    unit = _OF_LIKELIHOODS.get(aggregation)
    if unit is not None:
        likelihood, weight = value if isinstance(value, tuple | list) else (value, 1)
        return (-float(likelihood) / float(weight) / unit, float(weight)) if weight else None
    if isinstance(value, list) and value and all(_is_number(each) for each in value):
        # several results of one document, such as its instructions
        return sum(map(float, value)) / len(value), float(len(value))
    return (float(value), 1.0) if _is_number(value) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float | np.number | np.bool_)


def _mean(items: Sequence[Row]) -> float:
    total = math.fsum(item["weight"] for item in items)
    return math.fsum(item["weight"] * item["value"] for item in items) / total


def _slope(items: Sequence[Row], value: float | None) -> float | None:
    """How much a number changes with the mean of its items; None if it is neither the mean nor exp of it."""
    if not items or value is None or any(item["value"] is None for item in items):
        return None
    mean = _mean(items)
    if math.isclose(mean, value, rel_tol=1e-6, abs_tol=1e-9):
        return 1.0
    return value if mean < 700 and math.isclose(math.exp(mean), value, rel_tol=1e-6) else None


def _texts(sample: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """What an item was asked, the right answer, and what was answered."""
    arguments, answers = sample["arguments"], sample["filtered_resps"]
    kind, target, answer = task.config.output_type, sample["target"], None
    if kind == "multiple_choice":
        # what the harness asks beyond the choices is for other metrics
        choices = [str(choice) for choice in task.doc_to_choice(sample["doc"])]
        answer = choices[int(np.argmax([likelihood for likelihood, _ in answers[: len(choices)]]))]
        target = choices[target] if isinstance(target, int) and 0 <= target < len(choices) else target
    elif kind == "generate_until":
        answer = answers[0]
    elif kind == "loglikelihood" and answers[0][1]:
        # greedy decoding gives the target; what else it would give was not asked
        answer = arguments[0][1]
    return {
        "prompt": str(arguments[0][0]),
        "target": None if target is None else str(target),
        "answer": None if answer is None else str(answer),
    }


def texts_size(task: Task, limit: float | None, num_fewshot: int | None) -> int:
    """About how many characters prompts, targets and answers of a task have, from its first documents."""
    documents = task.eval_docs
    count = len(documents)
    asked = count if limit is None else math.ceil(count * limit) if limit < 1 else min(count, int(limit))
    first = [documents[index] for index in range(min(count, _ESTIMATED_FROM))]
    own = task.get_config("num_fewshot")
    shots = own if own == 0 or num_fewshot is None else num_fewshot
    length = sum(len(str(task.doc_to_text(each))) + 2 * len(str(task.doc_to_target(each))) for each in first)
    return round(asked * length * (1 + (shots or 0)) / max(1, len(first)))


def group_items(row: Row, inside: Sequence[Row], by_size: bool) -> list[Row]:
    """The items of a group's number: those of its tasks, each task with the weight that it has in the group.

    Args:
        row: the group's number.
        inside: the rows of its tasks with the same metric, each with its `items`.
        by_size: whether a task counts by its number of items, else all count alike.

    Returns:
        None at all if a task has no items, or they do not make up the number.
    """
    items: list[Row] = []
    # beside items in groups, an independent one is a group of its own
    grouped = any(item["group"] is not None for part in inside for item in part["items"])
    for part in inside:
        total = sum(item["weight"] for item in part["items"])
        share = part["settings"]["samples"] if by_size else 1.0
        for item in part["items"]:
            group = f"{part['task']}/{item['group'] or item['item']}" if grouped else None
            name, weight = f"{part['task']}/{item['item']}", item["weight"] * share / total
            items.append({"item": name, "group": group, "value": item["value"], "weight": weight})
    complete = all(part["items"] for part in inside)
    return items if complete and _slope(items, row["value"]) is not None else []


def clustered_error(items: Sequence[Row], value: float | None) -> tuple[float | None, int] | None:
    """The standard error of a number whose items come in groups that are drawn as a whole, and how many groups.

    With residuals e = w (v - mean) the variance of the mean is G / (G - 1) sum over groups of (sum of e)^2 / (sum of
    w)^2 (Liang and Zeger 1986; Cameron and Miller 2015, section II); an interval takes Student's t with G - 1 degrees
    of freedom. That of a perplexity follows from the slope of exp.

    Returns:
        None if the items are independent. The error is None if there is a single group.
    """
    slope = _slope(items, value)
    if slope is None or any(item["group"] is None for item in items):
        return None
    weights = np.array([item["weight"] for item in items])
    residuals = weights * (np.array([item["value"] for item in items]) - _mean(items))
    _, of_group = np.unique([item["group"] for item in items], return_inverse=True)
    sums = np.bincount(of_group, residuals)
    count = len(sums)
    if count < 2:
        return None, count
    variance = count / (count - 1) * float((sums**2).sum()) / float(weights.sum()) ** 2
    return slope * math.sqrt(variance), count
