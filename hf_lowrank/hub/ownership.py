"""Who owns a card, and a repository on the Hub: what may be replaced or deleted, and when somebody is asked first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import GitCommitInfo, HfApi, ModelInfo
from huggingface_hub.hf_api import RepoFile

__all__ = [
    "MARK", "OverwriteError", "State", "deletable", "is_edited", "objections", "read_state", "run_of", "signed",
]  # fmt: skip

MARK = "Pushed by hf_lowrank"
"""Begins the description of our commits."""

_SIGNATURE = "<!-- Written by hf_lowrank, SHA-256 of the text above: "


class OverwriteError(ValueError):
    """What somebody else, or another run, has written would be replaced; `overwrite=True` does it."""


def signed(card: str) -> str:
    """Return a card with a last line, which Markdown does not show, by which `is_edited` knows it as ours."""
    card = card.rstrip("\n")
    return f"{card}\n\n{_SIGNATURE}{hashlib.sha256(card.encode()).hexdigest()} -->\n"


def is_edited(card: Path) -> bool:
    """Tell whether a file holds a card that is not as this package wrote it, whatever report it was written from."""
    try:
        text = card.read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    # somebody's own text, whatever its encoding
    except ValueError:
        return True
    body = text.rpartition(_SIGNATURE)[0]
    return text.strip("\n") != signed(body).strip("\n")


@dataclass(frozen=True)
class State:
    """A branch as it was when it was read.

    Attributes:
        repo_id, branch, head: Where; `head` is the newest commit's hash.
        paths: Every file in it but `.gitattributes`, which the Hub itself writes.
        history: Its commits, newest first.
        untouched: It is a branch that holds nothing but what it got from `main`.
    """

    repo_id: str
    branch: str
    head: str
    paths: frozenset[str]
    history: tuple[GitCommitInfo, ...]
    untouched: bool

    @property
    def ours(self) -> set[str]:
        """The commits that a push of this package made."""
        return {commit.commit_id for commit in self.history if MARK in commit.message}


def read_state(api: HfApi, repo_id: str, branch: str) -> State:
    """Read what `branch` holds and who put it there."""
    info: ModelInfo = api.model_info(repo_id, revision=branch)
    history = tuple(api.list_repo_commits(repo_id, revision=branch))
    return State(
        repo_id=info.id,
        branch=branch,
        head=str(info.sha),
        paths=frozenset({sibling.rfilename for sibling in info.siblings or []} - {".gitattributes"}),
        history=history,
        untouched=branch != "main" and info.sha == api.model_info(repo_id).sha,
    )


def objections(api: HfApi, there: State, files: Mapping[str, Path]) -> str | None:
    """Say what a push of `files` would overwrite that is not this run's; None if nothing stands against it.

    A repository that no push of this package has written to belongs to somebody else. In one of ours, a file that
    somebody has changed since (a card edited on the Hub) is theirs, and a report of another run makes it that run's.
    On a branch that was made for this push nothing can be lost.
    """
    if not there.paths:
        return None
    if not there.ours:
        return f"it holds files that hf_lowrank did not push ({_some(there.paths)})"
    if there.untouched:
        return None
    changed = [
        info.path
        for info in _infos(api, there, there.paths & set(files))
        if not _is_ours(info, there) and not _same(info, files[info.path])
    ]
    if changed:
        return f"somebody else changed {_some(changed)} there"
    return _another_run(api, there, files)


def deletable(api: HfApi, there: State, paths: Iterable[str]) -> list[str]:
    """Return those of `paths` that were last written by a push of this package."""
    return [info.path for info in _infos(api, there, paths) if _is_ours(info, there)]


def _infos(api: HfApi, there: State, paths: Iterable[str]) -> Iterator[RepoFile]:
    wanted = sorted(paths)
    for start in range(0, len(wanted), 50):
        for info in api.get_paths_info(there.repo_id, wanted[start : start + 50], revision=there.head, expand=True):
            if isinstance(info, RepoFile):
                yield info


def _is_ours(info: RepoFile, there: State) -> bool:
    return info.last_commit is not None and info.last_commit.oid in there.ours


def _same(info: RepoFile, file: Path) -> bool:
    """Tell whether a file on the Hub has the content of a local one."""
    if info.size != file.stat().st_size:
        return False
    with file.open("rb") as content:
        if info.lfs is not None:
            return hashlib.file_digest(content, "sha256").hexdigest() == info.lfs.sha256
        blob = content.read()
    return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest() == info.blob_id


def _another_run(api: HfApi, there: State, files: Mapping[str, Path]) -> str | None:
    """Describe the run on the Hub if it has another name, method, model, seed or learning rate; else None."""
    if "report.json" not in files or "report.json" not in there.paths:
        return None
    mine = run_of(files["report.json"])
    # a copy in the cache may be a damaged one
    path = Path(api.hf_hub_download(there.repo_id, "report.json", revision=there.head, force_download=True))
    if not all(_same(info, path) for info in _infos(api, there, ["report.json"])):
        raise OSError("its report.json arrives damaged: push again later")
    theirs = run_of(path)
    if mine is None or theirs is None or mine == theirs:
        return None
    if mine[:2] == theirs[:2]:
        return f"it holds another run of the name {mine[0]!r}, with other settings"
    return f"it holds another run ({theirs[1]} {theirs[0]!r}, and this is {mine[1]} {mine[0]!r})"


def run_of(report: Path) -> tuple[str, str, str] | None:
    """Return name, method and settings of a report's run; None if the report does not say."""
    try:
        run = json.loads(report.read_bytes())["run"]
        settings = {key: run.get(key) for key in ("method_config", "model", "seeds", "learning_rate")}
        # reports from before the setting existed are of runs at one rate
        settings["method_config"] = {"other_lr_scale": 1.0, **(settings["method_config"] or {})}
        return str(run["name"]), str(run["method"]), json.dumps(settings, sort_keys=True)
    except (ValueError, KeyError, TypeError):
        return None


def _some(paths: Iterable[str]) -> str:
    names = sorted(paths)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
