"""The stand-in for the Hub answers the real client as the Hub does, and breaks as it is told to."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session
from loopback_hub import Blob, LoopbackHub

REPO = "user/model"
CARD = b"""---
library_name: transformers
tags: [low-rank]
model-index:
- name: tiny
  results:
  - task: {type: text-generation}
    dataset: {type: text, name: stdlib}
    metrics: [{type: perplexity, value: 40.5}]
---
# Tiny
"""


def status_of(call, *args, **kwargs) -> int:
    with pytest.raises(HfHubHTTPError) as caught:
        call(*args, **kwargs)
    return caught.value.response.status_code


def test_file_names_in_git_are_gits_own() -> None:
    assert Blob(b"Hello, World!").oid == "b45ef6fec89518d314f546fd6c3025367b721684"
    assert Blob(b"").oid == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert Blob(b"\0" * 5, lfs=True).pointer.endswith(b"\nsize 5\n")


def test_a_repository_through_the_client(hub: LoopbackHub) -> None:
    api = HfApi()
    assert api.whoami()["name"] == "user"
    assert api.create_repo("model").repo_id == REPO
    assert status_of(api.create_repo, REPO) == 409
    api.create_repo(REPO, exist_ok=True)

    weights = bytes(range(256)) * 100
    adds = [CommitOperationAdd("README.md", CARD), CommitOperationAdd("native/model.safetensors", weights)]
    commit = api.create_commit(REPO, adds, commit_message="first", commit_description="why")
    info = api.model_info(REPO, files_metadata=True)
    assert info.sha == commit.oid
    assert info.tags == ["transformers", "safetensors", "low-rank", "region:us"]
    assert info.card_data is not None
    assert info.card_data.eval_results[0].metric_value == 40.5
    files = {sibling.rfilename: sibling for sibling in info.siblings or []}
    assert set(files) == {".gitattributes", "README.md", "native/model.safetensors"}
    assert files["native/model.safetensors"].lfs is not None
    assert files["native/model.safetensors"].size == len(weights)
    assert {item.path for item in api.list_repo_tree(REPO)} == {".gitattributes", "README.md", "native"}
    assert [item.path for item in api.list_repo_tree(REPO, "native")] == ["native/model.safetensors"]
    assert [item.path for item in api.get_paths_info(REPO, ["native", "README.md", "none"])] == ["native", "README.md"]
    assert [(one.title, one.message) for one in api.list_repo_commits(REPO)] == [
        ("first", "why"),
        ("initial commit", ""),
    ]
    assert [model.id for model in api.list_models(filter="low-rank")] == [REPO]
    assert [model.id for model in api.list_models(filter=["low-rank", "other"])] == []
    assert api.model_info(REPO, expand=["sha"]).siblings is None
    assert Path(hf_hub_download(REPO, "native/model.safetensors")).read_bytes() == weights

    api.create_commit(REPO, [CommitOperationDelete("native/")], commit_message="delete")
    assert not api.file_exists(REPO, "native/model.safetensors")
    assert api.file_exists(REPO, "native/model.safetensors", revision=commit.oid[:10])
    api.delete_repo(REPO)
    assert not api.repo_exists(REPO)


def test_branches_and_tags(hub: LoopbackHub) -> None:
    api = HfApi()
    first = hub.plant(REPO, {"a": b"1"})
    api.create_tag(REPO, tag="v1")
    api.create_branch(REPO, branch="dev/x")
    api.create_commit(REPO, [CommitOperationAdd("a", b"2")], commit_message="two", revision="dev/x")
    refs = api.list_repo_refs(REPO)
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1": first.oid}
    assert {ref.name for ref in refs.branches} == {"main", "dev/x"}
    contents = {name: Path(hf_hub_download(REPO, "a", revision=name)).read_text() for name in ("v1", "main", "dev/x")}
    assert contents == {"v1": "1", "main": "1", "dev/x": "2"}
    assert status_of(api.create_tag, REPO, tag="v1") == 409
    api.delete_tag(REPO, tag="v1")
    api.delete_branch(REPO, branch="dev/x")
    assert status_of(api.delete_tag, REPO, tag="v1") == 404
    assert status_of(api.delete_branch, REPO, branch="main") == 403


def test_refusals_are_of_the_clients_types(hub: LoopbackHub) -> None:
    api = HfApi()
    first = hub.plant(REPO, {"a": b"1"})
    hub.plant(REPO, {"a": b"2"})
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("user/none")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("user/none", token=False)
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="none")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "none")
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, "none"))
    with pytest.raises(EntryNotFoundError, match="A file with this name doesn't exist"):
        api.create_commit(REPO, [CommitOperationDelete("none")], commit_message="delete")
    add = [CommitOperationAdd("b", b"3")]
    assert status_of(api.create_commit, REPO, add, commit_message="late", parent_commit=first.oid) == 412
    assert status_of(api.create_repo, "x", token=False) == 401
    assert status_of(api.create_repo, "somebody/x") == 403
    hub.repo(REPO).private = True
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download(REPO, "a", token=False)


def test_long_listings_come_in_pages(hub: LoopbackHub) -> None:
    hub.page_size = 3
    hub.plant(REPO, {f"file{index}": b"" for index in range(7)})
    assert len(list(HfApi().list_repo_tree(REPO))) == 8
    assert hub.count("/tree/") == 3


@pytest.mark.parametrize(
    ("asked", "status", "content", "given"),
    [
        ("bytes=2-4", 206, b"234", "bytes 2-4/10"),
        ("bytes=7-", 206, b"789", "bytes 7-9/10"),
        ("bytes=10-", 416, b"", "bytes */10"),
    ],
)
def test_ranges(hub: LoopbackHub, asked: str, status: int, content: bytes, given: str) -> None:
    hub.plant(REPO, {"a": b"0123456789"})
    answer = get_session().get(f"{hub.endpoint}/{REPO}/resolve/main/a", headers={"Range": asked})
    assert (answer.status_code, answer.content, answer.headers["Content-Range"]) == (status, content, given)


def test_faults_strike_as_often_as_told(hub: LoopbackHub) -> None:
    hub.plant(REPO, {"a": b"0123456789"})
    url = f"{hub.endpoint}/{REPO}/resolve/main/a"
    hub.fail("resolve", status=429, times=2, headers={"Retry-After": "7"})
    answers = [get_session().get(url) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [429, 429, 200]
    assert answers[0].headers["Retry-After"] == "7"
    hub.cut("resolve", after=4)
    with pytest.raises(Exception, match="received 4 bytes, expected 10"):
        get_session().get(url)
    hub.stall("resolve", seconds=0.2)
    start = time.monotonic()
    assert get_session().get(url).content == b"0123456789"
    assert time.monotonic() - start >= 0.2


def test_environment_is_all_a_subprocess_needs(hub: LoopbackHub) -> None:
    hub.plant(REPO, {"config.json": b"{}"})
    hub.repo(REPO).private = True
    script = "import sys; from huggingface_hub import snapshot_download; print(snapshot_download(sys.argv[1]))"

    def snapshot(**changes: str | None) -> str:
        command = [sys.executable, "-c", script, REPO]
        environment = hub.environment(**changes)
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    online = snapshot()
    assert Path(online, "config.json").read_bytes() == b"{}"
    assert snapshot(HF_HUB_OFFLINE="1", HF_TOKEN=None) == online == snapshot_download(REPO)
