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

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from hf_lowrank.hub.card import STUDY, CardData, render_card, write_card
from hf_lowrank.methods import METHODS
from hf_lowrank.report.baseline import baseline_of
from hf_lowrank.report.io import ReportError, metric_entry, validate_report, write_report
from hf_lowrank.report.markdown import one_line
from hf_lowrank.report.tables import headline_rows

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
    report = json.loads(FULL.read_text())
    report["evaluations"][0]["settings"] = {"seed": 42}
    return report | {"baseline": baseline_of(full_rank(report))}


def full_rank(report: dict[str, Any]) -> dict[str, Any]:
    """The report of a run that differs from `report`'s in its method, numbers and a setting."""
    other = copy.deepcopy(report)
    other["run"] |= {"name": "tiny-fullrank", "method": "fullrank", "method_label": "full-rank training"}
    other["run"]["learning_rate"] = 0.003
    other["run"]["optimizer_state_bytes"]["measured"] = 14722204
    for entry in (*other["metrics"], *other["evaluations"]):
        entry["value"] = None if entry["value"] is None else entry["value"] * 1.25
        if entry["name" if "name" in entry else "task"].endswith("update/stable_rank"):
            entry["reference"] = {"since": 100}
    return other


def card_of(report: dict[str, Any], repo_id: str | None = "user/tiny-galore") -> str:
    return render_card(CardData.from_report(report, FIGURES, repo_id))


def body_html(card: str) -> str:
    return MarkdownIt("gfm-like", {"linkify": False}).render(ModelCard(card).text)


def part(card: str, summary: str) -> str:
    """What a reader sees after a click."""
    return card.split(f"<summary>{summary}</summary>")[1].split("</details>")[0]


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
    expected = [row.entry for row in headline_rows(validate_report(report)) if row.entry.value is not None]
    assert len(data.eval_results) == len(expected) + 1 == 11
    results = data.to_dict()["model-index"][0]["results"]
    assert len(results) == len(expected) + 1, "none was merged into another"
    assert len({result["dataset"]["config"] for result in results}) == len(expected) + 1
    for result, entry in zip(results[:-1], expected, strict=True):
        (metric,) = result["metrics"]
        assert metric["type"] == entry.name
        assert metric["value"] == entry.value
        assert isinstance(metric["value"], float)
        assert metric.get("args", {}).get("stderr") == entry.stderr


def test_downstream_results_are_told_apart_by_their_settings(report: dict[str, Any]) -> None:
    (first,) = report["evaluations"]
    changes: list[dict[str, Any]] = [
        {},
        {"value": 0.5},  # evaluated again: this one counts
        {"step": 150, "value": 0.1},  # an earlier checkpoint
        {"metric": "perplexity,none", "value": 9.0, "stderr": None},
        {"num_fewshot": 5},
        {"limit": 100},
        {"settings": {"seed": 43, "higher_is_better": True, "truncated_requests": 3}},
        {"settings": {"seed": 43, "higher_is_better": True}, "value": 0.7},
        {"task": "copa", "task_version": None, "step": None},
        {"task": "copa", "value": None, "stderr": None, "num_fewshot": 3},
    ]
    report["evaluations"] = [first | change for change in changes]
    card = card_of(report)
    index = ModelCard(card).data.to_dict()["model-index"][0]["results"][-5:]
    found = {
        (result["dataset"]["config"], metric["type"]): metric["value"]
        for result in index
        for metric in result["metrics"]
    }
    name = "lambada_openai"
    assert found == {
        (f"{name}; 0-shot; step 300; version 1.0; seed=42", "acc"): 0.5,
        (f"{name}; 0-shot; step 300; version 1.0; seed=42", "perplexity,none"): 9.0,
        (f"{name}; 5-shot; step 300; version 1.0; seed=42", "acc"): first["value"],
        (f"{name}; 0-shot; limit 100; step 300; version 1.0; seed=42", "acc"): first["value"],
        (f"{name}; 0-shot; step 300; version 1.0; seed=43", "acc"): 0.7,
        ("copa; 0-shot; seed=42", "acc"): first["value"],
    }
    rows = re.findall(r"^\| (?:lambada|copa).*$", card, re.MULTILINE)
    assert len(rows) == 7, "the one that could not be had is shown as well"
    assert "| copa | acc | n/a | 3 |" in card
    assert "with a limit are of the first items" in card
    report["evaluations"] = []
    assert "Downstream tasks" not in card_of(report)


