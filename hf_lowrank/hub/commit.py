"""Pushing a folder as one commit of a model repository on the Hugging Face Hub.

A push compares the repository with the folder. One that failed half-way can therefore be repeated by calling it again,
and one that changes nothing makes no commit. `HfApi.upload_folder` is not used: with
`hf_xet` it splits a folder over several commits, and its `delete_patterns` cannot tell our files from other people's.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, get_token
from huggingface_hub.utils import validate_repo_id

from hf_lowrank.hub.network import FAILURES, TRIES, describe_error, status_of, with_retries
from hf_lowrank.hub.ownership import MARK, OverwriteError, State, deletable, objections, read_state
from hf_lowrank.report.secrets import TOKEN

__all__ = ["Hub", "OverwriteError", "PushError", "check_names", "commit_folder", "publish_folder", "push_folder"]

logger = logging.getLogger(__name__)

_REFUSED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.tmp", "*.partial", "*.lock", ".DS_Store")
"""Files that stay behind wherever they lie in `publish/`: training state, pickles, leftovers."""

_REFUSED_FOLDERS = {".git", ".cache", "__pycache__", ".ipynb_checkpoints"}
_TEXT = {".json", ".jsonl", ".md", ".py", ".txt", ".yaml", ".yml", ".jinja"}

T = TypeVar("T")


class PushError(OSError):
    """The Hub, or the way to it, failed; the message names the repository, what failed and the way out."""


def push_folder(
    run: str | Path,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    tag: str | None = None,
    overwrite: bool = False,
) -> CommitInfo:
    """Put `publish/` on the Hub in one commit, as it is.

    The repository and the branch are made if missing. Files that an earlier push wrote and that `publish/` no longer
    has are deleted in the same commit, unless it holds no weights at all; files of others stay. Where nothing differs
    there is no new commit. A commit that somebody else makes meanwhile stays: the push reads the repository again and
    builds on it. Short failures are tried again; a Hub that is silent for a minute has failed.

    Args:
        run: A run's folder, or its `publish/` folder itself. Nothing outside `publish/` is sent.
        repo_id: `user/name`, or `name` in the user's own namespace.
        revision: The branch; `main` by default. A missing one starts from `main`.
        private: Who may see a repository that this call creates; by default as the account is set up. A repository
            that is there already keeps what it has, and one that has the opposite is an error.
        token: As in `huggingface_hub`: None for the saved one, a string, or False for none.
        commit_message: The commit's title.
        tag: A tag to put on the published state, `step-1000` say; it is moved if it points elsewhere.
        overwrite: Push even if it replaces what somebody else, or another run, has put there.

    Returns:
        The new commit, or the branch's newest one if nothing differed. `oid` is its hash.

    Raises:
        FileNotFoundError: The folder is missing, has no `publish/`, or nothing is in it.
        ValueError: The repository id, the branch or the tag is not a valid name; `report.json` is not JSON; a file
            holds a Hub token or links out of the run; the repository's visibility is not what `private` asks for; the
            Hub refuses the card's metadata.
        OverwriteError: The repository was not written by this package, somebody changed a file that would be
            replaced, or it holds another run (see `hf_lowrank.hub.ownership`).
        PushError: The Hub refuses or fails, or cannot be reached; the client's error is its cause. Nothing is
            half-written, and another call continues where this one stopped.
    """
    folder = publish_folder(Path(run).expanduser())
    check_names(repo_id, revision, tag)
    return commit_folder(folder, Hub(repo_id, token), revision, private, commit_message, tag, None, overwrite)


def commit_folder(
    folder: Path, hub: Hub, revision: str | None, private: bool | None, message: str | None, tag: str | None,
    default_tag: str | None, overwrite: bool,
) -> CommitInfo:  # fmt: skip
    """Do what `push_folder` does, with names that were checked; `default_tag` yields to another branch's tag."""
    files = files_to_publish(folder, hub.token)
    home = folder.resolve()
    name = tag or default_tag
    title = f"Publish {home.parent.name if home.name == 'publish' else home.name}" + (f" at {name}" if name else "")

    api, repo_id = hub.api, hub.repo_id
    branch = revision or "main"
    repo_id = hub.asked(
        "the repository cannot be made", partial(api.create_repo, repo_id, private=private, exist_ok=True)
    ).repo_id
    if private is not None:
        _check_visibility(hub.asked("the repository cannot be read", api.model_info, repo_id), private)
    if branch != "main" and not branch.startswith("refs/"):
        hub.asked(f"the branch {branch} cannot be made", _make_branch, api, repo_id, branch)
    commit, there = _commit(hub, repo_id, branch, files, message or title, overwrite)
    if name is not None:
        moves = tag is not None or branch == "main"
        hub.asked(f"the tag {name} cannot be set", _put_tag, api, there, name, commit.oid, moves)
    return commit


