"""Publishing through the real client and the loopback hub: what goes up, what is deleted, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from loopback_hub import LoopbackHub

from hf_lowrank.hub.network import status_of
from hf_lowrank.hub.push import OverwriteError, PushError, push_folder

REPO = "user/tiny"
CARD = "---\nlibrary_name: transformers\nlicense: apache-2.0\ntags: [low-rank]\n---\n# tiny\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run as the Trainer leaves it: what is published, and what must stay."""
    files = {
        "publish/README.md": CARD.encode(),
        "publish/report.json": json.dumps({"schema_version": 1}).encode(),
        "publish/config.json": b"{}",
        "publish/model.safetensors": bytes(range(256)) * 400,
        "publish/native/model.safetensors": bytes(range(256)) * 300,
        "publish/metrics/spectral.parquet": b"PAR1\0\1\2PAR1",
        "publish/figures/old.png": b"\x89PNG\r\n\x1a\n\0\0old",
        "publish/figures/kept.png": b"\x89PNG\r\n\x1a\n\0\0kept",
        "checkpoint-10/optimizer.pt": b"secret",
        "publish/.report.json.1234.tmp": b"killed in mid-write",
        "training_args.bin": b"secret",
    }
    for path, content in files.items():
        (tmp_path / "run" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / path).write_bytes(content)
    return tmp_path / "run"


def published(run: Path) -> dict[str, bytes]:
    """What of the run should be on the Hub."""
    folder = run / "publish"
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {path: content for path, content in files.items() if not path.endswith(".tmp")}


def without_gitattributes(files: dict[str, bytes]) -> dict[str, bytes]:
    return {path: content for path, content in files.items() if path != ".gitattributes"}


@pytest.mark.filterwarnings("error::UserWarning")
def test_one_commit_holds_publish_byte_for_byte_and_nothing_else(hub: LoopbackHub, run: Path) -> None:
    commit = push_folder(run, REPO)

    repo = hub.repo(REPO)
    assert without_gitattributes(repo.files()) == published(run)
    assert [one.title for one in repo.head.history()] == ["Publish run", "initial commit"]
    assert commit.oid == repo.head.oid
    lfs = {path for path, blob in repo.head.files.items() if blob.lfs}
    assert lfs == {path for path in published(run) if path.endswith((".safetensors", ".parquet", ".png"))}
    assert HfApi().model_info(REPO).tags == [
        "transformers",
        "safetensors",
        "low-rank",
        "license:apache-2.0",
        "region:us",
    ]


@pytest.mark.parametrize("inside", ["", "publish"])
def test_takes_the_run_or_its_publish_folder_with_the_same_result(hub: LoopbackHub, run: Path, inside: str) -> None:
    push_folder(run / inside, REPO)
    assert without_gitattributes(hub.repo(REPO).files()) == published(run)
    assert hub.repo(REPO).head.title == "Publish run"


def test_a_second_push_makes_no_commit(hub: LoopbackHub, run: Path) -> None:
    first = push_folder(run, REPO)
    second = push_folder(run, REPO)
    assert second.oid == first.oid == hub.repo(REPO).head.oid
    assert hub.count("/commit/") == 1


def test_a_changed_file_makes_one_commit_and_sends_only_that(hub: LoopbackHub, run: Path) -> None:
    first = push_folder(run, REPO)
    uploads = hub.count("^PUT /lfs/")
    (run / "publish/config.json").write_text('{"changed": true}')
    second = push_folder(run, REPO, commit_message="step 20")

    head = hub.repo(REPO).head
    assert head.parent is not None
    assert (second.oid, first.oid) == (head.oid, head.parent.oid)
    assert head.title == "step 20"
    assert {path for path in head.files if head.last_touch(path) is head} == {"config.json"}
    assert hub.count("^PUT /lfs/") == uploads