def test_baseline(report: dict[str, Any]) -> None:
    card = card_of(report)
    section = part(card, "Beside its baseline")
    assert "The baseline is tiny-fullrank: full-rank training, " in section
    assert "14.04 MiB of optimizer state" in section
    assert "37.00 ± 0.42 | 46.25 ± 0.42 | −9.25 ± 0.59" in section
    assert "lambada\\_openai" in section
    # the same items, answered by another form of the weights
    report["evaluations"][0]["settings"] |= {"form": "native", "dtype": "float32", "truncated_requests": 1}
    assert "lambada\\_openai" in part(card_of(report), "Beside its baseline")
    # measured with other settings there, and not measured here
    assert "spectral/update/stable_rank" not in section
    assert "landscape/random" not in section
    assert "differ in more than" not in section

    report["baseline"]["tokens_seen"] = 10
    report["baseline"]["data"] |= {"tokenizer_hash": "sha256:other"}
    section = part(card_of(report), "Beside its baseline")
    assert "**The two runs differ in more than the method: tokenizer (sha256:77aa here, sha256:other there)" in section
    assert "tokens seen (1,228,800 (1.23 M) here, 10 there)" in section
    report["baseline"] |= {"metrics": [], "evaluations": [], "data": None}
    section = part(card_of(report), "Beside its baseline")
    assert "data (not recorded for the baseline)" in section
    assert "Nothing was measured on both in the same way." in section
    del report["baseline"]
    assert "baseline" not in card_of(report).lower()


def test_what_is_seen_first(report: dict[str, Any]) -> None:
    report["metrics"] += [
        metric_entry("interpolation/cross_method/barrier", value, step=300, space="dense", settings={"other": other})
        for other, value in (("another", 0.5), ("tiny-fullrank", 0.25))
    ]
    report["metrics"].append(metric_entry("validation_loss", 3.611, step=300, stderr=0.011))
    report["baseline"]["metrics"].append(metric_entry("validation_loss", 4.514, step=300, stderr=0.011))
    card = render_card(CardData.from_report(report, [*FIGURES, "mine.png"], "user/tiny-galore"))
    first, code = card.split("\n---\n", 1)[1].split("## How to load it")
    title, sentence, loss, table, missing, *figures = first.strip().split("\n\n")
    assert title == "# tiny-galore"
    assert sentence.count(". ") == 0
    assert loss == (
        "Validation loss: 3.611 ± 0.011 nats a token, perplexity 37.00 ± 0.42. The baseline, tiny-fullrank (full-rank "
        "training), has 4.514 ± 0.011; the difference is −0.903 ± 0.016."
    )
    head, _, *rows = table.splitlines()
    assert head == "| | Metric | Value | Baseline | Difference |"
    ids = [row.split(" | ")[0].strip("| ") for row in rows]
    assert ids == sorted(set(ids), key=lambda number: int(number[1:])), "one line each, in their order"
    assert "| H7 | Barrier to another method (tiny-fullrank) | 0.2500 |  |  |" in rows
    assert missing == f"Not measured: {', '.join(f'H{n}' for n in range(1, 17) if f'H{n}' not in ids)}."
    assert [re.search(r"\((.*)\)", each)[1] for each in figures] == [
        "figures/loss.png", "figures/spectra_over_steps.png", "figures/spectra_over_depth.png",
    ]  # fmt: skip
    # all else is a click away
    seen = re.sub(r"<details>\n.*?</details>", "", code, flags=re.DOTALL)
    assert re.sub(r"```.*?```", "", seen, flags=re.DOTALL).count("|") == 0
    assert "figures/mine.png" in part(card, "More figures")
    assert card.count("<details>") == card.count("</details>") == card.count("<summary>") == 7

    report["baseline"]["tokens_seen"] = 10
    report["metrics"] = [each for each in report["metrics"] if each["name"] != "validation_loss"]
    text = card_of(report)
    assert "perplexity: 37.00 ± 0.42. The baseline is tiny-fullrank (full-rank training). **The two differ in" in text
    del report["baseline"]
    assert "| | Metric | Value |\n| --- | --- | --- |\n| H" in card_of(report)


