"""The analysis of a study from reports: what is planted is said, what is not is left open, and what lacks is named."""

import json

import pandas as pd
import pytest
from compared import write_run
from studied import GROUPS, Simulated

from hf_lowrank.report.significance import Delta
from hf_lowrank.study.analysis import analyse, prediction
from hf_lowrank.study.analysis.analyse import analyse_data
from hf_lowrank.study.analysis.controls import parts_of
from hf_lowrank.study.analysis.inputs import read_runs, study_data
from hf_lowrank.study.analysis.result import decide


@pytest.fixture(autouse=True)
def few_permutations(monkeypatch):
    """Their number is what these tests' time goes into; test_analysis_statistics.py looks at what they give."""
    monkeypatch.setattr(prediction.prediction_rows, "__defaults__", (0, 59, 100))


def findings(simulated, cells=True):
    return analyse_data(study_data(simulated.runs(), simulated.cells if cells else ()))


def of(found, key):
    return next(each for each in found.analyses if each.key == key)


def said(found, key):
    return "\n".join(of(found, key).sentences)


def rows(table, **values):
    for name, value in values.items():
        table = table[table[name] == value]
    return table


@pytest.fixture(scope="module")
def planted():
    return findings(Simulated(apart=0.4, drift=0.3, seed=1))


@pytest.fixture(scope="module")
def null():
    groups = {name: (method, rate, rank, (0.0, 0.0, 0.0)) for name, (method, rate, rank, _) in GROUPS.items()}
    return findings(Simulated(groups=groups, seed=2))


def test_planted_losses_are_found_and_the_others_left_open(planted):
    text = said(planted, "perplexity")
    assert "galore has a higher loss than fullrank (+0.29" in text
    assert "the data do not tell whether the loss of sltrain" in text
    row = rows(of(planted, "perplexity").table, group="galore").iloc[0]
    assert row["test"] == "paired over 4 seeds"
    assert row["difference"] == pytest.approx(0.3, abs=0.02)
    assert 0 < row["low"] < row["difference"] < row["high"]
    assert row["optimizer_state_bytes"] == 9961472


def test_forms_that_rank_methods_in_opposite_order_are_named(planted):
    metrics = of(planted, "metrics")
    assert "in opposite order" in said(planted, "metrics")
    pairs = rows(metrics.more["pairs"], id="H1", one="fullrank", other="galore")
    assert pairs["disagree"].all()
    assert set(pairs["place"]) == {"end", "matched"}
    assert not rows(metrics.more["pairs"], id="H3")["disagree"].any()
    # sharper along random directions in native form alone
    assert metrics.claim.holds == "holds in part"
    assert (
        "native form, at matched loss: along random directions full-rank is sharper than 2 of 2" in metrics.claim.text
    )
    assert (
        "comparable form, at matched loss: along random directions full-rank is sharper than 0 of 2 (the reverse in 2"
        in metrics.claim.text
    )


def test_barriers_are_read_against_those_between_seeds(planted, null):
    table = rows(of(planted, "barriers").table, group="galore", definition="barrier_chord", aligned=False)
    assert table["difference"].iloc[0] == pytest.approx(0.4, abs=0.06)
    assert "the two share start and data" in said(planted, "barriers")
    assert planted.claims[0].holds == "holds"
    assert null.claims[0].holds == "the data do not tell"


def test_activations_are_read_against_another_seed_of_full_rank(planted, null):
    table = rows(of(planted, "activations").table, group="sltrain", part="slope", step=300)
    assert table["difference"].iloc[0] == pytest.approx(-0.3, abs=0.05)
    assert planted.claims[2].holds == "holds"
    assert null.claims[2].holds == "the data do not tell"


def test_controls_split_a_difference_into_rates_and_rank(planted):
    table = rows(of(planted, "controls").table, group="galore", metric="validation_loss").set_index("part")
    assert table.loc["rates", "difference"] == pytest.approx(0.1, abs=0.03)
    assert table.loc["method", "difference"] == pytest.approx(0.2, abs=0.03)
    parts = table.loc[["rates", "method"], "difference"].sum()
    assert table.loc["total", "difference"] == pytest.approx(parts)
    assert "no control tells rank from rates for sltrain" in said(planted, "controls")


def test_of_runs_that_differ_in_nothing_nothing_is_said_to_differ(null):
    for key in ("perplexity", "metrics", "barriers", "activations", "controls"):
        assert not (of(null, key).table["q"] < 0.05).any(), key
    # the loss settles these scores
    assert [claim.holds for claim in null.claims] == [*["the data do not tell"] * 3, "does not hold"]
    assert all("the data do not tell" in text for text in of(null, "perplexity").sentences)


