"""Runs side by side: columns, differences, seeds, and what is said where runs are not comparable."""

import csv
import io
import math

import pandas as pd
import pytest
from compared import LOSS, ON, cell, column, compared, report, runs, said, task, values, write_run
from scipy.stats import ttest_ind, ttest_rel

from hf_lowrank.compare.charts import charts
from hf_lowrank.compare.figures import draw_comparison
from hf_lowrank.compare.gather import read_curves
from hf_lowrank.compare.table import compare
from hf_lowrank.compare.text import metrics_csv, render_markdown, runs_csv
from hf_lowrank.report.io import metric_entry
from hf_lowrank.report.significance import Delta, Sample, difference

# ---- columns ----


def test_equal_measurements_share_a_column_at_the_last_step() -> None:
    found = compare(runs(report("a", loss=4.0), report("b", loss=3.0)))
    assert values(found, column(found, LOSS)) == [4.0, 3.0]
    assert [cell(found, row, column(found, LOSS)).text for row in (0, 1)] == ["4.00 ± 0.10", "3.00 ± 0.10"]
    assert found.columns[column(found, "spectral/update/stable_rank")].settings == "since=150"
    assert values(found, column(found, "brackets/acc")) == [0.54, 0.53]
    assert values(found, column(found, "parameters_trained")) == [1840512, 1840512]
    assert said(found) == ""


def test_a_number_of_an_earlier_step_does_not_stand_beside_the_last(tmp_path) -> None:
    made = report("a")
    # measured otherwise, before training: the run's sharpness at its end is in the other column
    sharpness = "landscape/random/sharpness"
    untrained = metric_entry(sharpness, -1e-5, stderr=1e-5, step=0, settings={"sequences": 16}, space="dense")
    made["metrics"].insert(0, untrained)
    found = compare(runs(made, report("b")))
    assert [c.name for c in found.columns].count(sharpness) == 1
    assert values(found, column(found, sharpness)) == [0.04, 0.04]
    other = report("c")
    other["metrics"] = [untrained | {"step": 300}]
    assert [c.name for c in compare(runs(made, other)).columns].count(sharpness) == 2, "the last of c"


def test_what_could_not_be_measured_stands_in_the_others_column_and_is_no_conflict() -> None:
    without = report("cola")
    settings = {"note": "CoLA has no dense form"}
    for entry in without["metrics"]:
        if entry["space"] == "dense":
            entry |= {"value": None, "stderr": None, "settings": settings}
    found = compare(runs(report("a"), report("b"), without))
    for name in ("landscape/random/sharpness", "spectral/update/stable_rank"):
        assert [c.name for c in found.columns].count(name) == 1
        assert values(found, column(found, name))[2] is None
        assert cell(found, 2, column(found, name)).text.startswith("n/a")
    assert said(found) == ""


def test_barriers_to_each_other_are_no_conflict() -> None:
    pair = [report("a"), report("b")]
    for made, other in zip(pair, ("b", "a"), strict=True):
        barrier = {"other": other, "other_step": 300, "other_method": other, "other_seed": 1, **ON}
        name = "interpolation/cross_method/barrier"
        made["metrics"].append(metric_entry(name, 0.5, stderr=0.1, step=300, settings=barrier, space="dense"))
    assert said(compare(runs(*pair))) == ""


def test_order_is_headline_tasks_costs_others() -> None:
    made = report("a")
    made["metrics"].insert(0, metric_entry("a/b/c", 1.0, step=1))
    names = [c.name for c in compare(runs(made)).columns]
    assert names[:2] == [LOSS, "landscape/random/sharpness"]
    assert names.index("brackets/acc") < names.index("parameters") < names.index("a/b/c")


