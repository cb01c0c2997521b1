"""Comparing runs on the Hub, and the comparison as a Space, through the real client and the loopback hub."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from compared import report, write_run
from huggingface_hub import HfApi
from loopback_hub import Blob, LoopbackHub, Repo, front_matter

from hf_lowrank.cli import main
from hf_lowrank.hub.commit import PushError
from hf_lowrank.hub.listing import Listed, fetch_listed, published_runs
from hf_lowrank.hub.space import push_space, space_card
from hf_lowrank.report.io import metric_entry

SPACE = "user/comparison"
FILES = {"README.md": "---\nsdk: static\n---\ntext", "index.html": "<!doctype html>"}
CARD = b"---\ntags: [hf-lowrank]\n---\n"


def plant(hub: LoopbackHub, name: str, folder: Path, loss: float = 4.0, **facts: object) -> None:
    """Publish a run with the tag, with weights that nobody may download."""
    made = report(name.split("/")[1], loss=loss, **facts)
    publish = write_run(folder / "published" / name, made) / "publish"
    files = {path.relative_to(publish).as_posix(): path.read_bytes() for path in publish.rglob("*") if path.is_file()}
    hub.plant(name, {**files, "README.md": CARD, "model.safetensors": b"\0weights", "config.json": b"{}"})


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> Callable:
    """Calls `hf-lowrank compare` in a folder of its own, without figures, which take seconds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_lowrank.cli.compare.draw_comparison", lambda *args: [])

    def call(*argv: object) -> SimpleNamespace:
        capsys.readouterr()
        monkeypatch.setenv("COLUMNS", "160")
        monkeypatch.setattr(sys, "argv", ["hf-lowrank", "compare", *map(str, argv)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return call


# ---- the Space ----


def space(hub: LoopbackHub) -> Repo:
    return hub.repo(SPACE, "spaces")


def texts(repo: Repo) -> dict[str, str]:
    return {path: content.decode() for path, content in repo.files().items() if path != ".gitattributes"}


def test_a_space_is_made_and_written_in_one_commit(hub: LoopbackHub) -> None:
    assert push_space(FILES, SPACE) == f"{hub.endpoint}/spaces/{SPACE}"
    assert texts(space(hub)) == FILES
    assert [commit.title for commit in space(hub).head.history()] == ["Publish a comparison of runs", "initial commit"]
    assert "Pushed by hf_lowrank" in space(hub).head.message


def test_nothing_changed_no_commit_and_a_change_is_one(hub: LoopbackHub) -> None:
    push_space(FILES, SPACE)
    push_space(FILES, SPACE)
    assert hub.count("POST .*/commit/") == 1
    push_space({**FILES, "index.html": "new"}, SPACE)
    assert hub.count("POST .*/commit/") == 2
    assert texts(space(hub))["index.html"] == "new"


def by_hand(hub: LoopbackHub, files: dict[str, bytes]) -> None:
    repo = hub.repos.setdefault(("spaces", SPACE), Repo("spaces", SPACE))
    blobs = {path: Blob(content) for path, content in files.items()}
    repo.commit("main", {**repo.head.files, **blobs}, "by hand", author="somebody")


@pytest.mark.parametrize("ours_before", [False, True])
def test_a_space_of_somebody_else_is_overwritten_only_when_asked(hub: LoopbackHub, ours_before: bool) -> None:
    if ours_before:
        push_space(FILES, SPACE)
    by_hand(hub, {"index.html": b"theirs", "app.py": b"theirs"})
    before = space(hub).head
    with pytest.raises(ValueError, match=r"the Space user/comparison is not one that hf_lowrank made .*--yes"):
        push_space(FILES, SPACE)
    assert space(hub).head is before
    push_space(FILES, SPACE, overwrite=True)
    assert texts(space(hub)) == {**FILES, "app.py": "theirs"}


def test_files_beside_ours_do_not_matter(hub: LoopbackHub) -> None:
    push_space(FILES, SPACE)
    by_hand(hub, {"notes.md": b"theirs"})
    push_space({**FILES, "index.html": "new"}, SPACE)
    assert texts(space(hub))["notes.md"] == "theirs"


def test_a_push_in_between_and_a_failure_lose_nothing(hub: LoopbackHub) -> None:
    hub.fail("POST .*/commit/", status=500, times=20)
    with pytest.raises(PushError, match="user/comparison: the Space cannot be written: .*500"):
        push_space(FILES, SPACE)
    hub.faults.clear()
    push_space(FILES, SPACE)
    assert texts(space(hub)) == FILES
    hub.meanwhile("/preupload/", lambda: by_hand(hub, {"index.html": b"theirs"}))
    with pytest.raises(PushError, match="412"):
        push_space({**FILES, "index.html": "new"}, SPACE)
    assert texts(space(hub))["index.html"] == "theirs"


def test_a_hub_that_refuses_the_space_is_an_error(hub: LoopbackHub) -> None:
    with pytest.raises(PushError, match="other/page: the Space cannot be written: .*403"):
        push_space(FILES, "other/page")
    with pytest.raises(PushError, match="401"):
        push_space(FILES, SPACE, token=False)
    assert hub.repos == {}


def test_a_token_is_never_published(hub: LoopbackHub) -> None:
    token = "hf_" + "a1B2" * 9
    with pytest.raises(ValueError, match=r"index\.html holds a Hub token") as caught:
        push_space({**FILES, "index.html": token}, SPACE)
    assert token not in str(caught.value)
    assert hub.requests == []


def test_the_card_is_metadata_of_a_static_space() -> None:
    card = front_matter(space_card("2 runs", "body", ["user/a@step-3", "user/a", "user/b"]))
    assert (card["sdk"], card["models"]) == ("static", ["user/a", "user/b"])
    assert "hf-lowrank" in card["tags"]
    assert "models" not in front_matter(space_card("2 runs", "body", []))


# ---- what the Hub lists ----


def test_listed_runs_come_newest_first(hub: LoopbackHub, tmp_path: Path) -> None:
    for name in ("user/b", "user/c", "user/a"):
        plant(hub, name, tmp_path)
    hub.plant("user/untagged", {"README.md": b"nothing"})
    assert [one.repo_id for one in published_runs("hf-lowrank", 10)] == ["user/a", "user/c", "user/b"]
    assert [one.repo_id for one in published_runs("hf-lowrank", 2)] == ["user/a", "user/c"]
    with pytest.raises(ValueError, match="--limit 0"):
        published_runs("hf-lowrank", 0)


def test_of_a_listed_run_only_report_and_curves_are_downloaded(hub: LoopbackHub, tmp_path: Path) -> None:
    plant(hub, "user/a", tmp_path)
    folder, problems = fetch_listed(published_runs("hf-lowrank", 1)[0])
    assert problems == []
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {"report.json", "metrics/training.parquet", "metrics/landscape.parquet"}
    assert hub.count("safetensors") == 0


def test_sizes_beyond_reason_are_not_downloaded(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.plant("user/a", {"README.md": CARD, "report.json": b"{}" + b" " * 100, "metrics/x.parquet": b"\0" * 100})
    monkeypatch.setattr("hf_lowrank.hub.listing._LARGEST_CURVES", 99)
    folder, problems = fetch_listed(Listed("user/a", None))
    assert "its curves are left out: 100 bytes" in problems
    assert not (folder / "metrics").exists()
    monkeypatch.setattr("hf_lowrank.hub.listing._LARGEST_REPORT", 99)
    with pytest.raises(ValueError, match=r"report\.json has 102 bytes"):
        fetch_listed(Listed("user/a", None))


# ---- the command ----


def test_it_compares_folders_and_repositories_and_writes_everything(cli, hub: LoopbackHub, tmp_path: Path) -> None:
    plant(hub, "user/a", tmp_path, loss=4.0)
    HfApi().create_tag("user/a", tag="step-3")
    local = write_run(tmp_path / "runs" / "b", report("b", loss=3.0))
    done = cli("user/a", "user/a@step-3", local, local / "publish" / "report.json", "--sort", "H1", "--baseline", "b")
    assert (done.code, done.err) == (0, "")
    assert "is given twice and compared once" in done.out
    assert "NOT COMPARABLE" not in done.out
    output = tmp_path / "comparison"
    assert {path.name for path in output.iterdir()} == {"index.html", "comparison.md", "metrics.csv", "runs.csv"}
    table = pd.read_csv(output / "metrics.csv")
    assert list(dict.fromkeys(table["run"])) == ["b", "a (a)", "a (a@step-3)"]
    assert hub.count("safetensors") == 0


def test_what_cannot_be_read_is_skipped_with_its_reason(cli, hub: LoopbackHub, tmp_path: Path) -> None:
    local = write_run(tmp_path / "a", report("a"))
    (tmp_path / "empty").mkdir()
    newer = write_run(tmp_path / "newer", report("newer"))
    path = newer / "publish" / "report.json"
    path.write_text(path.read_text().replace('"schema_version": 2', '"schema_version": 9'))
    done = cli(local, tmp_path / "empty", newer, "user/none")
    assert done.code == 1
    assert "skipped" in done.out
    for reason in ("no report.json in", "schema_version 9 is newer", "no such repository"):
        assert reason in " ".join(done.out.split())
    assert (tmp_path / "comparison" / "index.html").is_file()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no run to compare: give run folders"),
        (["user/none"], "no run to compare: user/none"),
        (["RUN", "--baseline", "user/none"], "--baseline user/none"),
        (["RUN", "--baseline", "b"], "--baseline b"),
        (["RUN", "--sort", "nothing"], "no run has the metric 'nothing'"),
        (["RUN", "--push-to-space", "a/b/c"], "a/b/c"),
        (["RUN", "--output", "RUN/publish/report.json"], "is a file: give a folder"),
        (["--tag", "hf-lowrank"], "the Hub lists none under the tag hf-lowrank"),
        (["--tag", "hf-lowrank", "--limit", "0"], "--limit 0"),
    ],
)
def test_what_cannot_be_meant_is_one_line_and_exit_code_2(
    cli, hub: LoopbackHub, tmp_path: Path, argv, message
) -> None:
    run = write_run(tmp_path / "a", report("a"))
    done = cli(*(word.replace("RUN", str(run)) for word in argv))
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "comparison").exists()


