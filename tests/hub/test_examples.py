"""The cards in model_cards/: of real runs, and what their stored reports give today."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from hf_lowrank.cli import main
from hf_lowrank.hub.card import CardData, render_card, store_card
from hf_lowrank.report.io import read_report, write_report

EXAMPLES = Path(__file__).parents[2] / "model_cards"
STORED = sorted(path.parent.name for path in EXAMPLES.glob("*/report.json"))
FULL = Path(__file__).parents[1] / "report" / "full_report.json"


def figures_of(folder):
    return sorted(path.name for path in (folder / "figures").glob("*"))


@pytest.mark.parametrize("name", STORED)
def test_a_stored_card_is_what_its_report_gives(name):
    folder = EXAMPLES / name
    text = render_card(CardData.from_report(read_report(folder), figures_of(folder)))
    assert (folder / "README.md").read_text(encoding="utf-8") == text, "stale: run hf-lowrank card model_cards/*"
    shown = re.findall(r"^!\[.*\]\(figures/(.*)\)$", text, re.MULTILINE)
    assert sorted(shown) == figures_of(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "figures", "report.json"]


@pytest.mark.parametrize("name", STORED)
def test_a_stored_card_is_of_a_whole_run_of_the_embedded_default(name):
    report = read_report(EXAMPLES / name)
    run = report["run"]
    assert run["name"] == name
    assert (report["data"]["source"], run["model"]["size"]) == ("embedded", "tiny")
    assert run["steps"] == run["max_steps"] > 100
    assert ModelCard.load(EXAMPLES / name / "README.md").data.eval_results
    # nothing says where it was made
    assert not re.search(r'"[^"]*(?<![\w.:/])(?:/|~/|[A-Z]:\\\\)\w', report.model_dump_json())


def test_there_are_enough_and_they_are_small():
    assert len({read_report(EXAMPLES / name)["run"]["method"] for name in STORED}) >= 4
    assert sum(path.stat().st_size for path in EXAMPLES.rglob("*") if path.is_file()) < 4_000_000
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"]({name}/README.md)" in listed for name in STORED)


def call(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["hf-lowrank", *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0


def test_one_command_renders_all_of_them_again(tmp_path, monkeypatch, capsys):
    copy = shutil.copytree(EXAMPLES, tmp_path / "model_cards")
    for name in STORED:
        (copy / name / "README.md").unlink()
    # as a shell expands model_cards/*
    assert call(monkeypatch, "card", *sorted(copy.iterdir())) == 0
    assert len(capsys.readouterr().out.splitlines()) >= len(STORED)
    for path in EXAMPLES.rglob("*"):
        if path.is_file():
            assert (copy / path.relative_to(EXAMPLES)).read_bytes() == path.read_bytes()
    assert call(monkeypatch, "card", *sorted(copy.iterdir()), "--repo-id", "user/x") == 2
    assert "--repo-id user/x is for one run" in capsys.readouterr().err


@pytest.fixture
def run(tmp_path):
    """A run with a report and a figure, by relative path as from its folder's parent."""
    publish = tmp_path / "runs" / "a run" / "publish"
    write_report(json.loads(FULL.read_text()), publish / "report.json")
    (publish / "figures").mkdir()
    Image.effect_noise((64, 64), 90).convert("RGBA").save(publish / "figures" / "loss.png")
    (publish / "model.safetensors").write_bytes(b"weights")
    return publish.parent


def test_a_run_is_stored_without_its_weights(run, tmp_path, monkeypatch, capsys):
    output = tmp_path / "cards"
    for _ in range(2):  # what lies there is replaced
        assert call(monkeypatch, "card", run, "--output", output) == 0
        assert Path(capsys.readouterr().out.replace("\n", "")) == output / "tiny-galore" / "README.md"
        stored = {p.relative_to(output).as_posix() for p in output.rglob("*") if p.is_file()}
        assert stored == {f"tiny-galore/{name}" for name in ("README.md", "report.json", "figures/loss.png")}
        (output / "tiny-galore" / "figures" / "old.png").touch()
    assert read_report(output / "tiny-galore") == read_report(run)
    figure, original = (f / "figures" / "loss.png" for f in (output / "tiny-galore", run / "publish"))
    assert figure.stat().st_size < original.stat().st_size
    with Image.open(figure) as image:
        assert image.size == (64, 64)
        assert image.mode == "P"


def test_a_report_that_says_where_it_was_made_is_not_stored(run, tmp_path, monkeypatch, capsys):
    report = read_report(run)
    for where in (f"{run.resolve()}/checkpoint-3", str(Path.home() / "x"), "on build-host-7."):
        monkeypatch.setattr("platform.node", lambda: "build-host-7")
        report["metrics"][0]["settings"]["other"] = where
        write_report(report, run / "publish" / "report.json")
        assert call(monkeypatch, "card", run, "--output", tmp_path / "cards") == 2
        assert "says where it was made" in capsys.readouterr().err
    assert not (tmp_path / "cards").exists()


def test_storing_a_card_over_itself_keeps_it(run, tmp_path):
    card = store_card(run / "publish", tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.joinpath("tiny-galore").rglob("*") if path.is_file()}
    assert store_card(card.parent, tmp_path) == card
    assert {path: path.read_bytes() for path in before} == before