def test_a_metric_that_is_not_in_the_catalogue_goes_by_its_name() -> None:
    made = report("a")
    made["metrics"] += [metric_entry("toy/score", value, step=step) for step, value in ((150, 2.0), (300, 1.0))]
    found = compare(runs(made))
    shown = found.columns[column(found, "toy/score")]
    assert (shown.title, shown.group, shown.unit) == ("toy/score", "Toy", "")
    assert "## Toy" in render_markdown(found)
    assert "toy/score" in {chart.title for chart in charts(found)}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"directions": 20}, ("directions=20", "")),
        ({"evaluation_hash": "e2"}, ("evaluation_hash=e1", "evaluation_hash=e2")),
    ],
)
def test_other_settings_are_another_column_and_said_loudly(change, told) -> None:
    other = report("b")
    for entry in other["metrics"]:
        if entry["name"] == "landscape/random/sharpness":
            entry["settings"] = entry["settings"] | change
    found = compare(runs(report("a"), other), baseline=0)
    columns = [i for i, c in enumerate(found.columns) if c.name == "landscape/random/sharpness"]
    assert [values(found, i) for i in columns] in ([[0.04, None], [None, 0.04]], [[None, 0.04], [0.04, None]])
    assert found.cells.query("column in @columns")["delta"].isna().all()
    assert "Expected sharpness, random directions: measured in different ways" in said(found)
    assert all(part in said(found) for part in told)


def test_spaces_are_columns_and_a_conflict_only_without_one_in_common() -> None:
    native = metric_entry("spectral/weight/stable_rank", 2.0, step=300, settings={"matrices": 56}, space="native")
    both, cola = report("both"), report("cola", method="cola")
    both["metrics"].append(native)
    assert said(compare(runs(report("a"), both))) == ""
    for entry in cola["metrics"]:
        entry["space"] = "linearised" if entry["space"] else None
    found = compare(runs(report("a"), cola))
    assert "Stable rank of W" in said(found)
    assert "weights=dense (a)" in said(found)
    assert "weights=linearised (cola)" in said(found)


def test_a_task_of_another_version_or_shots_is_another_column() -> None:
    a, b = report("a"), report("b")
    b["evaluations"] = [task("brackets", 0.6, num_fewshot=5), task("order", 0.7, task_version="2")]
    a["evaluations"].append(task("order", 0.7, task_version=1))
    found = compare(runs(a, b))
    assert "brackets/acc, order/acc" in said(found) or "brackets/acc" in said(found)
    assert "num_fewshot=5 (b)" in said(found)
    assert "task_version=2 (b)" in said(found)


def test_how_weights_were_held_in_a_task_is_no_other_measurement() -> None:
    a, b = report("a"), report("b")
    a["evaluations"] = [task("brackets", 0.6, settings={"form": "native", "samples": 9})]
    b["evaluations"] = [task("brackets", 0.5, settings={"form": "dense", "samples": 9})]
    found = compare([compared("a", a), compared("b", b)])
    assert values(found, column(found, "brackets/acc")) == [0.6, 0.5]


def test_a_number_on_an_unknown_text_is_shown_and_compares_with_nothing() -> None:
    def without_hash(name: str) -> dict:
        made = report(name)
        for entry in made["metrics"]:
            # as a report of version 1 has it
            entry["settings"] = {k: v for k, v in entry["settings"].items() if k != "evaluation_hash"}
        return made

    found = compare(runs(report("a"), without_hash("b"), without_hash("c")), baseline=1)
    losses = [at for at, each in enumerate(found.columns) if each.name == LOSS]
    assert sorted(values(found, at).index(4.0) for at in losses) == [0, 1, 2]
    assert len({found.columns[at].distinct for at in losses}) == 3
    assert found.cells.query("column in @losses")["delta"].isna().all()
    assert "what it was measured on is not recorded, so it is comparable with no other run's" in said(found)
    assert "not recorded (b, c)" in said(found)
    alone = compare(runs(without_hash("b")))
    assert values(alone, column(alone, LOSS)) == [4.0]
    assert said(alone) == ""
    assert "Validation loss" in said(alone, "note")


def test_a_number_that_could_not_be_measured_says_why() -> None:
    made = report("a")
    made["metrics"].append(metric_entry("curvature/trace", math.nan, step=300, space="dense"))
    found = compare(runs(made, report("b")))
    trace = cell(found, 0, column(found, "curvature/trace"))
    assert math.isnan(trace.value)
    assert (trace.text, trace.note) == ("n/a", "not finite: nan")