def test_strangers_reports_under_the_tag_are_passed_over(cli, hub: LoopbackHub, tmp_path: Path) -> None:
    plant(hub, "user/good", tmp_path)
    (tmp_path / "user" / "good").mkdir(parents=True)  # of no account: the Hub's listing names repositories
    good = json.dumps(report("x")).encode()
    flood = report("flood")
    flood["metrics"] = [metric_entry("a/b/c", 1.0, step=1, settings={"i": i}) for i in range(3000)]
    strange = {
        "flood": {"report.json": json.dumps(flood).encode()},
        "missing": {},
        "no-json": {"report.json": b"\0\xff"},
        "newer": {"report.json": good.replace(b'"schema_version": 2', b'"schema_version": 3')},
        "invalid": {"report.json": b'{"schema_version": 1}'},
        "deep": {"report.json": b"[" * 100_000},
        "huge": {"report.json": good.replace(b'"tokens_seen": 1228800', b'"tokens_seen": ' + b"9" * 400)},
    }
    for name, files in strange.items():
        hub.plant(f"org/{name}", {"README.md": CARD, **files})
    hub.plant("org/broken-curves", {"README.md": CARD, "report.json": good, "metrics/training.parquet": b"PAR1\0"})
    done = cli("--tag", "hf-lowrank")
    assert (done.code, done.err) == (0, "")
    for name in strange:
        assert f"passed over org/{name}: " in done.out
    text = (tmp_path / "comparison" / "comparison.md").read_text()
    assert "curves in training.parquet are left out" in text
    assert list(dict.fromkeys(pd.read_csv(tmp_path / "comparison" / "metrics.csv")["run"])) == ["x", "good"]