def test_our_removed_files_go_and_other_peoples_stay(hub: LoopbackHub, run: Path) -> None:
    push_folder(run, REPO)
    hub.plant(REPO, {"LICENSE": b"text", "figures/theirs.png": b"\0theirs", "figures/old.png": b"\0redrawn by hand"})
    (run / "publish/figures/old.png").unlink()
    (run / "publish/figures/kept.png").unlink()
    (run / "publish/native/model.safetensors").unlink()
    before = hub.count("/commit/")
    push_folder(run, REPO)

    files = hub.repo(REPO).files()
    assert {"figures/kept.png", "native/model.safetensors"}.isdisjoint(files)
    assert files["LICENSE"] == b"text"
    assert files["figures/theirs.png"] == b"\0theirs"
    assert files["figures/old.png"] == b"\0redrawn by hand", "the last who wrote it was not this package"
    assert ".gitattributes" in files
    assert hub.count("/commit/") == before + 1, "deletions and additions are one commit"


def test_a_tag_is_made_left_alone_and_moved(hub: LoopbackHub, run: Path) -> None:
    first = push_folder(run, REPO, tag="step-10")
    assert hub.repo(REPO).tags["step-10"].oid == first.oid
    assert hub.repo(REPO).head.title == "Publish run at step-10"

    push_folder(run, REPO, tag="step-10")
    assert hub.count("^DELETE .*/tag/") == 0

    (run / "publish/config.json").write_text('{"step": 20}')
    second = push_folder(run, REPO, tag="step-10")
    push_folder(run, REPO, tag="step-20")
    assert {name: commit.oid for name, commit in hub.repo(REPO).tags.items()} == {
        "step-10": second.oid,
        "step-20": second.oid,
    }


def test_a_revision_is_a_branch_and_leaves_main_alone(hub: LoopbackHub, run: Path) -> None:
    push_folder(run, REPO, revision="seeds/1")
    push_folder(run, REPO, revision="seeds/1")
    repo = hub.repo(REPO)
    assert set(repo.files("main")) == {".gitattributes"}
    assert without_gitattributes(repo.files("seeds/1")) == published(run)
    assert hub.count("/commit/seeds/1") == 1


def test_private_is_for_creation_and_never_silently_ignored(hub: LoopbackHub, run: Path) -> None:
    push_folder(run, REPO, private=True)
    assert hub.repo(REPO).private
    push_folder(run, REPO)
    assert hub.repo(REPO).private
    with pytest.raises(ValueError, match="user/tiny exists and is private, not as private=False asks"):
        push_folder(run, REPO, private=False)


