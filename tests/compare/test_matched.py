"""Runs at a validation loss, a step or a number of tokens: interpolation by hand, what is said, what is refused."""

import csv
import io
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from compared import LOSS, ON, cell, column, compared, report, said, task, values, write_run
from rich.console import Console

from hf_lowrank.compare.charts import charts
from hf_lowrank.compare.matched import At, parse_at
from hf_lowrank.compare.page import render_page
from hf_lowrank.compare.table import compare
from hf_lowrank.compare.terminal import print_comparison
from hf_lowrank.compare.text import heading, metrics_csv, render_markdown, runs_csv
from hf_lowrank.report.evidence import Kept
from hf_lowrank.report.io import metric_entry
from hf_lowrank.report.pairing import Items, blended, paired
from hf_lowrank.report.samples import Samples, sample_key

SHARPNESS = "landscape/random/sharpness"
TRACE = "curvature/trace"


def run(name, losses, seed=1, on=ON, sharpness=True, tables=None, **facts):
    """A run with these losses by step; its sharpness is 10 times the step, its accuracy a thousandth of it."""
    made = report(name, seed=seed, **facts)
    made["metrics"], made["evaluations"] = [], []
    for step, loss in losses.items():
        numbers = [(LOSS, loss, 0.01 * step / 100), ("perplexity", math.exp(loss), 0.1)]
        numbers += [(SHARPNESS, 10.0 * step, 0.1 * step)] if sharpness else []
        made["metrics"] += [
            metric_entry(metric, value, stderr=error, step=step, settings=on, space="dense" if "/" in metric else None)
            for metric, value, error in numbers
        ]
        since = {"since": step - 100}
        made["metrics"].append(
            metric_entry("spectral/update/stable_rank", 1.0, step=step, settings=since, space="dense")
        )
        made["evaluations"].append(task("brackets", step / 1000, stderr=0.02, step=step))
    return compared(name, made, tables or {})


# a crosses 4.25 a quarter of the way from step 100 to 200, b reaches it at step 200
A, B = {100: 4.5, 200: 3.5, 300: 3.0}, {100: 5.0, 200: 4.25, 300: 3.75}


def test_between_two_checkpoints_every_number_is_interpolated_in_the_loss() -> None:
    found = compare([run("a", A), run("b", B)], at="loss=4.25", baseline=1)
    assert found.at == "validation loss 4.25"
    assert heading(found) == "2 pre-training runs compared at validation loss 4.25"
    assert values(found, column(found, LOSS)) == [4.25, 4.25]
    assert values(found, column(found, SHARPNESS)) == pytest.approx([0.75 * 1000 + 0.25 * 2000, 2000])
    assert values(found, column(found, "brackets/acc")) == pytest.approx([0.125, 0.2])
    assert values(found, column(found, "steps_taken")) == pytest.approx([125, 200])
    assert values(found, column(found, "tokens_taken")) == pytest.approx([125 * 1228800 / 300, 200 * 1228800 / 300])
    # the exponential of one loss is one perplexity
    assert values(found, column(found, "perplexity"))[0] == pytest.approx(math.exp(4.25))
    assert cell(found, 0, column(found, "perplexity")).stderr == pytest.approx(math.exp(4.25) * 0.0125)
    sharp = cell(found, 0, column(found, SHARPNESS))
    assert sharp.stderr == pytest.approx(0.75 * 10 + 0.25 * 20)
    assert (sharp.from_step, sharp.to_step, sharp.weight) == (100, 200, 0.25)
    assert pd.isna(sharp.step)
    assert sharp.delta == pytest.approx(-750)
    # what is equal by construction is not tested
    for name in (LOSS, "perplexity"):
        assert cell(found, 0, column(found, name)).why == "equal, because the runs are taken there"
    exact = cell(found, 1, column(found, SHARPNESS))
    assert (exact.step, exact.stderr) == (200, 20.0)
    assert math.isnan(exact.weight)
    assert cell(found, 0, column(found, LOSS)).stderr == pytest.approx(0.75 * 0.01 + 0.25 * 0.02)
    assert "not measured at the same step" not in said(found) + said(found, "note")