class Hub:
    """Asks the Hub about one repository; errors name it."""

    def __init__(self, repo_id: str, token: str | bool | None) -> None:
        self.repo_id, self.token = repo_id, token
        self.api = HfApi(token=token, library_name="hf_lowrank", library_version=version("hf_lowrank"))

    def asked(self, failing: str, call: Callable[..., T], *arguments: Any) -> T:
        """Return `call(*arguments)`; a PushError says what is `failing`."""
        try:
            return with_retries(partial(call, *arguments))
        except FAILURES as error:
            secret = self.token if isinstance(self.token, str) else None
            raise PushError(f"{self.repo_id}: {failing}: {describe_error(error, secret)}") from error


def check_names(repo_id: str, revision: str | None, tag: str | None) -> None:
    """Refuse what the Hub would, before anything is sent. HFValidationError is a ValueError."""
    validate_repo_id(repo_id)
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ValueError(f"revision {revision} is a commit: give the branch to push to")
    for kind, name in (("revision", revision), ("tag", tag)):
        if name is not None and (not re.fullmatch(r"\w[\w./-]*", name, re.ASCII) or ".." in name):
            raise ValueError(f"{kind} {name!r} is not a name git takes: use letters, digits, '-', '_', '.' and '/'")
    if tag is not None and tag in ("main", revision):
        raise ValueError(f"tag {tag!r} is the name of a branch: choose another, such as step-1000")


def _check_visibility(there: ModelInfo, private: bool) -> None:
    if there.private != private:
        raise ValueError(
            f"{there.id} exists and is {'public' if private else 'private'}, not as private={private} asks: leave "
            "`private` out, or change the visibility in the repository's settings first"
        )


def _make_branch(api: HfApi, repo_id: str, branch: str) -> None:
    api.create_branch(repo_id, branch=branch, exist_ok=True)


def _commit(
    hub: Hub, repo_id: str, branch: str, files: dict[str, Path], message: str, overwrite: bool
) -> tuple[CommitInfo, State]:
    """Make `branch` hold `files` and no other files of ours, whatever somebody commits there meanwhile."""
    for _ in range(TRIES):
        there = hub.asked("the repository cannot be read", read_state, hub.api, repo_id, branch)
        problem = None if overwrite else hub.asked("the repository cannot be read", objections, hub.api, there, files)
        if problem is not None:
            raise OverwriteError(
                f"{repo_id} is not this run's alone, {problem}: choose another repository, or push all the same with "
                "`--yes` (in Python: overwrite=True), which replaces files of the same name, removes what earlier "
                "pushes left, and keeps other people's"
            )
        try:
            return hub.asked(
                "the files cannot be uploaded and committed", _send, hub.api, there, files, message
            ), there
        except PushError as error:
            if status_of(error) != 412:
                raise
            logger.info("somebody committed to %s meanwhile: looking again", repo_id)
    raise PushError(f"{repo_id}: others keep committing to {branch} (412): push again when they are done")