def test_scores_are_predicted_with_the_number_of_runs_said_first():
    groups = {
        f"m{i}": ("fullrank" if i == 0 else f"method{i}", 1e-3, 32, (0.05 * (i % 3), 0.002 * ((5 * i) % 7 - 3), 0.0))
        for i in range(8)
    }
    found = findings(Simulated(groups=groups, seeds=(1, 2, 3), helps=3.0, seed=3))
    text = of(found, "downstream").sentences
    assert text[0].startswith("With 24 runs in 8 groups and 4 metrics only a strong relation")
    table = rows(of(found, "downstream").table, task="mean of tasks").set_index("left_out")
    assert list(table.index) == ["run", "method"]
    assert table.loc["run", "metrics_r2"] > table.loc["run", "loss_r2"] + 0.2
    assert table.loc["run", "metrics_r2"] > table.loc["run", "random_r2"] + 0.2
    assert "the metrics help" in text[1]
    strongest = of(found, "downstream").more["partial_ranks"].set_index("metric")["partial_rank_correlation"].abs()
    assert strongest.idxmax() == "H1"


# ---- what lacks ----


def single_seed(study):
    study.reports = {name: report for name, report in study.reports.items() if name.endswith("s1")}


def diverged(study):
    entries = study.reports["galore-small-s2"]["metrics"]
    next(e for e in reversed(entries) if e["name"] == "validation_loss")["value"] = None


def stopped(study):
    study.reports["galore-small-s2"]["run"] |= {"steps": 200, "tokens_seen": 819200}


def missing_seed(study):
    del study.reports["galore-small-s2"]


def other_data(study):
    study.reports["sltrain-small-s1"]["data"]["revision_or_hash"] = "sha256:other"


def missing_metrics(study):
    for name, report in study.reports.items():
        if name.startswith("sltrain"):
            report["metrics"] = [e for e in report["metrics"] if e["name"] == "validation_loss"]


def no_full_rank(study):
    study.reports = {name: report for name, report in study.reports.items() if not name.startswith("fullrank")}


def nothing_measured(study):
    for report in study.reports.values():
        report["metrics"], report["evaluations"] = [], []
    study.tables = {}


CASES = {
    single_seed: "With one seed a group no difference between methods can be told from chance",
    diverged: "galore-small-s2 is left out: diverged: its last validation loss is not finite",
    stopped: "galore-small-s2 is left out: stopped at step 200 of 300",
    missing_seed: "paired over 3 seeds",
    other_data: "sltrain-small-s1 is left out: not comparable in training data",
    missing_metrics: "sharpness along random directions in native form is missing for sltrain",
    no_full_rank: "there is no full-rank run to compare with",
    nothing_measured: "no validation loss was measured",
}


