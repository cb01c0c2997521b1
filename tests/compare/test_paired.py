"""Differences that are paired and corrected: card, table, CSV, Markdown, terminal and page say the same of them."""

import csv
import io
import json
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from compared import ON, compared, report, task
from rich.console import Console
from scipy.stats import binomtest, false_discovery_control, ttest_rel

from hf_lowrank.compare.frame import ComparedRun
from hf_lowrank.compare.page import render_page
from hf_lowrank.compare.table import Comparison, compare
from hf_lowrank.compare.terminal import print_comparison
from hf_lowrank.compare.text import metrics_csv, render_markdown
from hf_lowrank.hub.card import CardData, render_card
from hf_lowrank.report.baseline import baseline_of, beside_baseline, differences_to_baseline
from hf_lowrank.report.evidence import Kept
from hf_lowrank.report.io import metric_entry, validate_report
from hf_lowrank.report.items import evaluation_settings
from hf_lowrank.report.samples import Samples, sample_key

SEQUENCES, ITEMS = 32, 50


def measured(name: str, shift: float = 0.0, noise: int = 0, method: str = "galore") -> ComparedRun:
    """A run with a loss, its perplexity, a sharpness in two spaces, and a task by item."""
    rng, own = np.random.default_rng(0), np.random.default_rng(noise)
    text, ease = rng.normal(4, 0.5, SEQUENCES), rng.normal(0, 1, ITEMS)
    losses = text + shift + own.normal(0, 0.02, SEQUENCES)
    right = (ease + own.normal(0, 0.5, ITEMS) - 3 * shift > 0).astype(float)
    rises = rng.normal(0.3, 0.1, (4, 1)) + own.normal(0, 0.01, (4, SEQUENCES)) + shift
    of = {
        ("validation_loss", None): Samples.equal("sequence", range(SEQUENCES), losses),
        ("perplexity", None): Samples.equal(
            "sequence", range(SEQUENCES), np.exp(losses.mean()) * (1 + losses - losses.mean())
        ),
        **{
            # one number, but for rounding
            ("landscape/random/sharpness", space): Samples.equal("direction x sequence", range(SEQUENCES), rises + off)
            for space, off in (("dense", 0.0), ("native", 1e-10))
        },
    }
    made = report(name, method)
    made["metrics"], made["evaluations"], kept = [], [], {}
    for (metric, space), samples in of.items():
        stderr, dof = samples.error()
        entry = metric_entry(
            metric, samples.value, stderr=stderr, step=300, settings=ON, space=space, about={"dof": dof}
        )
        made["metrics"].append(entry)
        kept[sample_key(metric, space, 300, ON, {})] = samples
    evaluation = task("brackets", float(right.mean()), stderr=float(right.std(ddof=1)) / math.sqrt(ITEMS))
    made["evaluations"] = [evaluation | {"settings": {"samples": ITEMS}, "about": {}}]
    rows = {
        "task": "brackets", "task_version": "1.0", "metric": "acc", "step": 300,
        "settings": evaluation_settings(made["evaluations"][0]), "form": None, "dtype": None,
        "item": [f"{i}-x" for i in range(ITEMS)], "group": None, "value": right, "weight": 1.0,
    }  # fmt: skip
    return compared(name, made, kept=Kept(kept, pd.DataFrame(rows)))


def column(comparison: Comparison, name: str, space: str | None = None) -> int:
    (found,) = [i for i, c in enumerate(comparison.columns) if (c.name, c.space) == (name, space)]
    return found


def card_report(ours: ComparedRun, base: ComparedRun) -> dict[str, Any]:
    made = {**ours.report.model_dump(), "baseline": baseline_of(base.report)}
    made["baseline"]["differences"] = differences_to_baseline(made, ours.kept, base.kept)
    return made


