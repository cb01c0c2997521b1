"""One engine decides what is comparable: card, table, CSV, Markdown, terminal and page agree on every pair of runs."""

import csv
import io
import json
import re
from typing import Any

import pytest
from compared import report, runs
from rich.console import Console

from hf_lowrank.compare.page import render_page
from hf_lowrank.compare.table import Comparison, compare
from hf_lowrank.compare.terminal import print_comparison
from hf_lowrank.compare.text import metrics_csv, render_markdown, runs_csv
from hf_lowrank.hub.card import CardData, render_card
from hf_lowrank.report.baseline import baseline_of, beside_baseline
from hf_lowrank.report.comparability import FACTS, differences
from hf_lowrank.report.io import metric_entry

# what changes each fact, and that fact alone: (part of the report, field, value)
CHANGES: dict[str, tuple[str, str, Any]] = {
    "data": ("data", "revision_or_hash", "sha256:other"),
    "tokenizer": ("data", "tokenizer_hash", "sha256:other"),
    "sequence": ("data", "sequence_length", 512),
    "packing": ("data", "packing", False),
    "validation": ("data", "split_seed", 7),
    "tokens": ("run", "tokens_seen", 99),
    "steps": ("run", "max_steps", 301),
    "model": ("model", "size", "60m"),
    "precision": ("run", "precision", "bf16 autocast"),
    "checkpoint": ("run", "checkpoint_of", {"steps": 600}),
    "unfinished": ("run", "steps", 299),
    "init_from": ("run", "init_from", {"source": "user/other", "method": "fullrank", "step": 9, "form": "dense"}),
    "rate": ("run", "learning_rate", 0.5),
    "other_rate": ("optimizer", "other_lr_scale", 4.0),
    "schedule": ("lr_schedule", "warmup_steps", 7),
    "batch": ("batch", "global_sequences", 7),
    "optimizer": ("optimizer", "weight_decay", 0.7),
    "code": ("versions", "torch", "0.0"),
    "hardware": ("run", "hardware", "an abacus"),
}
# other ways in which one fact differs
MORE = [
    ("data", ("data", "name", "other")),
    ("data", ("data", "config", "other")),
    ("tokenizer", ("data", "tokenizer_hash", None)),
    ("validation", ("data", "validation_sequences", 7)),
    ("validation", ("data", "validation_tokens", 7)),
    ("tokens", ("run", "tokens_seen", None)),
    ("model", ("model", "architecture", "gpt2")),
    ("model", ("model", "config_hash", "sha256:other")),
    ("precision", ("run", "precision", None)),
]


def changed(part: str, field: str, value: Any) -> dict[str, Any]:
    made = report("b")
    holder = made[part] if part in ("run", "data") else made["run"][part]
    holder[field] = value
    if field == "max_steps":
        # a run of 301 steps that did them all
        holder["steps"] = value
    return made


def told(comparison: Comparison, ours: dict[str, Any], base: dict[str, Any]) -> dict[str, tuple[set[str], set[str]]]:
    """What each reader is told of the second run: titles of the facts that make it not comparable, and of the rest."""
    lines = list(csv.DictReader(io.StringIO(metrics_csv(comparison))))
    by_run = list(csv.DictReader(io.StringIO(runs_csv(comparison))))
    page = json.loads(re.search(r'id="data">(.*?)</script>', render_page(comparison, []), re.S)[1])
    titles = {fact.title.lower() for fact in FACTS}

    def split(text: str) -> set[str]:
        return set(filter(None, text.split("; ")))

    console = Console(width=200, record=True, file=io.StringIO())
    print_comparison(comparison, console)
    printed = console.export_text()
    terminal = tuple(
        {title for title in titles if f"{start}{title.capitalize()}: " in printed} for start in ("• ", "note: ")
    )
    markdown = render_markdown(comparison)
    marked = re.findall(r"^> - \*\*(.*?)\*\*", markdown, re.M), re.findall(r"^- (.*?): ", markdown, re.M)
    card = CardData.from_report({**ours, "baseline": baseline_of(base)}).baseline
    assert card is not None
    text = render_card(CardData.from_report({**ours, "baseline": baseline_of(base)}))
    assert ("**The two runs differ in more than the method: " in text) == bool(card.conflicts)
    assert ("Differences that leave their numbers comparable: " in text) == bool(card.notes)

    def of_card(texts: Any) -> set[str]:
        return {text.partition(" (")[0] for text in texts}

    levels = ("conflict", "note")
    return {
        "card": (of_card(card.conflicts), of_card(card.notes)),
        "notices": tuple(
            {n.title.lower() for n in comparison.notices if n.level == level} & titles for level in levels
        ),
        "table": (set(comparison.rows[1].differs), set(comparison.rows[1].notes)),
        "metrics.csv": (split(lines[-1]["not_comparable_in"]), split(lines[-1]["differs_in"])),
        "runs.csv": (split(by_run[1]["not_comparable_in"]), split(by_run[1]["differs_in"])),
        "markdown": tuple({title.lower() for title in each} & titles for each in marked),
        "terminal": terminal,
        "page": (set(page["rows"][1]["differs"]), set(page["rows"][1]["notes"])),
    }  # type: ignore[return-value]


