"""The model card: golden text, metadata as the Hub's client reads it, and values that try to be more than text.

After a wanted change: `HF_LOWRANK_UPDATE_GOLDEN=1 pytest tests/hub/test_card.py -k golden`, then read the diff.
"""

import ast
import copy
import dataclasses
import html
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt  # a dependency of rich

from hf_lowrank.hub.card import METHODS, STUDY, CardData, render_card, write_card
from hf_lowrank.report import ReportError, headline_rows, metric_entry, write_report
from hf_lowrank.report.markdown import one_line

GOLDEN = Path(__file__).with_name("golden") / "card.md"
FULL = Path(__file__).parents[1] / "report" / "full_report.json"
FIGURES = ["spectra_over_depth.png", "loss.png", "spectra_over_steps.png"]

NASTY = [
    "{{ 7*7 }}{% for x in y %}",
    "<script>alert(1)</script><!--",
    "a | b\n| --- | --- |\n| c",
    "x\n---\nlicense: gpl-3.0\n---\n# Heading",
    "[click](javascript:alert(1)) ![i](http://x.example/i.png)",
    "```\n# out of the fence\n```",
    "quote \" and ' and \\ and \\n, key: [value, {a: b}] # comment",
    "*bold* _it_ `code` $x$ & &lt;",
]


@pytest.fixture
def report() -> dict[str, Any]:
    return json.loads(FULL.read_text())


def card_of(report: dict[str, Any], repo_id: str | None = "user/tiny-galore") -> str:
    return render_card(CardData.from_report(report, FIGURES, repo_id))


def body_html(card: str) -> str:
    return MarkdownIt("gfm-like", {"linkify": False}).render(ModelCard(card).text)


def python_blocks(card: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)


def test_golden(report: dict[str, Any]) -> None:
    text = card_of(report)
    if os.environ.get("HF_LOWRANK_UPDATE_GOLDEN"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")


def test_rendering_is_pure(report: dict[str, Any]) -> None:
    before = copy.deepcopy(report)
    data = CardData.from_report(report, FIGURES)
    kept = copy.deepcopy(data)
    assert render_card(data) == render_card(data) == render_card(dataclasses.replace(data))
    assert (report, data) == (before, kept)


def test_model_index_keeps_every_result_apart(report: dict[str, Any]) -> None:
    data = ModelCard(card_of(report)).data
    expected = [row for row in headline_rows(report) if row.value is not None]
    assert len(data.eval_results) == len(expected) == 10
    results = data.to_dict()["model-index"][0]["results"]
    assert len(results) == len(expected), "none was merged into another"
    assert len({result["dataset"]["config"] for result in results}) == len(expected)
    for result, row in zip(results, expected, strict=True):
        (metric,) = result["metrics"]
        assert metric["type"] == row.name
        assert metric["value"] == row.value
        assert isinstance(metric["value"], float)
        assert metric.get("args", {}).get("stderr") == row.stderr


def test_metadata(report: dict[str, Any]) -> None:
    metadata = ModelCard(card_of(report)).data.to_dict()
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "text-generation"
    assert metadata["tags"] == ["hf-lowrank", "lowrank-method:galore", "llama"]
    assert metadata["license"] == "apache-2.0"
    assert "datasets" not in metadata
    assert metadata["model-index"][0]["name"] == "tiny-galore"


@pytest.mark.parametrize(
    ("source", "name", "listed"),
    [
        ("hub", "allenai/c4", True),
        ("hub", "wikitext", True),
        (None, "allenai/c4", True),
        (None, "wikitext", False),
        (None, "corpora/text.jsonl", False),
        (None, "/data/c4", False),
        ("local", "allenai/c4", False),
        ("embedded", "python-stdlib", False),
        ("hub", "not a name", False),
    ],
)
def test_data_set_is_named_only_if_it_is_the_hubs(
    report: dict[str, Any], source: str | None, name: str, listed: bool
) -> None:
    report["data"] |= {"source": source, "name": name, "config": "en", "revision_or_hash": "1588ec4"}
    metadata = ModelCard(card_of(report)).data.to_dict()
    assert metadata.get("datasets") == ([name] if listed else None)
    first = metadata["model-index"][0]["results"][0]["dataset"]
    assert first.get("revision") == ("1588ec4" if listed else None)
    assert first["config"].startswith("en; ")
    assert not listed or first["type"] == name


@pytest.mark.parametrize(
    ("license_id", "expected"),
    [
        (None, {}),
        ("MIT", {"license": "mit"}),
        ("My own: v2", {"license": "other", "license_name": "my-own-v2"}),
    ],
)
def test_licence(report: dict[str, Any], license_id: str | None, expected: dict[str, str]) -> None:
    report["run"]["license"] = license_id
    metadata = ModelCard(card_of(report)).data.to_dict()
    assert {key: value for key, value in metadata.items() if key.startswith("license")} == expected


@pytest.mark.parametrize("method", [*METHODS, "someone-elses"])
def test_every_method(report: dict[str, Any], method: str) -> None:
    report["run"]["method"] = method
    card = card_of(report)
    blocks = python_blocks(card)
    assert len(blocks) == 3
    for block in blocks:
        ast.parse(block)
        assert '"user/tiny-galore"' in block
    info = METHODS.get(method)
    for paper in (STUDY, info.paper if info else None):
        if paper is not None:
            assert f"eprint        = {{{paper.arxiv}}}" in card
            assert f"]({paper.url})" in card
    dense = info is None or info.dense
    assert ("dense=True" in card) == dense
    assert ("trust_remote_code=True" in card) != dense


def test_snippets_use_only_what_is_there(report: dict[str, Any]) -> None:
    code = "\n".join(python_blocks(card_of(report)))
    called = {node.func.attr for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)}
    assert called == {"from_pretrained", "load_report"}
    report["data"]["tokenizer_hash"] = None
    assert "AutoTokenizer" not in card_of(report)