def samples_of(losses, weights):
    return Samples("sequence", tuple("abcd"), np.array(losses) * weights, weights)


def test_between_checkpoints_differences_are_paired_and_errors_are_those_of_the_samples() -> None:
    weights, settings = np.array([10.0, 20.0, 10.0, 10.0]), {**ON, "directions": 4}
    deep, flat = {100: [1, 2, 4, 2], 200: [3, 4, 5, 6.0]}, {100: [3, 3, 3, 3], 200: [3, 5, 4, 6.0]}
    made, name = [], SHARPNESS
    for label, losses, curve in (("a", A, deep), ("b", B, flat)):
        one = run(label, losses, sharpness=False)
        full, kept = one.report.model_dump(), {}
        for step, parts in curve.items():
            samples = samples_of(parts, weights)
            error = samples.error()[0]
            full["metrics"].append(
                metric_entry(name, samples.value, stderr=error, step=step, settings=settings, space="dense")
            )
            kept[sample_key(name, "dense", step, settings, {})] = samples
        made.append(replace(compared(label, full), kept=Kept(kept)))
    found = compare(made, at="loss=4.25", baseline=1)
    of_a = samples_of(0.75 * np.array(deep[100]) + 0.25 * np.array(deep[200]), weights)
    sharp = cell(found, 0, column(found, name))
    assert (sharp.value, sharp.stderr) == (pytest.approx(of_a.value), pytest.approx(of_a.error()[0]))
    known = paired(of_a, samples_of(flat[200], weights))
    assert (sharp.delta_stderr, sharp.p) == (pytest.approx(known.stderr), pytest.approx(known.p))
    assert sharp.test == "paired over 4 sequences"


def test_results_by_item_are_interpolated_by_item() -> None:
    names, weights = ["x", "y", "z"], np.array([1.0, 1.0, 2.0])
    one, other = (Items(names, np.array(values), weights) for values in ([1.0, 0, 0], [1.0, 1, 0]))
    found = blended(one, other, 0.25)
    assert found.values.tolist() == [1.0, 0.25, 0.0]
    assert found.value == pytest.approx(0.75 * one.value + 0.25 * other.value)
    exponential = [Items(names, items.values, weights, exponential=True) for items in (one, other)]
    number = 0.75 * exponential[0].value + 0.25 * exponential[1].value
    assert blended(*exponential, 0.25).value == pytest.approx(number)
    assert blended(one, Items(["x", "y", "w"], other.values, weights), 0.25) is None
    assert blended(one, None, 0.25) is None
    assert blended(samples_of([1, 2, 3, 4], np.ones(4)), one, 0.5) is None


def test_how_far_each_run_had_to_reach_is_said_everywhere() -> None:
    found = compare([run("a", A), run("b", B)], at="loss=4.25")
    words = [
        "between step 100 and 200 of 300, 0.25 of the way in loss, loss 4.250 ± 0.013",
        "step 200 of 300, loss 4.250 ± 0.020",
    ]
    console = Console(record=True, width=250)
    print_comparison(found, console)
    page = render_page(found, charts(found))
    lines = list(csv.DictReader(io.StringIO(runs_csv(found))))
    assert [line["taken_at"] for line in lines] == words
    for text in (console.export_text(), render_markdown(found), page, said(found, "note")):
        flat = " ".join(text.split())
        assert "validation loss 4.25" in flat
        for each in words:
            assert each in flat
    assert "how far the error of the loss moves the place is not part of it" in said(found, "note")
    assert "Stable rank of dW: refers to another checkpoint on either side" in said(found, "note")
    assert "Curves: curves along directions, paths and depth are those of the nearer checkpoint: step 100 (a)" in said(
        found, "note"
    )
    first = next(line for line in csv.DictReader(io.StringIO(metrics_csv(found))) if line["metric"] == SHARPNESS)
    assert {key: first[key] for key in ("run", "at", "step", "from_step", "to_step", "weight", "value")} == {
        "run": "a", "at": "validation loss 4.25", "step": "", "from_step": "100", "to_step": "200", "weight": "0.25",
        "value": "1250.0",
    }  # fmt: skip