def test_all_readers_are_told_the_same_of_a_paired_difference() -> None:
    base, ours = measured("full", method="fullrank"), measured("galore", shift=0.1, noise=1)
    found = compare([base, ours], baseline=0)
    at = column(found, "validation_loss")
    loss = found.cells.loc[(1, at)]
    sums = [next(iter(run.kept.samples.values())).sums[0] for run in (ours, base)]
    known = ttest_rel(*sums)
    assert (loss.p, loss.dof) == (pytest.approx(known.pvalue), pytest.approx(SEQUENCES - 1))
    assert loss.delta_stderr == pytest.approx((sums[0] - sums[1]).std(ddof=1) / math.sqrt(SEQUENCES))
    assert (loss.test, loss.paired) == (f"paired over {SEQUENCES} sequences", True)
    assert found.cells.loc[(1, column(found, "landscape/random/sharpness", "dense"))].test == (
        f"paired over 4 directions × {SEQUENCES} sequences"
    )
    right = [run.kept.items["value"] for run in (ours, base)]
    wins, losses = (right[0] > right[1]).sum(), (right[0] < right[1]).sum()
    accuracy = found.cells.loc[(1, column(found, "brackets/acc"))]
    assert accuracy.test == f"McNemar over {ITEMS} items"
    assert accuracy.p == pytest.approx(binomtest(wins, wins + losses).pvalue)

    text, mark = loss.delta_text, loss.marks
    assert (mark, "†" in text) == ("***", False)
    (line,) = [
        line
        for line in csv.DictReader(io.StringIO(metrics_csv(found)))
        if line["delta"] and line["metric"] == "validation_loss"
    ]
    assert (float(line["p"]), float(line["q"]), float(line["dof"])) == (loss.p, loss.q, loss.dof)
    assert (line["test"], line["paired"]) == (loss.test, "True")
    assert (float(line["delta"]), float(line["delta_stderr"])) == (loss.delta, loss.delta_stderr)
    markdown = render_markdown(found)
    assert f"({text} {mark})".replace("*", "\\*").replace("<", "&lt;") in markdown
    assert "galore (Δ: these two models, not these two methods)" in markdown
    assert f"{found.tests} numbers were tested" in markdown
    console = Console(width=200, record=True, file=io.StringIO())
    print_comparison(found, console)
    printed = console.export_text()
    assert f"{text} {mark}" in printed
    assert "Δ: these two models" in printed
    page = json.loads(re.search(r'id="data">(.*?)</script>', render_page(found, []), re.S)[1])
    assert (page["cells"][1][at]["d"], page["cells"][1][at]["w"]) == (text, loss.test)
    assert page["rows"][1]["tested"] == "Δ: these two models, not these two methods"

    made = card_report(ours, base)
    pairs = {(pair.name, pair.number.space): pair.delta for pair in beside_baseline(validate_report(made))}
    pair = pairs["validation_loss", None]
    assert (pair.p, pair.q, pair.dof, pair.test, pair.text) == (loss.p, loss.q, loss.dof, loss.test, text)
    card = render_card(CardData.from_report(made))
    assert f"paired over {SEQUENCES} sequences" in card
    assert f"McNemar over {ITEMS} items" in card
    assert f"corrected for {found.tests} tests" in card
    assert "†" not in card
    assert "as if the two were independent" not in card


def test_one_number_is_tested_once() -> None:
    runs = [measured("full", method="fullrank"), measured("a", 0.01, 1), measured("b", 0.02, 2)]
    found = compare(runs, baseline=0)
    # of each row: the loss and its perplexity, the sharpness in two spaces, a task
    assert found.tests == 2 * 3
    cells = found.cells[found.cells["p"].notna()]
    for row in (1, 2):
        for one, other in (("validation_loss", "perplexity"), ("landscape/random/sharpness",) * 2):
            spaces = ("native", "dense") if one == other else (None, None)
            first, second = (cells.loc[(row, column(found, *each))] for each in zip((one, other), spaces, strict=True))
            assert (first.p, first.q, first.test, first.marks) == (second.p, second.q, second.test, second.marks)
    tested = cells.drop(index=[
        (row, column(found, *each)) for row in (1, 2)
        for each in (("perplexity", None), ("landscape/random/sharpness", "native"))
    ])  # fmt: skip
    assert tested["q"].tolist() == pytest.approx(false_discovery_control(tested["p"]))
    # the difference of a perplexity is its own
    perplexity = cells.loc[(1, column(found, "perplexity"))]
    assert perplexity.delta > 10 * cells.loc[(1, column(found, "validation_loss"))].delta