def _send(api: HfApi, there: State, files: dict[str, Path], message: str) -> CommitInfo:
    # a folder without weights holds what was measured of a published run: it adds to what is there
    whole = any(path.endswith(".safetensors") for path in files)
    gone = deletable(api, there, there.paths - set(files)) if whole else []
    with warnings.catch_warnings():
        # metrics/*.parquet are curves, not a data set that lost its way
        warnings.filterwarnings("ignore", message=".*about to commit a data file", category=UserWarning)
        return api.create_commit(
            there.repo_id,
            [
                *(CommitOperationDelete(path, is_folder=False) for path in gone),
                *(CommitOperationAdd(path, str(file)) for path, file in files.items()),
            ],
            commit_message=message,
            commit_description=f"{MARK} {version('hf_lowrank')}",
            revision=there.branch,
            # what may be replaced was decided on this state: the Hub refuses (412) if somebody pushed since
            parent_commit=there.head,
        )


def _put_tag(api: HfApi, there: State, tag: str, oid: str, moves: bool) -> None:
    """Point `tag` at the commit `oid`; a tag of another branch stays if it is unless it `moves`."""
    tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(there.repo_id).tags}
    if tag in tags and not moves and not _is_on_branch_alone(api, there, tags[tag], oid):
        logger.info("%s is another branch's: the tag is %s-%s", tag, there.branch, tag)
        tag = f"{there.branch}-{tag}"
    if tags.get(tag) == oid:
        return
    if tag in tags:
        api.delete_tag(there.repo_id, tag=tag)
    api.create_tag(there.repo_id, tag=tag, revision=oid)


def _is_on_branch_alone(api: HfApi, there: State, tagged: str, oid: str) -> bool:
    """Tell whether a tagged commit is the new one, or an older one of this branch that `main` does not have."""
    history = {commit.commit_id for commit in there.history}
    main = {commit.commit_id for commit in api.list_repo_commits(there.repo_id)}
    return tagged == oid or tagged in history - main


def publish_folder(run: Path) -> Path:
    """Return the folder to publish, given a run's folder or the publish folder itself."""
    if not run.is_dir():
        raise FileNotFoundError(f"no run at {run}: give the folder of a run (`output_dir`), or its publish/ folder")
    if (run / "publish").is_dir():
        return run / "publish"
    if run.resolve().name == "publish" or (run / "report.json").is_file():
        return run
    raise FileNotFoundError(
        f"{run} has no publish/ folder, so there is nothing to push: train with `lr.attach(trainer)` or with "
        "recipes/pretrain.py, which write it"
    )


def files_to_publish(folder: Path, token: str | bool | None) -> dict[str, Path]:
    """Return path in the repository -> file for everything in a publish folder that may be published.

    Raises:
        FileNotFoundError: Nothing is in it.
        ValueError: `report.json` is not JSON, or a file holds a Hub token or links out of the run.
    """
    files = dict(_files(folder))
    if not files:
        raise FileNotFoundError(f"{folder} holds nothing to publish: let the run write its report and weights first")
    _check_report(folder / "report.json")
    _check_tokens(files, token)
    return files


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    home = folder.resolve().parent
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        path = file.relative_to(folder)
        if _REFUSED_FOLDERS & set(path.parts):
            continue
        if any(fnmatch.fnmatch(file.name.lower(), pattern.lower()) for pattern in _REFUSED):
            logger.warning("not published: %s (training state, pickles and leftovers stay local)", path)
            continue
        if not file.resolve().is_relative_to(home):
            raise ValueError(f"{file} links to {file.resolve()}, outside of the run: put a copy in its place")
        yield path.as_posix(), file


def _check_report(report: Path) -> None:
    """A report cut short by a crash must not replace a good one."""
    if not report.is_file():
        return
    try:
        json.loads(report.read_bytes())
    except ValueError as error:
        raise ValueError(f"{report} is not JSON ({error}): write the report again before pushing") from error


def _check_tokens(files: dict[str, Path], token: str | bool | None) -> None:
    """Refuse texts that hold a Hub token: the one in use, or one by its looks. The message does not repeat it."""
    used = (token if isinstance(token, str) else get_token()) or ""
    for path, file in files.items():
        if file.suffix.lower() in _TEXT:
            content = file.read_text(encoding="utf-8", errors="replace")
            if TOKEN.search(content) or (used.startswith("hf_") and used in content):
                raise ValueError(f"{file} holds a Hub token: remove it, and revoke it if {path} was public before")