def test_a_baseline_holds_what_was_measured_of_it_alone(report: dict[str, Any]) -> None:
    del report["baseline"]
    report["metrics"] += [
        metric_entry("activation/cka", 0.5, step=300),
        metric_entry("interpolation/cross_method/barrier", 0.5, step=300, space="dense"),
        metric_entry("interpolation/consecutive/barrier", 0.5, step=300, space="dense"),
        metric_entry("perplexity", 40.0, step=299),
    ]
    baseline = baseline_of(report)
    names = [entry["name"] for entry in baseline["metrics"]]
    assert "interpolation/consecutive/barrier" in names
    assert not [name for name in names if name.startswith(("activation/", "interpolation/cross"))]
    assert [entry["value"] for entry in baseline["metrics"] if entry["name"] == "perplexity"] == [37.0]
    validate_report(report | {"baseline": baseline})
    with pytest.raises(ReportError, match=r"baseline\.method is missing"):
        validate_report(report | {"baseline": {"name": "x"}})


GSM8K: dict[str, Any] = {
    "task": "gsm8k", "metric": "exact_match,strict-match", "value": 0.0125, "stderr": 0.003, "num_fewshot": 5,
    "limit": None, "step": 300, "task_version": "3.0",
}  # fmt: skip


def test_only_whole_registered_benchmarks_become_eval_results(report: dict[str, Any], tmp_path: Path) -> None:
    flexible = {"metric": "exact_match,flexible-extract", "value": 0.5}
    report["evaluations"] += [GSM8K, GSM8K | flexible | {"limit": 10}]
    write_report(report, tmp_path / "report.json")
    write_card(tmp_path)
    (path,) = (tmp_path / ".eval_results").iterdir()
    assert path.name == "gsm8k.yaml"
    (entry,) = huggingface_hub.parse_eval_result_entries(yaml.safe_load(path.read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/gsm8k", "gsm8k", 1.25)
    assert entry.notes == "lm-evaluation-harness, 5-shot, strict-match"
    assert entry.date == report["run"]["date"]
    report["evaluations"] = [GSM8K | flexible, GSM8K | {"value": None, "stderr": None}]
    write_report(report, tmp_path / "report.json")
    write_card(tmp_path)
    assert [path.name for path in (tmp_path / ".eval_results").iterdir()] == ["gsm8k_flexible_extract.yaml"]


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


def address(paper: Any) -> str:
    return f"https://arxiv.org/abs/{paper.arxiv}" if paper.arxiv else paper.url


@pytest.mark.parametrize("method", [*METHODS, "someone-elses"])
def test_every_method(report: dict[str, Any], method: str) -> None:
    for field in ("method_label", "method_paper", "dense_form"):
        del report["run"][field]
    config = METHODS.get(method)
    report["run"] |= {"method": method, **(config.facts() if config else {})}
    card = card_of(report)
    blocks = python_blocks(card)
    assert len(blocks) == 3
    for block in blocks:
        ast.parse(block)
        assert '"user/tiny-galore"' in block
    for paper in (STUDY, config.paper if config else None):
        if paper is not None:
            assert paper.arxiv is None or f"eprint        = {{{paper.arxiv}}}" in card
            assert f"]({address(paper)})" in card
            assert paper.authors.count(", ") == card.split(f"{{{paper.title}}},")[1].split("\n")[1].count(" and ") >= 2
    label = config.label if config else method
    linked = f"[{label}]({address(config.paper)})" if config and config.paper else label
    assert f", trained with {linked} on " in card
    dense = config is None or config.has_dense_form
    assert ("dense=True" in card) == dense
    assert ("trust_remote_code=True" in card) != dense


def test_snippets_use_only_what_is_there(report: dict[str, Any]) -> None:
    code = "\n".join(python_blocks(card_of(report)))
    called = {ast.unparse(node.func) for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)}
    loading = {"AutoModelForCausalLM.from_pretrained", "lr.from_pretrained", "lr.load_report"}
    generating = {"AutoTokenizer.from_pretrained", "tokenizer", "tokenizer.decode", "model.generate", "print"}
    assert called == loading | generating
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


def test_a_checkpoint_of_a_run_that_went_on_did_not_stop(report: dict[str, Any]) -> None:
    report["run"] |= {"steps": 120, "checkpoint_of": {"steps": 300}}
    card = card_of(report)
    assert "- This is the checkpoint of step 120: training went on to step 300." in card
    report["run"]["checkpoint_of"]["steps"] = None
    assert "- This is the checkpoint of step 120: training was under way." in card_of(report)
    assert "stopped" not in card + card_of(report)


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
    run |= {"method_label": text, "method_paper": {"title": text, "arxiv": text, "authors": text}}
    run["method_config"] = {"note": text}
    run["versions"]["torch"] = text
    run["model"] |= {"architecture": text, "size": text}
    run["command"] = ["python", "train.py", "--name", text]
    report["data"] |= {"name": text, "config": text, "tokenizer_name": text}
    report["evaluations"][0] |= {"task": text, "metric": text, "task_version": text, "settings": {"note": text}}
    shared = {key: run[key] for key in ("model", "precision", "versions", "hardware")}
    report["baseline"] |= {"name": text, "method": text, "data": report["data"], **shared}
    report["baseline"]["evaluations"] = report["evaluations"]
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
    assert shown.count(one_line(text)) >= 20
    for markup in ("<script", "<strong", "<em>", "<h1", "<h2", "<hr", "<img", "<a ", "<table", "<pre", "<th>", "<!--"):
        assert rendered.count(markup) == expected.count(markup), markup
    for block in python_blocks(card):
        ast.parse(block)


@pytest.mark.parametrize("text", NASTY)
def test_differences_from_the_baseline_and_captions_come_out_as_text(report: dict[str, Any], text: str) -> None:
    file = f"{text.replace('/', '')}.png"
    plain = body_html(render_card(CardData.from_report(report, ["x.png"])))
    report["baseline"]["data"] = report["baseline"]["data"] | {"name": text}
    rendered = body_html(render_card(CardData.from_report(report, [file])))
    shown = html.unescape(re.sub(r"<[^>]+>", "", rendered))
    assert f"data (python-stdlib here, {one_line(text)} there)" in shown
    alt = html.unescape(re.findall(r'<img src="[^"]*" alt="([^"]*)"', rendered)[-1])
    assert alt == one_line(Path(file).stem)
    for markup in ("<script", "<em>", "<h1", "<h2", "<hr", "<img", "<a ", "<table", "<pre", "<!--"):
        assert rendered.count(markup) == plain.count(markup), markup


@pytest.mark.parametrize("text", NASTY)
def test_unknown_method_name_comes_out_as_text(report: dict[str, Any], text: str) -> None:
    del report["run"]["method_paper"]
    report["run"] |= {"method": text, "method_label": None}
    card = card_of(report)
    rendered = body_html(card)
    assert html.unescape(re.sub(r"<[^>]+>", "", rendered)).count(one_line(text)) == 2
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