def test_training_state_and_leftovers_inside_publish_stay(
    hub: LoopbackHub, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = published(run)
    for path in ("optimizer.pt", "native/training_args.bin", "rng_state_0.pth", ".cache/x.json", "Model.CKPT"):
        (run / "publish" / path).parent.mkdir(exist_ok=True)
        (run / "publish" / path).write_bytes(b"secret")
    push_folder(run, REPO)
    assert without_gitattributes(hub.repo(REPO).files()) == before
    assert "native/training_args.bin" in caplog.text


# ---- refused before anything is sent ----


def bare(run: Path) -> None:
    for path in sorted(run.rglob("publish/**/*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


CASES: dict[str, tuple[Callable[[Path], object], dict[str, object], type[Exception], str]] = {
    "no run": (lambda run: run.rename(run.with_name("moved")), {}, FileNotFoundError, "no run at .*/run"),
    "no publish": (lambda run: (run / "publish").rename(run / "p"), {}, FileNotFoundError, r"lr\.attach\(trainer\)"),
    "nothing to publish": (bare, {}, FileNotFoundError, "holds nothing to publish"),
    "repository id": (lambda run: None, {"repo_id": "a/b/c"}, ValueError, "'a/b/c'"),
    "commit as branch": (lambda run: None, {"revision": "0" * 40}, ValueError, "give the branch"),
    "tag": (lambda run: None, {"tag": "step 10"}, ValueError, "tag 'step 10' is not a name git takes"),
    "tag is branch": (lambda run: None, {"tag": "main"}, ValueError, "tag 'main' is the name of a branch"),
    "report cut short": (
        lambda run: (run / "publish/report.json").write_text('{"metrics": ['),
        {},
        ValueError,
        r"report\.json is not JSON",
    ),
    "link out of the run": (
        lambda run: (run / "publish/passwd.txt").symlink_to("/etc/passwd"),
        {},
        ValueError,
        "outside of the run",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refuses_in_one_line_before_any_request(hub: LoopbackHub, run: Path, case: str) -> None:
    spoil, arguments, error, message = CASES[case]
    spoil(run)
    with pytest.raises(error, match=message) as caught:
        push_folder(run, **({"repo_id": REPO} | arguments))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert hub.requests == []


@pytest.mark.parametrize("token", ["hf_loopback", "hf_" + "a1B2" * 9])
def test_refuses_a_text_that_holds_a_token_without_repeating_it(hub: LoopbackHub, run: Path, token: str) -> None:
    (run / "publish/config.json").write_text(json.dumps({"hub_token": token}))
    with pytest.raises(ValueError, match=r"config\.json holds a Hub token") as caught:
        push_folder(run, REPO)
    assert token not in str(caught.value)
    assert hub.requests == []


def test_refuses_a_card_that_the_hub_would_not_take(hub: LoopbackHub, run: Path) -> None:
    (run / "publish/README.md").write_text("---\nmodel-index:\n- results: []\n---\n")
    with pytest.raises(ValueError, match=r'"model-index\[\]\.name" is required'):
        push_folder(run, REPO)
    assert set(hub.repo(REPO).files()) == {".gitattributes"}


# ---- what the Hub refuses; tests/hub/test_faults.py has what fails ----


@pytest.mark.parametrize(("token", "message"), [(False, "Invalid username"), ("hf_other", "Invalid credentials")])
def test_a_401_says_how_to_log_in_and_names_no_token(
    hub: LoopbackHub, run: Path, token: str | bool, message: str
) -> None:
    with pytest.raises(PushError, match=f"user/tiny: .* 401 .*{message}.*`hf auth login`") as caught:
        push_folder(run, REPO, token=token)
    assert status_of(caught.value) == 401
    assert "hf_" not in str(caught.value)
    assert hub.repos == {}


def test_another_users_namespace_is_a_403(hub: LoopbackHub, run: Path) -> None:
    with pytest.raises(PushError, match="rights to write to other/tiny") as caught:
        push_folder(run, "other/tiny")
    assert status_of(caught.value) == 403


# ---- other people's work ----


def other_run(run: Path, name: str, method: str = "galore") -> None:
    (run / "publish/report.json").write_text(json.dumps({"run": {"name": name, "method": method}}))


def test_a_commit_in_between_stays(hub: LoopbackHub, run: Path) -> None:
    push_folder(run, REPO)
    (run / "publish/config.json").write_text('{"changed": true}')
    hub.meanwhile("/preupload/", lambda: hub.plant(REPO, {"LICENSE": b"text"}))
    push_folder(run, REPO)
    assert hub.count("/commit/", status=412) == 1
    assert hub.repo(REPO).files()["config.json"] == b'{"changed": true}'
    assert hub.repo(REPO).files()["LICENSE"] == b"text"
    titles = [one.title for one in hub.repo(REPO).head.history()]
    assert titles == ["Publish run", "by hand", "Publish run", "initial commit"]


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_card_edited_on_the_hub_is_not_overwritten_unasked(hub: LoopbackHub, run: Path, when: str) -> None:
    push_folder(run, REPO)
    (run / "publish/config.json").write_text('{"changed": true}')
    by_hand = CARD.encode() + b"read me\n"
    if when == "before":
        hub.plant(REPO, {"README.md": by_hand})
    else:
        hub.meanwhile("/preupload/", lambda: hub.plant(REPO, {"README.md": by_hand}))
    with pytest.raises(OverwriteError, match=r"user/tiny .*somebody else changed README\.md .*`--yes`") as caught:
        push_folder(run, REPO)
    assert "\n" not in str(caught.value)
    assert hub.repo(REPO).files()["README.md"] == by_hand
    assert hub.repo(REPO).files()["config.json"] == b"{}"

    push_folder(run, REPO, overwrite=True)
    assert without_gitattributes(hub.repo(REPO).files()) == published(run)
    push_folder(run, REPO)


def test_an_edit_that_the_run_has_too_is_no_question(hub: LoopbackHub, run: Path) -> None:
    push_folder(run, REPO)
    by_hand = {"README.md": CARD.encode() + b"read me\n", "model.safetensors": b"\0" + bytes(9)}
    hub.plant(REPO, by_hand)
    for path, content in by_hand.items():
        (run / "publish" / path).write_bytes(content)
    push_folder(run, REPO)
    assert hub.repo(REPO).head.title == "by hand"


def test_somebody_elses_repository_is_asked_for(hub: LoopbackHub, run: Path) -> None:
    hub.plant(REPO, {"pytorch_model.bin": b"\0theirs", "README.md": b"# theirs"})
    with pytest.raises(OverwriteError, match=r"hf_lowrank did not push \(README\.md, pytorch_model\.bin\)"):
        push_folder(run, REPO)
    with pytest.raises(OverwriteError, match="did not push"):
        push_folder(run, REPO, revision="trial")
    assert hub.count("^PUT /lfs/|/commit/") == 0

    push_folder(run, REPO, overwrite=True)
    files = hub.repo(REPO).files()
    assert files.pop("pytorch_model.bin") == b"\0theirs"
    assert without_gitattributes(files) == published(run)


def test_another_run_is_asked_for_except_on_a_branch_of_its_own(hub: LoopbackHub, run: Path) -> None:
    other_run(run, "first")
    first = push_folder(run, REPO)
    other_run(run, "second", "sltrain")
    with pytest.raises(OverwriteError, match=r"another run \(galore 'first', and this is sltrain 'second'\)"):
        push_folder(run, REPO)
    push_folder(run, REPO, revision="second")
    other_run(run, "third")
    with pytest.raises(OverwriteError, match="another run"):
        push_folder(run, REPO, revision="second")
    assert hub.repo(REPO).head.oid == first.oid
    push_folder(run, REPO, overwrite=True)
    assert b"third" in hub.repo(REPO).files()["report.json"]


def test_another_run_of_the_same_name_is_asked_for(hub: LoopbackHub, run: Path) -> None:
    other_run(run, "one")
    push_folder(run, REPO)
    report = json.loads((run / "publish" / "report.json").read_text())
    report["run"]["seeds"] = {"seed": 7, "data_seed": None}
    (run / "publish" / "report.json").write_text(json.dumps(report))
    with pytest.raises(OverwriteError, match="another run of the name 'one', with other settings"):
        push_folder(run, REPO)


def test_what_was_measured_of_a_published_run_joins_its_weights(hub: LoopbackHub, run: Path, tmp_path: Path) -> None:
    push_folder(run, REPO)
    before = without_gitattributes(hub.repo(REPO).files())
    measured = tmp_path / "measured" / "publish"
    measured.mkdir(parents=True)
    (measured / "report.json").write_bytes((run / "publish" / "report.json").read_bytes())
    (measured / "README.md").write_text(CARD + "measured\n")
    push_folder(measured, REPO)
    assert without_gitattributes(hub.repo(REPO).files()) == {**before, "README.md": (CARD + "measured\n").encode()}


# ---- read back by others ----


def test_plain_transformers_reads_it_back_with_identical_logits(hub: LoopbackHub, tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).eval()
    model.save_pretrained(tmp_path / "publish")
    push_folder(tmp_path / "publish", REPO)

    assert AutoConfig.from_pretrained(REPO).hidden_size == 16
    loaded = AutoModelForCausalLM.from_pretrained(REPO).eval()
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