def test_names_on_the_terminal_are_text(cli, tmp_path: Path) -> None:
    hostile = "[red]x[/red]\x1b[31m\n</script>"
    run = write_run(tmp_path / "a", report(hostile))
    done = cli(run, write_run(tmp_path / "b", report("b", tokens_seen=5)))
    assert "[red]x[/red] [31m </script>" in done.out
    assert "\x1b" not in done.out
    assert "NOT COMPARABLE" in done.out
    assert "Tokens seen" in done.out


def test_the_page_as_a_space_is_idempotent_and_asks_first(
    cli, hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(hub, "user/a", tmp_path)
    local = write_run(tmp_path / "b", report("b"))
    for _ in range(2):
        done = cli("user/a", local, "--push-to-space", SPACE)
        assert (done.code, done.err) == (0, "")
    assert f"{hub.endpoint}/spaces/{SPACE}" in done.out
    assert len(list(space(hub).head.history())) == 2
    assert texts(space(hub))["index.html"] == (tmp_path / "comparison" / "index.html").read_text()
    card = front_matter(texts(space(hub))["README.md"])
    assert (card["sdk"], card["models"]) == ("static", ["user/a"])
    by_hand(hub, {"index.html": b"theirs"})
    refused = cli("user/a", local, "--push-to-space", SPACE)
    assert refused.code == 2
    assert "--yes" in refused.err
    for answer, code in (("n", 1), ("y", 0)):
        terminal = io.StringIO(f"{answer}\n")
        terminal.isatty = lambda: True
        monkeypatch.setattr(sys, "stdin", terminal)
        assert cli("user/a", local, "--push-to-space", SPACE).code == code
        assert (texts(space(hub))["index.html"] == "theirs") == (answer == "n")
    by_hand(hub, {"index.html": b"theirs"})
    assert cli("user/a", local, "--push-to-space", SPACE, "--yes").code == 0