def test_other_steps_and_sets_of_matrices_are_said() -> None:
    late, more = report("late"), report("more")
    for entry in late["metrics"]:
        entry["step"] += 100
    for entry in more["metrics"]:
        entry["settings"] = entry["settings"] | ({"matrices": 30} if "matrices" in entry["settings"] else {})
    found = compare(runs(report("a"), late, more))
    assert "not measured at the same step: step 300 (a, more); step 400 (late)" in said(found)
    assert "not of the same matrices: matrices=28 (a, late); matrices=30 (more)" in said(found)


# ---- runs that are not comparable ----


@pytest.mark.parametrize(
    ("place", "key", "value", "title"),
    [
        ("run", "tokens_seen", 99, "tokens seen"),
        ("run", "precision", "bf16", "precision"),
        ("run", "steps", 299, "unfinished"),
        ("data", "revision_or_hash", "sha256:other", "training data"),
        ("data", "tokenizer_hash", "sha256:other", "tokenizer"),
        ("data", "sequence_length", 512, "sequence length"),
        ("data", "packing", False, "packing"),
        ("data", "split_seed", 7, "validation data"),
        ("data", "tokenizer_hash", None, None),
    ],
)
def test_what_runs_must_share_is_a_conflict(place, key, value, title) -> None:
    other = report("b")
    other[place][key] = value
    found = compare(runs(report("a"), other), baseline=0)
    assert [row.differs for row in found.rows] == [(), (title or "tokenizer",)]
    assert (title or "tokenizer").capitalize() in said(found)
    markdown = render_markdown(found)
    assert "NOT COMPARABLE" in markdown
    assert f"≠ {title or 'tokenizer'}" in markdown


def test_another_model_is_a_conflict_and_another_rate_a_note() -> None:
    other = report("b", learning_rate=0.5)
    other["run"]["model"] = other["run"]["model"] | {"size": "60m"}
    found = compare(runs(report("a"), other))
    assert "Model: " in said(found)
    assert "60m" in said(found)
    assert "Peak learning rate: 0.01 (a); 0.5 (b)" in said(found, "note")


def test_a_foreign_run_without_data_cannot_be_told_to_be_comparable() -> None:
    other = report("b")
    other["data"] = None
    assert "Training data: the runs were not trained on the same text" in said(compare(runs(report("a"), other)))
    assert "not recorded (b)" in said(compare(runs(report("a"), other)))


# ---- differences ----


def test_z_of_two_measurements() -> None:
    found = compare(runs(report("a", loss=4.0), report("b", loss=3.8)), baseline=0)
    loss = cell(found, 1, column(found, LOSS))
    assert math.isnan(cell(found, 0, column(found, LOSS)).delta)
    assert loss.delta == pytest.approx(-0.2)
    assert loss.delta_stderr == pytest.approx(0.1 * math.sqrt(2))
    assert loss.p == pytest.approx(0.157299, abs=1e-6)  # of z = sqrt(2)
    # the sharpness differs by as much of its error, the task by less: 0.157 is the first and the second of three
    assert loss.q == pytest.approx(0.157299 * 3 / 2, abs=1e-6)
    assert loss.delta_text == "−0.20 ± 0.14, p = 0.16, q = 0.24"
    assert (loss.test, loss.paired, loss.marks, found.tests) == ("unpaired", False, "†", 3)
    exact = cell(found, 1, column(found, "spectral/weight/stable_rank"))
    assert math.isnan(exact.p)
    assert exact.why == "no standard error"
    assert cell(found, 1, column(found, "parameters")).delta_text == "the same"


@pytest.mark.parametrize(
    ("ours", "base", "why"),
    [
        (Sample(1, None, [1]), Sample(2, 0.1, [2]), "no standard error"),
        (Sample(1, 0.0, [1]), Sample(2, 0.0, [2]), "both errors are 0"),
        (Sample(1, 0.1, [1], sampling=False), Sample(2, 0.1, [2]), "its error is numerical, not statistical"),
        (Sample(1, 0.1, [1, 1.2]), Sample(2, 0.1, [2]), "one side is a single seed"),
        (Sample(1, 0.0, [1, 1]), Sample(2, 0.0, [2, 2]), "no spread between seeds"),
    ],
)
def test_where_nothing_can_be_tested(ours: Sample, base: Sample, why: str) -> None:
    delta = difference(ours, base)
    assert isinstance(delta, Delta)
    assert (delta.value, delta.p, delta.why) == (-1, None, why)