def test_every_fact_is_tried() -> None:
    assert list(CHANGES) == [fact.key for fact in FACTS]


@pytest.mark.parametrize(("key", "change"), [*CHANGES.items(), *MORE], ids=str)
def test_all_readers_are_told_the_same_of_a_pair(key: str, change: tuple[str, str, Any]) -> None:
    base, ours = report("a"), changed(*change)
    fact = next(fact for fact in FACTS if fact.key == key)
    expected = ({fact.title.lower()}, set()) if fact.level == "conflict" else (set(), {fact.title.lower()})
    said = told(compare(runs(base, ours), baseline=0), ours, base)
    assert said == dict.fromkeys(said, expected)
    # whichever of the two is the baseline
    said = told(compare(runs(ours, base), baseline=0), base, ours)
    assert said == dict.fromkeys(said, expected)


def test_alike_runs_are_told_to_be_alike() -> None:
    base, ours = report("a"), report("b", "fullrank", seed=2)
    said = told(compare(runs(base, ours), baseline=0), ours, base)
    assert said == dict.fromkeys(said, (set(), set()))


def test_a_checkpoint_in_the_middle_of_a_run_is_not_unfinished() -> None:
    whole = report("a", steps=600, max_steps=600, tokens_seen=200)
    step, other = (
        report(name, steps=300, max_steps=600, tokens_seen=100, checkpoint_of={"steps": 600}) for name in ("a3", "b3")
    )
    alike = told(compare(runs(step, other), baseline=0), other, step)
    assert alike == dict.fromkeys(alike, (set(), set()))
    own = told(compare(runs(whole, step), baseline=0), step, whole)
    assert own == dict.fromkeys(own, ({"tokens seen", "checkpoint"}, set()))
    stopped = report("s", steps=300, max_steps=600, tokens_seen=100)
    early = told(compare(runs(whole, stopped), baseline=0), stopped, whole)
    assert early == dict.fromkeys(early, ({"tokens seen", "unfinished"}, set()))


# ---- numbers ----


@pytest.mark.parametrize(
    ("change", "side_by_side"),
    [
        ({}, True),
        ({"about": {"matrices": 9}}, True),
        ({"settings": {"directions": 20}}, False),
        ({"settings": {"evaluation_hash": "e2"}}, False),
        ({"settings": {"evaluation_hash": None}}, False),
        ({"reference": {"since": 100}}, False),
        ({"space": "native"}, False),
        ({"name": "landscape/random/variance"}, False),
    ],
    ids=str,
)
def test_card_and_table_put_the_same_numbers_side_by_side(change: dict[str, Any], side_by_side: bool) -> None:
    def with_metric(run: str, value: float, **more: Any) -> dict[str, Any]:
        made = report(run)
        metric = {"name": "landscape/random/sharpness", "space": "dense", "reference": {"since": 150}, **more}
        settings = {"directions": 10, "evaluation_hash": "e1", **metric.pop("settings", {})}
        about = metric.pop("about", {"matrices": 28})
        entry = metric_entry(metric.pop("name"), value, stderr=0.1, step=300, settings=settings, about=about, **metric)
        made["metrics"], made["evaluations"] = [entry], []
        return made

    base, ours = with_metric("a", 1.0), with_metric("b", 2.0, **change)
    comparison = compare(runs(base, ours), baseline=0)
    tested = comparison.cells[comparison.cells["delta_stderr"].notna()]
    pairs = beside_baseline(runs({**ours, "baseline": baseline_of(base)})[0].report)
    assert len(tested) == len(pairs) == int(side_by_side)
    if side_by_side:
        cell, pair = tested.iloc[0], pairs[0]
        assert (cell.delta, cell.delta_stderr, cell.p) == (pair.delta.value, pair.delta.stderr, pair.delta.p)
        assert cell.delta_text.startswith(pair.delta.size)


def test_an_older_baseline_that_keeps_fewer_facts_is_not_told_to_be_comparable() -> None:
    ours = report("b")
    kept = ("name", "method", "steps", "tokens_seen", "parameters", "optimizer_state_bytes", "learning_rate", "data")
    old = {key: baseline_of(report("a"))[key] for key in (*kept, "metrics", "evaluations")}
    card = CardData.from_report({**ours, "baseline": old}).baseline
    assert card is not None
    assert card.conflicts == ["model (not recorded for the baseline)", "precision (not recorded for the baseline)"]


def test_differences_against_the_most_common() -> None:
    made = [run.report for run in runs(report("a", precision="bf16"), report("b"), report("c"))]
    (difference,) = differences(made)
    assert (difference.words, difference.odd) == (("bf16", "fp32", "fp32"), (True, False, False))
    assert [each.odd for each in differences(made, reference=0)] == [(False, True, True)]