def test_matched_is_the_worst_of_the_final_losses() -> None:
    found = compare([run("a", A), run("b", B), run("c", {100: 3.75, 300: 2.0})], at="matched")
    assert found.at == "the worst of their final validation losses, 3.75"
    assert values(found, column(found, LOSS)) == [3.75] * 3
    assert values(found, column(found, "steps_taken")) == pytest.approx([175, 300, 100])
    texts = [next(fact.text for fact in row.facts if fact.key == "taken_at") for row in found.rows]
    assert texts[1].startswith("step 300 (its end), loss 3.750")
    assert texts[2].startswith("step 100 of 300, loss 3.750")
    # what a whole run costs is no cost of a place on the way
    assert values(found, column(found, "wall_time_seconds"))[0::2] == [None, None]
    assert values(found, column(found, "wall_time_seconds"))[1] is not None
    assert values(found, column(found, "peak_memory_bytes")).count(None) == 0


def test_the_first_crossing_counts_and_the_others_are_said() -> None:
    found = compare([run("a", {100: 5.0, 200: 3.0, 300: 4.5, 400: 3.5}), run("b", B)], at="loss=4")
    assert values(found, column(found, "steps_taken")) == pytest.approx([150, 250])
    assert "first of 3 crossings" in found.rows[0].facts[-1].text


def test_a_metric_that_was_measured_less_often_has_its_own_neighbours() -> None:
    rare = run("rare", {100: 6.0, 200: 5.0, 300: 4.0, 400: 2.0}, sharpness=False)
    settings = {"vectors": 8, **ON}
    made = rare.report.model_dump()
    made["metrics"] += [
        metric_entry(TRACE, value, stderr=1.0, step=step, settings=settings, space="dense")
        for step, value in ((100, 10.0), (400, 50.0))
    ]
    found = compare([compared("rare", made)], at="loss=4.5")
    trace = cell(found, 0, column(found, TRACE))
    # three eighths of the way from a loss of 6 to one of 2
    assert (trace.value, trace.stderr) == (pytest.approx(25.0), pytest.approx(1.0))
    assert (trace.from_step, trace.to_step, trace.weight) == (100, 400, 0.375)
    assert trace.note == "between step 100 and 400, 0.38 of the way in loss"
    assert cell(found, 0, column(found, "brackets/acc")).note == ""
    # where the loss is that of a checkpoint it is still between the two that have the trace
    found = compare([compared("rare", made)], at="loss=4")
    trace = cell(found, 0, column(found, TRACE))
    assert (trace.value, trace.weight) == (pytest.approx(30.0), 0.5)
    assert cell(found, 0, column(found, "brackets/acc")).step == 300


def test_seeds_are_taken_one_by_one_and_averaged() -> None:
    other = run("a2", {100: 4.75, 200: 3.75, 300: 3.0}, seed=2)
    found = compare([run("a", A), other, run("b", B, seed=3, method="fira")], at="loss=4.25", group_seeds=True)
    at = column(found, "steps_taken")
    assert values(found, at) == pytest.approx([(125 + 150) / 2, 200])
    assert cell(found, 0, at).n_seeds == 2
    assert math.isnan(cell(found, 0, column(found, SHARPNESS)).weight)
    assert "a: between step 100 and 200" in found.rows[0].facts[-1].text
    assert "a2: between step 100 and 200" in found.rows[0].facts[-1].text


def test_a_step_and_its_tokens_are_the_checkpoints_own_numbers() -> None:
    for at in ("step=200", f"tokens={200 * 1228800 // 300:,}"):
        found = compare([run("a", A), run("b", B)], at=at, baseline=0)
        assert values(found, column(found, LOSS)) == [3.5, 4.25]
        assert cell(found, 1, column(found, SHARPNESS)).step == 200
        assert values(found, column(found, "spectral/update/stable_rank")) == [1.0, 1.0]
        assert values(found, column(found, "steps_taken")) == [200, 200]
    assert found.at == "819,200 tokens"
    assert compare([run("a", A)], at=At("step", 300)).rows[0].facts[-1].text == "step 300 (its end)"


