"""Results by item as plain data: scores of every kind, and standard errors of items that come in groups."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t

from hf_lowrank.downstream.items import clustered_error, group_items, scored_items
from hf_lowrank.downstream.quick.generate import TASKS
from hf_lowrank.downstream.quick.items import KINDS
from hf_lowrank.downstream.results import with_items, write_evaluations
from hf_lowrank.report.items import ITEMS, items_of, read_items


def task_of(aggregation, **metadata):
    aggregate = SimpleNamespace(__name__=aggregation)
    config = SimpleNamespace(metadata=metadata, output_type="multiple_choice")
    return SimpleNamespace(aggregation=lambda: {"score": aggregate}, config=config)


def samples_of(values, **fields):
    return [
        {"filter": "none", "doc_id": i, "doc_hash": f"{i:064x}", "doc": fields, "score": value}
        for i, value in enumerate(values)
    ]


LIKELIHOODS = [(-2.0, 4), (-9.0, 6)]


@pytest.mark.parametrize(
    ("aggregation", "values", "number", "items"),
    [
        ("mean", [True, 0, 0.5, np.float32(1)], 0.625, [(1, 1), (0, 1), (0.5, 1), (1, 1)]),
        ("perplexity", [-1.0, -3.0], math.exp(2), [(1, 1), (3, 1)]),
        ("weighted_perplexity", LIKELIHOODS, math.exp(1.1), [(0.5, 4), (1.5, 6)]),
        ("bits_per_byte", LIKELIHOODS, 1.1 / math.log(2), [(0.5 / math.log(2), 4), (1.5 / math.log(2), 6)]),
        # each of a document's instructions counts
        ("agg_inst_level_acc", [[True, False], [True, True, True]], 0.8, [(0.5, 2), (1, 3)]),
        # a score of all pairs together, and one that another rule makes of the items
        ("matthews_corrcoef", [(0, 1), (1, 1)], 0.0, []),
        ("brier_score", [0.5, 0.7], 0.123, []),
    ],
)
def test_a_number_is_the_weighted_mean_of_its_items_or_has_none(aggregation, values, number, items):
    found = scored_items(samples_of(values), task_of(aggregation), {"metric": "score", "value": number})
    assert [[item["value"] for item in found], [item["weight"] for item in found]] == [
        pytest.approx([value for value, _ in items]),
        pytest.approx([weight for _, weight in items]),
    ]
    assert [item["item"] for item in found] == [f"{i}-00000000" for i in range(len(items))]


def in_groups(values, groups, weights=None):
    weights = np.ones(len(values)) if weights is None else weights
    return [
        {"item": str(i), "value": float(v), "weight": float(w), "group": None if g is None else str(g)}
        for i, (v, g, w) in enumerate(zip(values, groups, weights, strict=True))
    ]


def test_the_clustered_error_by_hand():
    values, groups = [1, 0, 1, 1, 0, 0], [0, 0, 1, 1, 2, 2]
    # sums of residuals from 0.5: 0, 1, -1
    error, count = clustered_error(in_groups(values, groups), 0.5)
    assert (error, count) == (pytest.approx(math.sqrt(3 / 2 * 2 / 36)), 3)
    # groups of one are independent items
    error, count = clustered_error(in_groups(values, range(6)), 0.5)
    assert (error, count) == (pytest.approx(np.std(values, ddof=1) / math.sqrt(6)), 6)
    # one right answer in each group, whatever it is
    assert clustered_error(in_groups([1, 0, 0, 1], [0, 0, 1, 1]), 0.5) == (0.0, 2)
    assert clustered_error(in_groups([1, 0], [0, 0]), 0.5) == (None, 1)
    assert clustered_error(in_groups([1, 0], [None, None]), 0.5) is None
    # of a perplexity, by the slope of exp
    error, _ = clustered_error(in_groups(values, groups), math.exp(0.5))
    assert error == pytest.approx(math.exp(0.5) * math.sqrt(3 / 2 * 2 / 36))


def test_a_group_of_tasks_weights_its_tasks_as_its_number_does():
    parts = [
        {"task": "a", "settings": {"samples": 2}, "items": in_groups([1, 0], [0, 0])},
        {"task": "b", "settings": {"samples": 3}, "items": in_groups([1, 1, 1], [None] * 3)},
    ]
    found = group_items({"value": 0.8}, parts, by_size=True)
    assert [item["weight"] for item in found] == [1] * 5
    assert [item["item"] for item in found] == ["a/0", "a/1", "b/0", "b/1", "b/2"]
    assert [item["group"] for item in found] == ["a/0", "a/0", "b/0", "b/1", "b/2"]
    found = group_items({"value": 0.75}, parts, by_size=False)
    assert [item["weight"] for item in found] == pytest.approx([1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3])
    assert group_items({"value": 0.7}, parts, by_size=True) == [], "another rule makes the group's number"


def row(task="a", step=1, seed=0, **more):
    fields = {"num_fewshot": 0, "limit": None, "task_version": 1.0, "metric": "acc", "value": 0.5, "stderr": 0.1}
    settings = {"seed": seed, "samples": 2, "context_length": 8}
    return {"task": task, "step": step, "settings": settings, "about": {"form": "native"}, **fields, **more}


def test_items_stay_with_their_rows_and_go_with_them(tmp_path):
    first = [row(items=in_groups([1, 0], "xx")), row(seed=1, items=in_groups([1, 1], "xx"))]
    write_evaluations(tmp_path, first)
    stored = json.loads((tmp_path / "evaluations.json").read_text())
    assert "items" not in stored[0]
    # another task is added, and a seed evaluated again
    again = row(seed=1, items=in_groups([0, 0], "xx"))
    write_evaluations(tmp_path, [stored[0], again, row("b", items=in_groups([1, 0], [None, None]))])
    table = read_items(tmp_path / ITEMS)
    assert table.groupby(["task", "settings"])["value"].mean().tolist() == [0.5, 0.0, 0.5]
    entry = {**row(), "settings": {"seeds": [0, 1], "samples": 2, "context_length": 8}}
    found = items_of(table, entry)
    assert found.to_dict("list") == {"item": ["0", "1"], "group": ["x", "x"], "value": [0.5, 0.0], "weight": [1, 1]}
    assert items_of(table, {**entry, "step": 2}) is None
    assert items_of(table, {**entry, "about": {"form": "dense"}}) is None
    assert [item["value"] for item in with_items(tmp_path, [stored[0]])[0]["items"]] == [1.0, 0.0]
    write_evaluations(tmp_path, [stored[0]])
    assert len(read_items(tmp_path / ITEMS)) == 2
    write_evaluations(tmp_path, [row("c")])
    assert not (tmp_path / ITEMS).exists()
    assert read_items(tmp_path / ITEMS).empty


def test_a_table_that_is_none_is_refused(tmp_path):
    write_evaluations(tmp_path, [row(items=in_groups([1, 0], "xx"))])
    good = pd.read_parquet(tmp_path / ITEMS)
    for made, message in (
        (pd.concat([good, good]), "item 0 of a stands there twice for step 1"),
        (good.drop(columns="value"), "value"),
        (good.assign(value="much"), "not readable"),
    ):
        made.to_parquet(tmp_path / "made.parquet")
        with pytest.raises(ValueError, match=message):
            read_items(tmp_path / "made.parquet")


# ---- the groups of our own tasks ----


def loaded(name):
    from hf_lowrank.downstream.quick.tasks.loader import load

    return load(f"{name}.jsonl")["test"].to_pandas()


GROUPED = ("brackets", "punctuation", "indentation", "names", "cloze")


@pytest.mark.parametrize("name", KINDS)
def test_own_tasks_say_which_items_share_their_answers(name):
    table = loaded(name)
    of_group = table.groupby("group")
    answers = KINDS[name].answers if name in GROUPED else 1
    assert set(of_group.size()) == {answers}
    assert (of_group["choices"].agg(lambda choices: len(set(map(tuple, choices)))) == 1).all()
    if name in GROUPED:
        # each answer is right in one item
        assert (of_group["answer"].nunique() == answers).all()
    assert ("group_by: group" in (TASKS / f"{name}.yaml").read_text()) is (name in GROUPED)


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("skill", [0.0, 1.0])
def test_intervals_of_the_clustered_error_cover_on_the_real_items(name, skill):
    """A model prefers some answers to others, more than it knows which is right: the items of a group depend.

    The shipped groups are the population, of which a task's number of groups is drawn anew each time.
    """
    table, draw = loaded(name), np.random.default_rng(0)
    choices = np.array(table["choices"].tolist())
    answer, size = table["answer"].to_numpy(), choices.shape[1]
    _, kinds = np.unique(choices, return_inverse=True)
    liked = draw.normal(size=kinds.max() + 1)[kinds.reshape(choices.shape)]
    likelihood = 3 * liked + draw.normal(size=choices.shape)
    likelihood[np.arange(len(answer)), answer] += skill
    right = (likelihood.argmax(1) == answer).reshape(-1, size).astype(float)
    count = len(right)
    drawn = right[draw.integers(count, size=(4000, count))]
    values = drawn.mean((1, 2))
    errors = drawn.sum(2).std(1, ddof=1) / math.sqrt(count) / size
    first = in_groups(drawn[0].ravel(), np.repeat(np.arange(count), size))
    assert clustered_error(first, values[0]) == (pytest.approx(errors[0]), count)
    inside = np.abs(values - right.mean()) <= t.ppf(0.975, count - 1) * errors + 1e-12
    assert 0.92 <= inside.mean() <= 0.98
    assert errors.mean() == pytest.approx(values.std(), rel=0.05)
    # as if items were independent the error is far too large
    naive = np.sqrt(drawn.reshape(4000, -1).var(1, ddof=1) / right.size)
    assert naive.mean() > 1.2 * values.std()