@pytest.mark.parametrize("harm", CASES)
def test_what_lacks_is_named(harm, tmp_path):
    study = Simulated(groups=dict(list(GROUPS.items())[:3]), seed=4)
    harm(study)
    for name, report in study.reports.items():
        write_run(tmp_path / "runs" / name, report, curves=False)
    found = analyse([tmp_path / "runs"], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text() + pd.concat([each.table for each in found.analyses]).to_csv()
    assert CASES[harm].replace(":", "").split("`")[0] in text.replace("&#58;", "").replace(":", "")
    if harm in (diverged, stopped, missing_seed):
        row = rows(of(found, "perplexity").table, group="galore")
        assert row["seeds"].tolist() == [3]
        assert row["test"].tolist() == ["paired over 3 seeds"]


def test_runs_of_other_people_are_grouped_by_what_their_reports_say():
    study = Simulated(sizes=("small", "large"), seeds=(1, 2, 3), seed=5)
    names = {name: f"user-run-{index}" for index, name in enumerate(study.reports)}
    for name, report in study.reports.items():
        report["run"]["name"] = names[name]
        for entry in report["metrics"]:
            if "other" in entry["settings"]:
                entry["settings"]["other"] = names[entry["settings"]["other"]]
    for tables in study.tables.values():
        tables["activation"]["baseline"] = tables["activation"]["baseline"].map(names)
    found = findings(study, cells=False)
    data = found.data
    assert data.sizes == ["small", "large"]
    # without a study.json the full-rank runs whose rates no other method has are the reference
    assert data.reference == dict.fromkeys(data.sizes, "fullrank (learning_rate=0.001, other_rate=0.001)")
    assert sorted(data.groups("small")[1:]) == ["fullrank (learning_rate=0.01, other_rate=0.01)", "galore", "sltrain"]
    assert len(rows(of(found, "barriers").table, size="large")) == 12
    assert {"rates", "method", "total"} <= set(of(found, "controls").table["part"])


def test_equal_runs_give_equal_bytes(tmp_path):
    study = Simulated(seeds=(1, 2), seed=6)
    for name, report in study.reports.items():
        folder = write_run(tmp_path / "runs" / name, report, curves=False)
        (folder / "publish" / "metrics").mkdir()
        for table, frame in study.tables.get(name, {}).items():
            frame.to_parquet(folder / "publish" / "metrics" / f"{table}.parquet")
    (tmp_path / "runs" / "study.json").write_text(json.dumps({"cells": study.cells}))
    for out in ("one", "two"):
        analyse([tmp_path / "runs"], tmp_path / out)
    one, two = (
        {p.relative_to(tmp_path / o): p.read_bytes() for p in (tmp_path / o).rglob("*.*")} for o in ("one", "two")
    )
    assert one == two
    names = {str(path) for path in one}
    assert {"report.md", "report.html", "tables/barriers_pairs.csv", "tables/runs.csv"} <= names
    assert {f"figures/{key}.png" for key in ("perplexity", "metrics", "barriers", "activations", "controls")} <= names
    page = one[next(path for path in one if path.name == "report.html")].decode()
    assert "<script" not in page
    assert page.count("data:image/png;base64,") >= 5
    assert "http" not in page.partition("<style>")[2].replace("data:image", "")


def test_a_studys_record_gives_labels_roles_and_rates(tmp_path):
    study = Simulated(groups=dict(list(GROUPS.items())[1::2]) | {"plain": GROUPS["fullrank"]}, seeds=(1, 2), seed=8)
    folder = tmp_path / "study"
    cells = []
    for cell in study.cells:
        role = {"galore": "run", "plain": "run"}.get(cell["method"], "control")
        cells.append(
            {**cell, "label": cell["method"], "method": GROUPS.get(cell["method"], ("fullrank",))[0], "role": role}
        )
        write_run(folder / "runs" / cell["name"], study.reports[cell["name"]], curves=False)
    cells[0]["role"] = "tuning"
    cells.append({"name": "pair", "kind": "seeds", "size": "small", "role": "pair", "runs": ["a", "b"]})
    controls = {"fullrank-galore-rates": {"rates_of": "galore"}}
    record = {
        "reference": "plain",
        "cells": cells,
        "study": {"methods": {"galore": None, "plain": None}, "controls": controls},
    }
    (folder / "study.json").write_text(json.dumps(record))
    # what an earlier analysis left is no run
    write_run(folder / "analysis" / "old", study.reports[study.cells[0]["name"]], curves=False)
    # nor are those by which a study finds rates and costs
    for name in ("tuning-small-galore-0_0", "calibration-small-0"):
        write_run(folder / "runs" / name, study.reports[study.cells[0]["name"]], curves=False)
    data, skipped = read_runs([folder])
    assert not skipped
    assert data.reference == {"small": "plain"}
    assert data.runs["why"].tolist().count("a run of the search for rates") == 1
    assert len(data.runs) == 6
    assert ("galore", "rates", "fullrank-galore-rates", "plain") in parts_of(data, "small")


def test_two_studies_may_have_runs_of_one_name(tmp_path):
    study = Simulated(seeds=(1, 2), seed=8)
    for number in (1, 2):
        folder = tmp_path / str(number)
        for cell in study.cells:
            write_run(folder / "runs" / cell["name"], study.reports[cell["name"]], curves=False)
        cells = [{**cell, "method": f"{cell['method']} of {number}"} for cell in study.cells]
        (folder / "study.json").write_text(json.dumps({"cells": cells}))
    data, _ = read_runs([tmp_path / "1", tmp_path / "2"])
    labels = data.runs["label"].tolist()
    assert sum(label.endswith("of 1") for label in labels) == sum(label.endswith("of 2") for label in labels) > 0


def test_what_is_not_told_counts_for_nothing():
    def delta(value, q):
        return Delta(value, 0.1, q, "t test", q=q)

    up, down, untold = delta(1.0, 0.01), delta(-1.0, 0.01), delta(-1.0, 0.5)
    for tests, holds in (
        ((up, up), "holds"), ((up, untold), "holds in part"), ((up, down), "holds in part"),
        ((down, down), "does not hold"), ((down, untold), "the data do not tell"), ((untold,), "the data do not tell"),
    ):  # fmt: skip
        assert decide([(test, 1) for test in tests]) == holds


def test_names_in_reports_stay_text(tmp_path):
    study = Simulated(seeds=(1, 2), seed=7)
    for index, report in enumerate(study.reports.values()):
        report["run"] |= {"name": f"<img src=x>|{index}", "method": "fullrank" if index < 2 else "=cmd|<b>x</b>"}
    for name, report in study.reports.items():
        write_run(tmp_path / "runs" / name, report, curves=False)
    analyse([tmp_path / "runs"], tmp_path / "out")
    assert "<img src=x>" not in (tmp_path / "out" / "report.html").read_text()
    assert "<b>" not in (tmp_path / "out" / "report.md").read_text()
    assert ",=cmd" not in (tmp_path / "out" / "tables" / "runs.csv").read_text()


def test_bad_input_is_one_error(tmp_path):
    with pytest.raises(ValueError, match="no run to analyse"):
        analyse([tmp_path], tmp_path / "out")
    write_run(tmp_path / "a", next(iter(Simulated(seeds=(1,)).reports.values())), curves=False)
    (tmp_path / "study.json").write_text('{"cells": 3}')
    with pytest.raises(ValueError, match=r"study\.json: not readable"):
        analyse([tmp_path], tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        analyse([tmp_path / "a"], tmp_path / "file")
