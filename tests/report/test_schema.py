"""The report's schema: what it takes, what it refuses and how it says so."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from hf_lowrank.report import io
from hf_lowrank.report.comparability import differences
from hf_lowrank.report.io import ReportError, metric_entry, read_report, validate_report, write_report
from hf_lowrank.report.model import SCHEMA_VERSION, Report, json_schema

FULL = Path(__file__).with_name("full_report.json")
VERSION_1 = FULL.with_name("report_v1.json")
SCHEMA = Path(io.__file__).with_name("schema.json")


@pytest.fixture
def report() -> dict[str, Any]:
    return json.loads(FULL.read_text())


def change(report: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    target: Any = report
    for part in parents:
        target = target[part]
    if value is KeyError:
        del target[last]
    else:
        target[last] = value


def test_schema_is_what_the_models_export(report: dict[str, Any]) -> None:
    schema = json.loads(SCHEMA.read_text())
    assert schema == json_schema(), "write json.dumps(json_schema(), indent=2) to report/schema.json"
    Draft202012Validator.check_schema(schema)
    assert schema["properties"]["schema_version"]["const"] == SCHEMA_VERSION
    Draft202012Validator(schema).validate(report)


def test_a_report_has_attributes_and_is_a_mapping(report: dict[str, Any]) -> None:
    read = validate_report(report)
    assert isinstance(read, Report)
    assert read["run"]["steps"] == read.run.steps == report["run"]["steps"]
    assert {**read.metrics[0]} == report["metrics"][0]
    assert list(read) == list(read.keys()) == list(report)
    assert read.get("baseline") is read.baseline is None
    assert "run" in read
    assert "baseline" not in read
    assert read | {"data": None} == {**report, "data": None}
    with pytest.raises(KeyError):
        read["steps"]
    report["run"]["wandb_id"] = "w1"
    assert validate_report(report)["run"]["wandb_id"] == "w1"
    read["run"]["steps"] = "many"
    with pytest.raises(ReportError, match="run.steps: 'many' is not of type integer"):
        validate_report(read)


def test_version_1_is_brought_up_to_date_on_reading(report: dict[str, Any], tmp_path: Path) -> None:
    old = json.loads(VERSION_1.read_text())
    assert old["schema_version"] == 1
    assert read_report(VERSION_1) == report
    update = next(entry for entry in read_report(VERSION_1).metrics if entry.name == "spectral/update/stable_rank")
    assert (update.settings, update.reference, update.about) == ({"tolerance": 1e-12}, {"since": 0}, {"matrices": 28})
    old["baseline"] = {
        **dict.fromkeys(("tokens_seen", "optimizer_state_bytes", "learning_rate", "data")),
        **{"name": "b", "method": "cola", "steps": 1, "parameters": 1, "evaluations": []},
        "metrics": [metric_entry("interpolation/consecutive/barrier", 1.0, step=1, settings={"other": "a", "K": 2})],
    }
    old["run"]["method"] = "of_somebody_else"
    old["metrics"].append(metric_entry("toy/total", 1.0, step=1, settings={"total": 3}, about={}))
    read = validate_report(old)
    assert (read.run.method_label, read.run.method_paper, read.run.dense_form) == (None, None, None)
    assert read.metrics[-1].settings == {"total": 3}, "an entry of version 2 stays as it is"
    assert read.baseline is not None
    assert read.baseline.method_label == "CoLA"
    assert (read.baseline.metrics[0].settings, read.baseline.metrics[0].reference) == ({"K": 2}, {"other": "a"})
    assert write_report(read, tmp_path / "report.json")
    assert read_report(tmp_path) == read


def test_what_counts_as_stopped_early(report: dict[str, Any]) -> None:
    report["run"]["steps"] = 150
    assert validate_report(report).run.stopped_early
    for checkpoint_of in ({"steps": 300}, {"steps": None}):
        report["run"]["checkpoint_of"] = checkpoint_of
        assert not validate_report(report).run.stopped_early


def test_full_report_is_valid(report: dict[str, Any]) -> None:
    before = copy.deepcopy(report)
    validate_report(report)
    assert report == before, "validation changes nothing"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("data", None),
        ("run/tokens_seen", None),
        ("run/hardware", "one laptop"),
        ("run/hardware", None),
        ("run/command", None),
        ("run/optimizer/betas", (0.9, 0.999)),
        ("run/optimizer/foreach", True),
        ("run/wandb_id", "extra facts are welcome"),
        ("data/source", KeyError),
        ("run/method_label", "FooGrad"),
        ("run/method_paper", None),
        ("data/packing", "truncate and pad"),
        ("metrics", []),
        ("metrics/0/step", None),
        ("evaluations/0/limit", 0.1),
        ("evaluations/0/task_version", "2.0"),
    ],
)
def test_accepts(report: dict[str, Any], path: str, value: Any, tmp_path: Path) -> None:
    change(report, path, value)
    write_report(report, tmp_path / "report.json")
    assert read_report(tmp_path) == json.loads(json.dumps(report))


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("run", KeyError, "run is missing"),
        ("extra", 1, "extra is not a known field"),
        ("schema_version", "1", "schema_version: \"?'1'\"? is not 2"),
        ("run/method", KeyError, "run.method is missing"),
        ("run/tokens_seen", KeyError, "run.tokens_seen is missing"),
        ("run/tokens_seen", 1.5, "run.tokens_seen: 1.5 is not of type integer or null"),
        ("run/steps", "many", "run.steps: 'many' is not of type integer"),
        ("run/steps", -1, "run.steps: -1 is less than 0"),
        ("run/steps", True, "run.steps: True is not of type integer"),
        ("run/name", "  ", "run.name: '  ' is empty"),
        ("run/model/parameters", None, "run.model.parameters: None"),
        ("run/optimizer_state_bytes/measured", KeyError, "run.optimizer_state_bytes.measured is missing"),
        ("run/peak_memory_bytes", 12, "run.peak_memory_bytes: 12"),
        ("run/command/1", 3, r"run.command\[1\]: 3 is not of type string"),
        ("run/method_config", [], r"run.method_config: \[\]"),
        ("run/learning_rate", math.nan, "run.learning_rate: nan is not a finite number"),
        ("run/method_config/scale", math.inf, "run.method_config.scale: inf is not a finite number"),
        ("run/method_config/path", Path("x"), "run.method_config.path: .* which JSON does not have"),
        ("run/method_config", {1: 2}, "run.method_config: the key 1 is not a string"),
        ("data/name", KeyError, "data.name is missing"),
        ("data/source", "web", 'data.source: \'web\' is not "hub" or "local" or "embedded" or null'),
        ("data/sequence_length", 0, "data.sequence_length: 0 is less than 1"),
        ("metrics/1/value", "0.8", r"metrics\[1\].value: '0.8' is not of type number or null"),
        ("metrics/1/value", np.float32(0.8), r"metrics\[1\].value: .* is a float32, which JSON does not have"),
        ("metrics/1/stderr", -0.1, r"metrics\[1\].stderr: -0.1 is less than 0"),
        ("metrics/1/space", "sparse", r"metrics\[1\].space: 'sparse' is not \"native\""),
        ("metrics/1/unit", "nats", r"metrics\[1\].unit is not a known field; known: name, value"),
        ("metrics/1/settings", KeyError, r"metrics\[1\].settings is missing"),
        ("evaluations/0/task", 3, r"evaluations\[0\].task: 3"),
        ("evaluations/0/version", 3, r"evaluations\[0\].version is not a known field"),
    ],
)
def test_refuses_by_name_in_one_line(report: dict[str, Any], path: str, value: Any, named: str) -> None:
    change(report, path, value)
    with pytest.raises(ReportError, match=f"^here.json: {named}") as error:
        validate_report(report, where="here.json")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


def test_long_values_are_cut(report: dict[str, Any]) -> None:
    report["run"]["steps"] = "x\n" * 10_000
    with pytest.raises(ReportError, match=r"run\.steps: 'x.*\.\.\. is not of type integer$"):
        validate_report(report)


@pytest.mark.parametrize("report", [[], None, "x", 3])
def test_refuses_what_is_no_object(report: Any) -> None:
    with pytest.raises(ReportError, match=r"the report: .* is not of type object"):
        validate_report(report)


def test_refuses_newer_version_whatever_else_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"schema_version": SCHEMA_VERSION + 1, "new": True}))
    with pytest.raises(ReportError, match=rf"schema_version {SCHEMA_VERSION + 1} .* {SCHEMA_VERSION}, .*--upgrade"):
        read_report(path)


def test_round_trip(report: dict[str, Any], tmp_path: Path) -> None:
    publish = tmp_path / "run" / "publish"
    path = write_report(report, publish / "report.json")
    assert read_report(path) == read_report(publish) == read_report(tmp_path / "run") == report
    first = path.read_bytes()
    write_report(dict(reversed(report.items())), path)
    assert path.read_bytes() == first, "the order of keys must not matter"
    assert path.stat().st_mode & 0o077 == (tmp_path / "run").stat().st_mode & 0o066, "others read it as they may"


def test_tuples_are_written_as_arrays(report: dict[str, Any], tmp_path: Path) -> None:
    report["run"]["optimizer"]["betas"] = (0.9, 0.999)
    write_report(report, tmp_path / "report.json")
    assert read_report(tmp_path)["run"]["optimizer"]["betas"] == [0.9, 0.999]


@pytest.mark.parametrize("failing", ["invalid", "crash"])
def test_failed_write_leaves_the_old_file(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = write_report(report, tmp_path / "report.json")
    old = path.read_bytes()
    changed = copy.deepcopy(report)
    changed["run"]["name"] = "other"
    if failing == "invalid":
        changed["run"]["steps"] = None
    else:
        monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises((ReportError, OSError)):
        write_report(changed, path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path], "no temporary file is left"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b'{"schema_version": 1', b"[" * 100_000, b'{"schema_version": 1e400}'],
    ids=["empty", "cut", "not utf-8", "cut later", "deep", "infinite"],
)
def test_corrupt_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(ReportError, match=r"report\.json"):
        read_report(tmp_path)


def test_nan_in_a_file_is_refused(report: dict[str, Any], tmp_path: Path) -> None:
    report["metrics"][0]["value"] = math.nan
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(ReportError, match=r"metrics\[0\]\.value: nan is not a finite number"):
        read_report(tmp_path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="publish"):
        read_report(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        read_report(tmp_path / "nowhere")


def test_metric_entry(report: dict[str, Any]) -> None:
    entry = metric_entry("a/b/c", np.float32(0.5), stderr=np.float64(0.1), step=np.int64(3), space="dense")
    bad = metric_entry("a/b/c", math.inf, stderr=math.nan, step=3, settings={"k": 5})
    kept = metric_entry("a/b/c", math.nan, step=None, settings={"note": "diverged"})
    assert entry == {"name": "a/b/c", "value": 0.5, "stderr": 0.1, "step": 3, "settings": {}, "space": "dense"}
    assert (bad["value"], bad["stderr"], bad["settings"]) == (None, None, {"k": 5, "note": "not finite: inf"})
    assert kept["settings"] == {"note": "diverged"}
    told = {"settings": {"K": 2}, "reference": {"since": 3}, "about": {"total": 4}}
    new = metric_entry("a/b/c", math.nan, step=None, **told)
    assert {part: new[part] for part in told} == told | {"about": {"total": 4, "note": "not finite: nan"}}
    report["metrics"] = [entry, bad, kept, new]
    validate_report(report)


def test_import_is_light() -> None:
    # a bare package stands in for hf_lowrank, whose own import loads transformers and with it pandas
    code = """
import sys, types
package = types.ModuleType("hf_lowrank")
package.__path__ = [sys.argv[1]]
sys.modules["hf_lowrank"] = package
import hf_lowrank.report.io
hf_lowrank.report.io.read_report(sys.argv[2])
sys.exit(f"imported: {loaded}" if (loaded := {"matplotlib", "pandas", "torch"} & set(sys.modules)) else 0)
"""
    root = SCHEMA.parents[1]
    command = [sys.executable, "-c", code, str(root), str(FULL)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_checkpoint_is_not_called_unfinished_beside_its_own_run(report: dict[str, Any]) -> None:
    whole = validate_report(report)
    for checkpoint_of, said in (({"steps": 300}, {"Checkpoint"}), (None, {"Unfinished"})):
        earlier = validate_report(report | {"run": {**report["run"], "steps": 150, "checkpoint_of": checkpoint_of}})
        assert {difference.fact.title for difference in differences([whole, earlier])} == said