@pytest.mark.parametrize("shared", [False, True], ids=["welch", "paired"])
def test_seeds_are_grouped_and_tested_in_pairs_if_they_share_their_data(shared: bool) -> None:
    galore = [report(f"g{seed}", seed=seed, loss=loss) for seed, loss in ((1, 4.0), (2, 4.2), (3, 4.1))]
    full = [report(f"f{seed}", "fullrank", seed=seed, loss=loss) for seed, loss in ((1, 4.6), (2, 5.0), (3, 4.7))]
    for made in () if shared else full:
        made["run"]["seeds"]["data_seed"] = 7
    found = compare(runs(*galore, *full, report("lone", "fira", seed=9)), baseline=4, group_seeds=True)
    assert [(row.label, row.seeds) for row in found.rows] == [
        ("g1 + 2 seeds", (1, 2, 3)), ("f1 + 2 seeds", (1, 2, 3)), ("lone", (9,)),
    ]  # fmt: skip
    assert found.baseline == 1
    at = column(found, LOSS)
    mean = cell(found, 0, at)
    assert (mean.value, mean.n_seeds) == (pytest.approx(4.1), 3)
    assert mean.stderr == pytest.approx(0.1 / math.sqrt(3))
    values = [4.0, 4.2, 4.1], [4.6, 5.0, 4.7]
    known = ttest_rel(*values) if shared else ttest_ind(*values, equal_var=False)
    assert mean.test == ("paired over 3 seeds" if shared else "Welch over seeds")
    assert (mean.p, mean.dof) == (pytest.approx(known.pvalue), pytest.approx(known.df))
    assert (mean.paired, mean.delta) == (shared, pytest.approx(4.1 - 14.3 / 3))
    assert [found.tested(row).partition(": ")[2] for row in range(3)] == [
        "the methods, over seeds", "", "these two models, not these two methods",
    ]  # fmt: skip
    assert cell(found, 2, at).why == "one side is a single seed"
    assert "Single seeds" in said(found, "note")
    [loss] = [chart for chart in charts(found) if chart.name == LOSS]
    assert [line.row for line in loss.lines] == [0, 1, 2]
    assert loss.lines[0].y == pytest.approx([5.1, 4.1])
    assert loss.lines[0].error[1] == pytest.approx(0.1 / math.sqrt(3))


def test_seeds_with_other_settings_or_the_same_seed_are_no_group() -> None:
    other_rate = report("b", seed=2, learning_rate=0.5)
    found = compare(runs(report("a"), other_rate, report("twin", seed=1)), group_seeds=True)
    assert [row.label for row in found.rows] == ["a", "b"]
    assert "twin: has seed 1 as a has: left out" in said(found, "note")


# ---- order ----


def test_sorting_by_name_and_id_leaves_what_is_missing_last() -> None:
    without = report("without")
    without["metrics"] = []
    made = runs(report("a", loss=4.0), without, report("b", loss=3.0), report("c", loss=5.0))
    assert [row.label for row in compare(made).rows] == ["a", "without", "b", "c"]
    up = compare(made, sort=LOSS, baseline=3)
    assert [row.label for row in up.rows] == ["b", "a", "c", "without"]
    assert up.rows[up.baseline].label == "c"
    down = compare(made, sort="H9", descending=True)
    assert [row.label for row in down.rows] == ["c", "a", "b", "without"]
    with pytest.raises(ValueError, match="no run has the metric 'H99' to sort by"):
        compare(made, sort="H99")
    with pytest.raises(ValueError, match=r"did you mean 'validation_loss'\?"):
        compare(made, sort="validation_los")
    with pytest.raises(ValueError, match="no run to compare"):
        compare([])


# ---- files ----


