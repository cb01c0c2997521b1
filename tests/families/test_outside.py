"""A family of metrics from another package: it trains, resumes, is measured, published and compared like ours."""

import json
import shutil
import sys

import pytest
from tiny_runs import Kill

import hf_lowrank as lr
from hf_lowrank import plugins
from hf_lowrank.cli import main
from hf_lowrank.families import families
from hf_lowrank.report import catalogue
from hf_lowrank.report.tables import headline_rows

LABELS = ("Mean size of the weights", "Mean size of the change")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The toy's package as pip installs it: Python finds its metadata, and nothing has imported it."""
    site = tmp_path_factory.mktemp("site")
    metadata = site / "toy_family-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy_family\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[hf_lowrank.plugins]\ntoy = toy_family\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        patch.setattr(plugins, "_loaded", set())
        patch.setattr(plugins, "_searched", [])
        patch.setattr(catalogue, "_ENTRIES", dict(catalogue._ENTRIES))
        patch.setattr(sys.modules["hf_lowrank.families.family"], "_FAMILIES", families())
        patch.delitem(sys.modules, "toy_family", raising=False)
        yield
    sys.modules.pop("toy_family", None)


def command(monkeypatch, *words, code=0):
    monkeypatch.setattr(sys, "argv", ["hf-lowrank", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code


def numbers(folder):
    """(name, step) -> value of the toy's records in the report."""
    return {(m["name"], m["step"]): m["value"] for m in lr.load_report(folder)["metrics"] if "toy/" in m["name"]}


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory):
    """A run with the toy's callback: four steps, checkpoints at 2 and 4."""
    from toy_family import train

    folder = tmp_path_factory.mktemp("toy") / "run"
    assert train(folder) is None
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """The same, to write into."""
    return shutil.copytree(trained, tmp_path / "run")


def test_training_puts_it_into_report_figure_and_card(trained):
    values = numbers(trained)
    assert [step for _, step in values] == [0, 1, 2, 3, 4]
    # the first step only warms up
    assert len(set(values.values())) == 4
    rows = [row for row in headline_rows(lr.load_report(trained)) if row.entry.name.startswith("toy/")]
    assert [(row.metric.label, row.entry.step, row.entry.space) for row in rows] == [(LABELS[0], 4, None)]
    card = (trained / "publish" / "README.md").read_text()
    assert LABELS[0] in card
    assert "toy_over_steps.png" in card
    assert "Toy numbers over training" in card
    assert (trained / "publish" / "figures" / "toy_over_steps.png").is_file()


def test_a_killed_run_measures_on_as_if_nothing_had_happened(trained, tmp_path):
    from toy_family import train

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, callbacks=[Kill(3)])
    train(tmp_path, resume=lr.last_checkpoint(tmp_path))
    ours, theirs = (json.loads((f / "publish" / "metrics" / "toy.json").read_text()) for f in (tmp_path, trained))
    assert ours == theirs


def test_one_that_fails_is_switched_off(toy, tmp_path, caplog):
    from toy_family import ToySettings, train

    train(tmp_path, settings=ToySettings(scale="two"))
    assert "toy failed at step 0 and is switched off" in caplog.text
    assert numbers(tmp_path) == {}


def test_measure_finds_it_by_its_entry_point(run, monkeypatch, capsys):
    trained_values = numbers(run)
    monkeypatch.setenv("COLUMNS", "200")
    (run / "publish" / "metrics" / "toy.json").unlink()
    command(monkeypatch, "measure", run, "--only", "toy")
    values = numbers(run)
    assert list(values) == [
        ("toy/weights/size", 2), ("toy/weights/size", 4), ("toy/change/size", 4),
    ]  # fmt: skip
    for key in (("toy/weights/size", 2), ("toy/weights/size", 4)):
        assert values[key] == pytest.approx(trained_values[key])
    assert 0 < values["toy/change/size", 4] < values["toy/weights/size", 4]
    assert "toy/change/size" in capsys.readouterr().out
    # what is done is not done again
    table = run / "publish" / "metrics" / "toy.json"
    written = table.stat().st_mtime_ns
    command(monkeypatch, "measure", run, "--only", "toy")
    assert table.stat().st_mtime_ns == written


def test_a_damaged_checkpoint_is_a_record_with_its_reason(run, monkeypatch):
    (run / "publish" / "metrics" / "toy.json").unlink()
    weights = run / "checkpoint-2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    command(monkeypatch, "measure", run, "--only", "toy", code=1)
    notes = {(m["name"], m["step"]): m["about"].get("note") for m in lr.load_report(run)["metrics"]}
    assert notes["toy/weights/size", 2]
    assert notes["toy/change/size", 4]


def test_compare_shows_it(trained, run, tmp_path, monkeypatch):
    report = json.loads((run / "publish" / "report.json").read_text())
    report["run"]["name"] = "other"
    (run / "publish" / "report.json").write_text(json.dumps(report))
    command(monkeypatch, "compare", trained, run, "--output", tmp_path / "comparison")
    page = (tmp_path / "comparison" / "index.html").read_text()
    assert LABELS[0] in page
    assert "Toy numbers" in page
    assert "mean absolute weight" in page
    assert (tmp_path / "comparison" / "figures" / "toy_over_steps.png").is_file()
    assert LABELS[0] in (tmp_path / "comparison" / "comparison.md").read_text()


def test_without_the_plugin_its_numbers_go_by_their_names(run, tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "_ENTRIES", {e.name: e for e in catalogue.CATALOGUE})
    assert not [row for row in headline_rows(lr.load_report(run)) if row.entry.name.startswith("toy/")]
    command(monkeypatch, "compare", run, "--output", tmp_path / "comparison")
    assert "toy/weights/size" in (tmp_path / "comparison" / "index.html").read_text()


def test_names_are_not_taken_twice(toy):
    from toy_family import ENTRY

    for changes in ({"name": "spectral"}, {"name": "other"}):
        with pytest.raises(ValueError, match="cannot be registered"):
            catalogue.register(catalogue.Entry(**{**vars(ENTRY), **changes}))