def test_curves_end_where_the_run_is_taken(tmp_path) -> None:
    rows = [
        {"step": step, "space": "dense", "subject": "random", "direction": 0, "x": x, "loss": step * x * x}
        for step in (100, 200, 300)
        for x in (-1.0, 0.0, 1.0)
    ]
    tables = {
        "landscape": pd.DataFrame(rows),
        "training": pd.DataFrame({"step": [100, 200, 300], "loss": [3.0, 2.0, 1.0]}),
    }
    for at, step in (("loss=4.25", 100), ("loss=3.75", 200), ("step=300", 300)):
        drawn = {chart.title: chart for chart in charts(compare([run("a", A, tables=tables)], at=at))}
        assert drawn["Rise of the loss along random directions"].lines[0].y == [step, 0, step]
        assert len(drawn["Training loss"].lines[0].x) == 3
        assert len(drawn["H1 Expected sharpness, random directions"].lines[0].x) == 3


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("matched", At("matched")),
        (" loss=3.9", At("loss", 3.9)),
        ("step=200", At("step", 200)),
        ("tokens=8.192e5", At("tokens", 819200)),
    ],
)
def test_places_are_read(text, at) -> None:
    assert parse_at(text) == at


@pytest.mark.parametrize(
    "text", ["", "3.9", "loss", "loss=", "loss=nan", "step=2.5", "step=-1", "matched=3", "epoch=1"]
)
def test_what_is_no_place_is_refused(text) -> None:
    with pytest.raises(ValueError, match=r"--at .*: give loss=3.9, matched, step=200 or tokens=819200"):
        parse_at(text)


OTHER = {"evaluation_hash": "e2", "sequences": 16, "tokens": 4080}


@pytest.mark.parametrize(
    ("runs", "at", "message"),
    [
        (
            [run("a", A), run("b", B)], "loss=3.5",
            "--at loss=3.5: b never gets down to 3.5: its validation loss is 5 at step 100, 4.25 at step 200, 3.75",
        ),
        (
            [run("a", A), run("b", B)], "loss=4.75",
            r"a is below 4.75 where its validation loss was first measured \(4.5 at step 100, .*measure earlier",
        ),
        (
            [run("a", A), run("b", B)], "loss=2",
            "a never gets down to 2: .*; b never gets down to 2",
        ),
        (
            [run("a", A), run("b", B, on=OTHER)], "matched",
            r"not measured on the same rows \(a: 32 sequences, hash e1; b: 16 sequences, hash e2\): measure them",
        ),
        ([run("a", A), run("b", {})], "loss=4", "b has no validation loss at a step .* measure RUN --only loss"),
        (
            [run("a", A), run("b", {100: 4.0})], "step=200",
            r"b was not measured there but at step 100 \(nearest: --at step=100",
        ),
        ([run("a", A)], "tokens=800000", r"but at tokens 409,600, 819,200, 1,228,800 \(nearest: --at tokens=819200\)"),
        (
            [run("a", A, tokens_seen=None)], "tokens=800000",
            "a does not say how many tokens it has seen: take --at step=",
        ),
    ],
)  # fmt: skip
def test_a_run_that_never_gets_there_is_refused_by_name(runs, at, message) -> None:
    with pytest.raises(ValueError, match=message):
        compare(runs, at=at)


def test_the_command_line_takes_the_place_and_refuses_it_first(tmp_path, monkeypatch, capsys) -> None:
    from hf_lowrank.cli.compare import run_compare
    from hf_lowrank.options import CompareOptions

    folders = [
        str(write_run(tmp_path / each.label, each.report.model_dump(), curves=False))
        for each in (run("a", A), run("b", B))
    ]
    assert run_compare(folders, CompareOptions(at="matched", output=tmp_path / "out")) == 0
    assert "at the worst of their final validation losses, 3.75" in capsys.readouterr().out
    assert "at the worst of their final" in (tmp_path / "out" / "index.html").read_text()
    with pytest.raises(ValueError, match="--at half: give"):
        run_compare(["nowhere"], CompareOptions(at="half"))
    with pytest.raises(ValueError, match="b never gets down to 3"):
        run_compare(folders, CompareOptions(at="loss=3", output=tmp_path / "none"))
    assert not (tmp_path / "none").exists()