def test_csv_holds_every_number_exactly_and_no_formula() -> None:
    found = compare(runs(report("=1+1", loss=4.125), report("b", loss=3.5)), baseline=1)
    lines = list(csv.DictReader(io.StringIO(metrics_csv(found))))
    loss = next(line for line in lines if line["metric"] == LOSS)
    assert (loss["run"], float(loss["value"]), float(loss["stderr"])) == ("'=1+1", 4.125, 0.1)
    assert float(loss["delta"]) == 0.625
    assert len(lines) == len(found.cells)
    assert [line["run"] for line in csv.DictReader(io.StringIO(runs_csv(found)))] == ["'=1+1", "b"]


def test_markdown_shows_names_as_text() -> None:
    hostile = "</td>|`<script>` *x*\n# y"
    text = render_markdown(compare([compared(hostile, report(hostile)), compared("b", report("b"))], baseline=1))
    assert "<script>" not in text
    assert "\n# y" not in text
    rows = [line for line in text.splitlines() if line.startswith("| Validation loss")]
    assert rows[0].count(" | ") == 2


# ---- curves ----


def test_curves_and_figures_have_a_line_a_run(tmp_path) -> None:
    made = []
    for name, loss in (("a", 4.0), ("b", 3.0)):
        folder = write_run(tmp_path / name, report(name, loss=loss))
        tables, problems = read_curves(folder / "publish" / "metrics")
        assert problems == []
        made.append(compared(name, report(name, loss=loss), tables))
    found = compare(made)
    drawn = {chart.title: chart for chart in charts(found)}
    rise = drawn["Rise of the loss along random directions"]
    # losses are (d + 1) x^2 above the centre for the directions d = 0, 1, 2
    assert rise.lines[0].y == pytest.approx([0.02, 0.0, 0.02])
    assert rise.lines[0].error == pytest.approx([0.01 / math.sqrt(3), 0.0, 0.01 / math.sqrt(3)])
    assert [len(line.x) for line in drawn["Training loss"].lines] == [30, 30]
    names = {path.name for path in draw_comparison(found, charts(found), tmp_path / "figures")}
    assert {"loss.png", "landscape_curves.png", "spectra_over_steps.png", "evaluations.png"} <= names
    assert (tmp_path / "figures" / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("key", ["revision_or_hash", "tokenizer_hash", "split_seed"])
def test_losses_on_other_data_are_other_charts(key) -> None:
    other = report("b")
    other["data"][key] = 7 if key == "split_seed" else "sha256:other"
    table = pd.DataFrame({"step": [1, 2], "loss": [4.0, 3.0]})
    made = [compared(r["run"]["name"], r, {"training": table}) for r in (report("a"), other)]
    losses = [chart for chart in charts(compare(made)) if chart.name == "training/loss"]
    assert [[line.row for line in chart.lines] for chart in losses] == [[0], [1]]
    assert len({chart.detail for chart in losses}) == 2


@pytest.mark.parametrize(
    ("name", "table", "reason"),
    [
        ("training", None, "training.parquet are left out"),
        ("training", {"loss": [1.0]}, "no column step"),
        ("training", {"step": ["x"], "loss": [1.0]}, "no number"),
        ("landscape", {"step": [1], "subject": ["x" * 2000]}, "a name is longer"),
        ("training", {"step": [[1, 2]]}, "neither numbers nor names"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_used_are_left_out_with_their_reason(tmp_path, name, table, reason) -> None:
    path = tmp_path / f"{name}.parquet"
    path.write_bytes(b"PAR1 broken") if table is None else pd.DataFrame(table).to_parquet(path)
    tables, problems = read_curves(tmp_path)
    assert tables == {}
    assert reason in problems[0]
    found = compare([compared("a", report("a"), tables, problems=problems)])
    assert reason in said(found, "note")


def test_settings_of_any_form_do_no_harm() -> None:
    odd = report("odd")
    odd["metrics"] += [
        metric_entry(
            "landscape/svd_k/sharpness", 1e200, step=300, settings={"K": "x", "other": {"a": [1]}}, space="dense"
        ),
        metric_entry(
            "interpolation/cross_method/barrier", 1.0, step=3, settings={"other": {"a": 1}, **ON}, space="dense"
        ),
    ]
    found = compare(runs(odd, report("b")), baseline=1)
    charts(found)
    render_markdown(found)
    assert cell(found, 0, column(found, "landscape/svd_k/sharpness")).text == "n/a"
