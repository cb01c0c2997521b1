"""Fetching: local folders as they are, repositories through the real client and the loopback hub."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants
from loopback_hub import LoopbackHub

from hf_lowrank.hub import network
from hf_lowrank.hub.fetch import FetchError, fetch

REPO = "user/tiny"
FILES = {
    "README.md": b"# tiny",
    "report.json": b"{}",
    "model.safetensors": b"\0weights",
    "native/model.safetensors": b"\0native",
    "metrics/spectral.parquet": b"\0rows",
    "figures/a.png": b"\0image",
    "tokenizer.model": b"\0pieces",
    "merges.txt": b"a b",
    "chat_template.jinja": b"{{ messages }}",
    "modeling_cola.py": b"# for trust_remote_code",
}


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- local ----


def test_a_run_resolves_to_publish_and_other_folders_to_themselves(tmp_path: Path) -> None:
    (tmp_path / "run/publish").mkdir(parents=True)
    (tmp_path / "run/checkpoint-10").mkdir()
    assert fetch(tmp_path / "run") == tmp_path / "run/publish"
    assert fetch(str(tmp_path / "run/publish")) == tmp_path / "run/publish"
    assert fetch(tmp_path / "run/checkpoint-10") == tmp_path / "run/checkpoint-10"


def test_a_local_folder_comes_before_a_repository_of_its_name(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.plant(REPO, FILES)
    monkeypatch.chdir(tmp_path)
    (tmp_path / REPO).mkdir(parents=True)
    assert fetch(REPO).resolve() == tmp_path / REPO
    with pytest.raises(ValueError, match="revision='step-10' is for Hub repositories"):
        fetch(REPO, revision="step-10")
    assert hub.requests == []


@pytest.mark.parametrize("source", ["./missing/run", "../missing", "/missing/run", "~/missing/run", Path("a/b")])
def test_a_missing_path_is_named_and_not_asked_of_the_hub(hub: LoopbackHub, source: str | Path) -> None:
    with pytest.raises(FileNotFoundError, match=Path(source).name):
        fetch(source)
    assert hub.requests == []


def test_a_file_and_a_name_that_is_nothing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(NotADirectoryError, match=r"report\.json is a file"):
        fetch(tmp_path / "report.json")
    with pytest.raises(ValueError, match="'runs/a/b' is neither a local folder nor a Hub repository"):
        fetch("runs/a/b")
    with pytest.raises(ValueError, match="two revisions for user/tiny"):
        fetch("user/tiny@step-10", revision="step-20")


# ---- from the Hub ----


def test_downloads_all_but_pickles_and_unknown_kinds(hub: LoopbackHub) -> None:
    others = {"pytorch_model.bin": b"\0", "optimizer.pt": b"\0", "x/y.pkl": b"\0", "run.sh": b"#!/bin/sh"}
    others |= dict.fromkeys(("modeling_own.py", "x/modeling_cola.py", "a_modeling_cola.py", "x.py"), b"import os")
    hub.plant(REPO, FILES | others)
    assert files_in(fetch(REPO)) == FILES
    assert fetch(REPO).is_relative_to(hub.home)
    assert hub.count(r"\.(bin|pt|pkl|sh)$") == 0
    assert hub.count(r"\.py$") == hub.count(r"/modeling_cola\.py$") > 0


def test_patterns_narrow_the_download_but_never_admit_pickles(hub: LoopbackHub) -> None:
    hub.plant(REPO, FILES | {"pytorch_model.bin": b"\0"})
    assert files_in(fetch(REPO, allow_patterns=["report.json", "*.bin"])) == {"report.json": b"{}"}


def test_a_revision_gives_the_content_of_that_time(hub: LoopbackHub) -> None:
    first = hub.plant(REPO, {"report.json": b'{"step": 10}'})
    HfApi().create_tag(REPO, tag="step-10")
    hub.plant(REPO, {"report.json": b'{"step": 20}'})
    for source, revision in ((REPO, "step-10"), (f"{REPO}@step-10", None), (REPO, first.oid)):
        assert (fetch(source, revision=revision) / "report.json").read_bytes() == b'{"step": 10}'
    assert (fetch(REPO) / "report.json").read_bytes() == b'{"step": 20}'


def test_a_private_repository_needs_the_token(hub: LoopbackHub) -> None:
    hub.plant(REPO, FILES)
    hub.repo(REPO).private = True
    with pytest.raises(FetchError, match=r"user/tiny at revision 'main': no such repository .*`hf auth login`"):
        fetch(REPO, token=False)
    with pytest.raises(FetchError, match="the Hub refuses the token") as caught:
        fetch(REPO, token="hf_other")
    assert "hf_other" not in str(caught.value)
    assert files_in(fetch(REPO)) == FILES


def test_a_missing_repository_or_revision_is_named_with_the_way_out(hub: LoopbackHub) -> None:
    with pytest.raises(FetchError, match="user/none at revision 'main': no such repository"):
        fetch("user/none")
    hub.plant(REPO, FILES)
    HfApi().create_tag(REPO, tag="step-10")
    with pytest.raises(FetchError, match="user/tiny at revision 'step-11' does not exist: it has main, step-10") as e:
        fetch(f"{REPO}@step-11")
    assert isinstance(e.value, OSError)


def test_offline_uses_the_cache(hub: LoopbackHub, go_offline: Callable[[], None]) -> None:
    hub.plant(REPO, FILES)
    HfApi().create_tag(REPO, tag="step-10")
    online = fetch(REPO, revision="step-10")
    hub.requests.clear()
    go_offline()
    assert fetch(REPO, revision="step-10") == online
    assert files_in(online) == FILES
    assert hub.requests == []


def test_offline_without_the_cache_says_so(hub: LoopbackHub, go_offline: Callable[[], None]) -> None:
    hub.plant(REPO, FILES)
    go_offline()
    with pytest.raises(FetchError, match=r"user/other at revision 'main' .* HF_HUB_OFFLINE=1 is set: go online once"):
        fetch("user/other")


def test_offline_half_a_snapshot_is_not_taken_for_a_whole(hub: LoopbackHub, go_offline: Callable[[], None]) -> None:
    hub.plant(REPO, FILES)
    fetch(REPO, allow_patterns=["report.json"])
    go_offline()
    with pytest.raises(FetchError, match="user/tiny at revision 'main' is not complete in the cache"):
        fetch(REPO)


def test_a_hub_that_is_down_is_told_from_one_that_is_away(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "FIRST_WAIT", 0.0)
    hub.fail("/api/models/user/tiny", status=503, times=100)
    with pytest.raises(FetchError, match="the Hub answers 503"):
        fetch(REPO)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FetchError, match="the Hub cannot be reached"):
        fetch(REPO)


def test_a_download_cut_short_ends_whole(hub: LoopbackHub) -> None:
    weights = bytes(range(256)) * 1000
    hub.plant(REPO, {"model.safetensors": weights})
    hub.cut(r"^GET .*/model\.safetensors", after=100_000)
    assert files_in(fetch(REPO)) == {"model.safetensors": weights}
    assert hub.count(r"^GET .*/model\.safetensors") == 2


@pytest.mark.parametrize("name", ["../../x.json", "a/../../../x.json", "/etc/x.json", "C:\\x.json", "..\\..\\x.json"])
def test_a_file_name_cannot_leave_the_cache(hub: LoopbackHub, name: str) -> None:
    hub.plant(REPO, {"config.json": b"{}", name: b'"planted"'})
    # older clients refuse only what is dangerous on this system, and defuse the rest
    refusal = pytest.raises(FetchError, match="user/tiny at revision 'main' has a file that would leave the cache")
    with refusal if "../" in name else contextlib.suppress(FetchError):
        fetch(REPO)
    folder = hub.home.parent
    outside = [path for path in folder.rglob("*x.json") if not path.is_relative_to(hub.home / "hub")]
    assert outside == []
    assert not Path("/etc/x.json").exists()
