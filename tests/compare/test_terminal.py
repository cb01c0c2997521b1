"""A comparison on the terminal: six runs in 100 columns, the headline metrics alone, a line for notices of a kind."""

import io
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from hf_lowrank.compare.gather import gather
from hf_lowrank.compare.notices import Notice, folded
from hf_lowrank.compare.page import render_page
from hf_lowrank.compare.table import compare
from hf_lowrank.compare.terminal import compact, print_comparison
from hf_lowrank.report.catalogue import headline_metrics

CARDS = sorted(str(path.parent) for path in (Path(__file__).parents[2] / "model_cards").glob("*/report.json"))


@pytest.fixture(scope="module")
def six():
    runs = gather(CARDS[:6]).runs
    assert len(runs) == 6
    return compare(runs, baseline=next(i for i, run in enumerate(runs) if run.label == "tiny-fullrank"))


def printed(comparison, width, everything=False):
    console = Console(width=width, file=io.StringIO(), record=True)
    print_comparison(comparison, console, everything)
    return console.export_text()


def test_six_runs_fit_into_100_columns(six):
    text = printed(six, 100)
    assert max(map(cell_len, text.splitlines())) <= 100
    table = text[text.index("\nLoss ") :]
    assert text.count("Validation loss") == 1, "one table"
    for name in ("4.665(95)", "4.288(97)", "4.876(85)", "4.01(10)", "5.372(46)", "4.509(88)", "−0.59 ***†"):
        assert name in table
    # each number on one line, with its marks
    for name in ("0.00525(11)", "+0.0039***†", "3.23(93)e-6", "tiny-galore"):
        assert name in table
    groups = ["Loss", "Loss landscape", "Interpolation", "Spectra", "Activations", "Curvature"]
    assert [line for line in map(str.strip, table.splitlines()) if line in groups] == groups
    assert "Downstream tasks" not in text
    assert "hf_lowrank_brackets" not in text
    assert printed(six, 80).count("Validation loss") == 2, "four and two"


def test_the_rest_is_there_on_demand(six):
    text = printed(six, 100, everything=True)
    assert max(map(cell_len, text.splitlines())) <= 100
    for name in ("hf_lowrank_brackets", "Downstream tasks", "Wall time", "Cost"):
        assert name in text
    assert text.count("measured in different ways") > printed(six, 100).count("measured in different ways") == 2


def test_notices_of_one_kind_are_one_line():
    names = [metric.name for metric in headline_metrics()][:3]
    way = [Notice("conflict", "A", "measured in different ways", (("x", (name,)),), (name,)) for name in names]
    both = (names[0], names[1])
    sets = [Notice("conflict", "A", f"not of the same {what}", (), both) for what in ("matrices", "total")]
    facts = [Notice("conflict", title, "why", (("1", ("a",)), ("2", ("b",)))) for title in ("Seed", "Data")]
    assert folded([*way, *facts, *sets]) == [
        "Validation loss and 2 more metrics: measured in different ways",
        "Seed: why: 1 (a); 2 (b)",
        "Data: why: 1 (a); 2 (b)",
        "Validation loss and 1 more metric: not of the same matrices, not of the same total",
    ]
    assert folded(way[:1]) == ["A: measured in different ways: x (validation_loss)"]


def test_the_page_folds_them_too(six):
    page = render_page(six, [])
    kind = "<summary>Expected sharpness, random directions and 13 more metrics: measured in different ways"
    assert page.count(kind) == 1
    assert "Not comparable in 2 respects" in page


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (4.665, 0.095, "4.665(95)"),
        (4.01211, 0.10134, "4.01(10)"),
        (0.00132, 0.000063, "0.00132(6)"),
        (3.2295e-6, 9.3469e-7, "3.23(93)e-6"),
        (3.943e-4, 0.068e-4, "3.94(7)e-4"),
        (1645.2, 120.4, "1645(120)"),
        (-0.5, 0.011, "-0.500(11)"),
        (35.86456, 0.00071, "35.8646(7)"),
        (2.5e7, 1.2e6, "2.50(12)e7"),
        (0.0, 0.02, "0.000(20)"),
        (0.8471, float("nan"), "0.8471"),
        (1031.0, 0.0, "1031"),
        (float("nan"), float("nan"), "n/a"),
    ],
)
def test_a_number_with_its_error_in_brackets(value, stderr, text):
    assert compact(value, stderr) == text