def test_without_what_pairs_them_differences_are_said_to_be_unpaired() -> None:
    base, ours = measured("full", method="fullrank"), measured("galore", shift=0.1, noise=1)
    whole = compare([base, ours], baseline=0)
    old = replace(base, kept=Kept())
    found = compare([old, ours], baseline=0)
    at = column(found, "validation_loss")
    loss = found.cells.loc[(1, at)]
    assert (loss.test, loss.paired, loss.marks) == ("unpaired", False, "†")
    assert loss.delta_stderr > 5 * whole.cells.loc[(1, at)].delta_stderr
    assert loss.dof == pytest.approx(62, abs=0.5)
    assert "† marks an unpaired difference" in render_markdown(found)
    assert "marks an unpaired" not in render_markdown(whole)
    made = card_report(ours, old)
    assert made["baseline"]["differences"][0]["paired"] is False
    card = render_card(CardData.from_report(made))
    assert "† marks an unpaired one" in card
    # a report of before, whose differences are not stored
    del made["baseline"]["differences"]
    assert render_card(CardData.from_report(made)) == card


def test_a_number_that_was_measured_again_is_not_given_the_stored_difference() -> None:
    base, ours = measured("full", method="fullrank"), measured("galore", shift=0.1, noise=1)
    made = card_report(ours, base)
    made["metrics"][0]["value"] += 0.01
    deltas = {pair.name: pair.delta for pair in beside_baseline(validate_report(made))}
    assert deltas["validation_loss"].test == "unpaired"
    assert deltas["brackets/acc".partition("/")[2]].paired


def test_samples_of_another_number_pair_nothing() -> None:
    base, ours = measured("full", method="fullrank"), measured("galore", shift=0.1, noise=1)
    stale = {key: replace(samples, sums=samples.sums + 1) for key, samples in ours.kept.samples.items()}
    wrong = ours.kept.items.assign(value=1.0)
    found = compare([base, replace(ours, kept=Kept(stale, wrong))], baseline=0)
    tests = found.cells["test"].dropna()
    assert set(tests) == {"unpaired"}


def test_a_number_with_a_bias_is_paired_by_what_it_is_without_it() -> None:
    base, ours = measured("full", method="fullrank"), measured("galore", shift=0.1, noise=1)

    def biased(run: ComparedRun) -> ComparedRun:
        made = run.report.model_dump()
        sharpness = made["metrics"][2]
        sharpness["about"] |= {"corrected": sharpness["value"]}
        sharpness["value"] *= 1.5
        return replace(run, report=validate_report(made))

    found = compare([biased(base), biased(ours)], baseline=0)
    cell = found.cells.loc[(1, column(found, "landscape/random/sharpness", "dense"))]
    whole = compare([base, ours], baseline=0)
    exact = whole.cells.loc[(1, column(whole, "landscape/random/sharpness", "dense"))]
    assert (cell.test, cell.p, cell.delta_stderr) == (exact.test, exact.p, exact.delta_stderr)
    assert cell.delta == pytest.approx(1.5 * exact.delta)


def test_damaged_files_leave_differences_unpaired_and_are_said(tmp_path) -> None:
    base = measured("full", method="fullrank")
    for name in ("validation.samples", "items"):
        (tmp_path / f"{name}.parquet").write_bytes(b"PAR1 broken")
    kept = Kept.read(tmp_path)
    assert (kept.samples, kept.items) == ({}, None)
    ours = replace(measured("galore", noise=1), kept=kept, problems=kept.problems)
    found = compare([base, ours], baseline=0)
    assert set(found.cells["test"].dropna()) == {"unpaired"}
    notices = [notice.text for notice in found.notes if notice.title == "galore"]
    assert [text.partition(":")[0] for text in notices] == [
        f"differences that need {name}.parquet are unpaired" for name in ("items", "validation.samples")
    ]