def test_unpublished_card_says_that_the_name_is_a_stand_in(report: dict[str, Any]) -> None:
    report["run"]["name"] = "My run: *r=32*"
    card = card_of(report, None)
    assert 'from_pretrained("user/my-run-r-32")' in card
    assert "stands in for" in card
    assert "stands in for" not in card_of(report)


@pytest.mark.parametrize("repo_id", ["a/b/c", "user/x y", 'x"); import os; ("', "", "user/--"])
def test_bad_repo_id(report: dict[str, Any], repo_id: str) -> None:
    with pytest.raises(ValueError, match="is not a Hub repository's name"):
        CardData.from_report(report, repo_id=repo_id)


def test_unknown_facts_are_said_to_be_unknown(report: dict[str, Any]) -> None:
    report |= {"data": None, "metrics": [], "evaluations": []}
    report["run"] |= {"tokens_seen": None, "command": None, "flops": None, "hardware": None, "license": None}
    report["run"]["steps"] = 120
    card = card_of(report)
    assert "What the model was trained on is not recorded" in card
    assert "base model" not in card
    assert "No headline metric was measured." in card
    assert "not evaluated on downstream tasks" in card
    assert "stopped at step 120 of 300" in card
    assert "| Hardware | not recorded |" in card
    assert "```bash" not in card
    metadata = ModelCard(card).data.to_dict()
    assert "model-index" not in metadata
    assert "model_name" not in metadata


def test_figures_come_in_order_and_safely(report: dict[str, Any]) -> None:
    data = CardData.from_report(report, [*FIGURES, "mine (1) <b>.png"])
    assert [name for name, _ in data.figures] == [
        "loss.png", "spectra_over_steps.png", "spectra_over_depth.png", "mine (1) <b>.png",
    ]  # fmt: skip
    rendered = body_html(render_card(data))
    assert re.findall(r'<img src="([^"]*)"', rendered)[-2:] == [
        "figures/spectra_over_depth.png", "figures/mine%20%281%29%20%3Cb%3E.png",
    ]  # fmt: skip


@pytest.mark.parametrize("text", NASTY)
def test_values_come_out_as_text(report: dict[str, Any], text: str) -> None:
    plain = card_of(report)
    run = report["run"]
    run |= {"name": text, "hardware": {"cpu": text}, "precision": text, "license": text, "git_commit": text}
    run["method_config"] = {"note": text}
    run["versions"]["torch"] = text
    run["model"] |= {"architecture": text, "size": text}
    run["command"] = ["python", "train.py", "--name", text]
    report["data"] |= {"name": text, "config": text, "tokenizer_name": text}
    report["evaluations"][0]["task"] = text
    report["metrics"] += [
        metric_entry("spectral/weight/stable_rank", 1.0, step=300, space="native", settings={"note": text}),
        metric_entry("perplexity", None, step=301, settings={"note": text}),
    ]
    card = card_of(report)

    metadata = ModelCard(card).data.to_dict()
    assert metadata["model-index"][0]["name"] == one_line(text)
    assert set(metadata) <= {*ModelCard(plain).data.to_dict(), "license_name"}
    assert metadata["license"] == "other"

    rendered, expected = body_html(card), body_html(plain)
    shown = html.unescape(re.sub(r"<[^>]+>", "", rendered))
    assert shown.count(one_line(text)) >= 12
    for markup in ("<script", "<strong", "<em>", "<h1", "<h2", "<hr", "<img", "<a ", "<table", "<pre", "<th>", "<!--"):
        assert rendered.count(markup) == expected.count(markup), markup
    for block in python_blocks(card):
        ast.parse(block)


@pytest.mark.parametrize("text", NASTY)
def test_unknown_method_name_comes_out_as_text(report: dict[str, Any], text: str) -> None:
    report["run"]["method"] = text
    card = card_of(report)
    rendered = body_html(card)
    assert html.unescape(re.sub(r"<[^>]+>", "", rendered)).count(one_line(text)) == 3
    assert "<script" not in rendered
    assert all(re.fullmatch(r"[\w.:-]+", tag) for tag in ModelCard(card).data.tags)


def test_write_card(report: dict[str, Any], tmp_path: Path) -> None:
    write_report(report, tmp_path / "report.json")
    (tmp_path / "figures").mkdir()
    for name in FIGURES:
        (tmp_path / "figures" / name).touch()
    path = write_card(tmp_path, "user/tiny-galore")
    assert path == tmp_path / "README.md"
    assert path.read_text(encoding="utf-8") == GOLDEN.read_text(encoding="utf-8")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["README.md", "figures", "report.json"]


def test_write_card_without_a_valid_report(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_card(tmp_path)
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(ReportError):
        write_card(tmp_path)
    assert not (tmp_path / "README.md").exists()
