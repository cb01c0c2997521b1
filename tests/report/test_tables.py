"""Headline and facts tables, and the formats of numbers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from hf_lowrank.report.catalogue import HEADLINE_METRICS
from hf_lowrank.report.io import metric_entry, validate_report
from hf_lowrank.report.tables import fact_rows, headline_rows
from hf_lowrank.report.values import UNKNOWN, describe, format_bytes, format_count, format_duration, format_value


@pytest.fixture
def report() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("full_report.json").read_text())


def test_sixteen_headline_metrics() -> None:
    numbered = [metric.id for metric in HEADLINE_METRICS if metric.id]
    assert numbered == [f"H{number}" for number in range(1, 17)]
    assert len({metric.name for metric in HEADLINE_METRICS}) == len(HEADLINE_METRICS)


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (3.6123, 0.0213, "3.612 ± 0.021"),
        (3.6, 0.0996, "3.60 ± 0.10"),
        (0.0012, 0.34, "0.00 ± 0.34"),
        (-0.0012, 0.34, "0.00 ± 0.34"),
        (0.0, 0.02, "0.000 ± 0.020"),
        (5123.4, 120.0, "5123 ± 120"),
        (1.234e-7, 5.6e-9, "(1.234 ± 0.056)e-07"),
        (0.0, 5.6e-9, "(0.0 ± 5.6)e-09"),
        (12345678.0, 120000.0, "(1.235 ± 0.012)e+07"),
        (3.6, 1e-12, "3.6 ± 1.0e-12"),
        (3.6, 0.0, "3.600 ± 0"),
        (3.6123, None, "3.612"),
        (3.6123, math.nan, "3.612"),
        (28, None, "28.00"),
        (36612.4, None, "36612"),
        (0.0021, None, "0.002100"),
        (1.23456e-9, None, "1.235e-09"),
        (-1.23456e9, None, "-1.235e+09"),
        (0.0, None, "0"),
        (5e-324, 5e-324, "(4.9 ± 4.9)e-324"),
        (1.7e308, 1e307, "(1.70 ± 0.10)e+308"),
        (None, None, "n/a"),
        (None, 0.1, "n/a"),
        (math.nan, 0.1, "n/a"),
        (math.inf, None, "n/a"),
    ],
)
def test_format_value(value: float | None, stderr: float | None, text: str) -> None:
    assert format_value(value, stderr) == text


def test_other_formats() -> None:
    assert [format_bytes(size) for size in (None, 0, 1023, 1536, 2**40 * 3)] == [
        None, "0 B", "1023 B", "1.5 KiB", "3 TiB",
    ]  # fmt: skip
    assert [format_count(count) for count in (None, 7, 1840512, 2.5e12)] == [
        None, "7", "1,840,512 (1.84 M)", "2,500,000,000,000 (2.5 T)",
    ]  # fmt: skip
    assert [format_duration(seconds) for seconds in (None, 0.25, 59.96, 131.4, 7500, 90000)] == [
        None, "0.25 s", "60 s", "2 min 11 s", "2 h 5 min", "25 h 0 min",
    ]  # fmt: skip
    assert describe({"b": [1, 2], "a": None, "c": 1e-12, "d": "x", "e": {}}) == "b=[1, 2], c=1e-12, d=x"


def test_headline_takes_the_last_step_of_each_metric(report: dict[str, Any]) -> None:
    rows = headline_rows(validate_report(report))
    assert [row.metric.id for row in rows] == [
        None, "H1", "H4", "H4", "H4", "H8", "H9", "H10", "H11", "H12", "H13",
    ]  # fmt: skip
    assert {row.entry.step for row in rows} == {300}
    by_name = {row.metric.name: row for row in rows}
    assert by_name["spectral/weight/stable_rank"].text == "11.9 ± 1.3"
    assert by_name["spectral/update/relative_norm"].entry.stderr is None
    assert by_name["landscape/random/sharpness"].text == "n/a"


def test_headline_keeps_settings_and_spaces_apart(report: dict[str, Any]) -> None:
    rows = [row for row in headline_rows(validate_report(report)) if row.metric.id == "H4"]
    assert [(row.entry.space, row.entry.settings["k"]) for row in rows] == [
        ("dense", 5),
        ("dense", 10),
        ("native", 10),
    ]


def test_headline_edge_cases(report: dict[str, Any]) -> None:
    report["metrics"] = []
    assert headline_rows(validate_report(report)) == []
    name = "spectral/weight/stable_rank"
    report["metrics"] = [
        metric_entry(name, 1.0, step=None),
        metric_entry(name, 2.0, step=5),
        metric_entry(name, 3.0, step=5),
        metric_entry("someone/elses/metric", 4.0, step=5),
    ]
    values = [row.entry.value for row in headline_rows(validate_report(report))]
    assert values == [3.0], "the later of two equal measurements counts"


def test_facts(report: dict[str, Any]) -> None:
    facts = {fact.key: fact.text for fact in fact_rows(validate_report(report))}
    assert facts["optimizer_state"] == "9.5 MiB measured, 9.5 MiB predicted, 14.04 MiB for AdamW"
    assert facts["method_config"] == "proj_type=std, r=32, scale=0.25, update_proj_gap=200"
    assert facts["lr_schedule"] == "cosine_with_min_lr, min_lr_rate=0.1, warmup_steps=30"
    assert facts["git_commit"] == UNKNOWN


def test_facts_of_an_unknown_run(report: dict[str, Any]) -> None:
    report["data"] = None
    unknown: dict[str, Any] = {}
    for key, value in report["run"].items():
        kept_whole = ("hardware", "method_config", "method_paper", "versions", "model")
        nested = isinstance(value, dict) and key not in kept_whole
        unknown[key] = dict.fromkeys(value) if nested else None
    kept = {key: report["run"][key] for key in ("name", "method", "method_config", "model", "steps", "versions")}
    report["run"] = unknown | kept
    facts = {fact.key: fact.text for fact in fact_rows(validate_report(report))}
    for key in (
        "data",
        "optimizer_state",
        "peak_memory",
        "batch",
        "lr_schedule",
        "hardware",
        "wall_time",
        "tokens_seen",
    ):
        assert facts[key] == UNKNOWN, key
    assert facts["steps"] == "300"
