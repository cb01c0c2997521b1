"""Publishing a run: its `publish/` folder becomes one commit of a model repository on the Hugging Face Hub.

What a push does to the repository is decided by comparing it with `publish/`, so a push that failed half-way is
repeated by calling it again, and one that changes nothing makes no commit. `HfApi.upload_folder` is not used: with
`hf_xet` it splits a folder over several commits, and its `delete_patterns` cannot tell our files from other people's.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import re
import warnings
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, get_token
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from hf_lowrank.hub.card import write_card
from hf_lowrank.report import read_report

__all__ = ["publish_folder", "push", "push_folder"]

logger = logging.getLogger(__name__)

MARK = "Pushed by hf_lowrank"
"""Begins the description of our commits. A later push deletes only files whose last commit carries it."""

REFUSED = (
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.pkl",
    "*.pickle",
    "*.safetensors.tmp",
    "*.partial",
    "*.lock",
    ".DS_Store",
)
"""Files that stay behind wherever they lie in `publish/`: training state, pickles, leftovers."""

REFUSED_FOLDERS = {".git", ".cache", "__pycache__", ".ipynb_checkpoints"}
TEXT = {".json", ".jsonl", ".md", ".py", ".txt", ".yaml", ".yml", ".jinja"}
TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b")


def push(
    run: str | Path,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    tag: str | None = None,
) -> CommitInfo:
    """Publish a run on the Hub in one commit, its card written anew for this repository.

    Args:
        run: A run's folder, or its `publish/` folder itself. Nothing outside `publish/` is sent.
        repo_id: `user/name`, or `name` in the user's own namespace.
        revision, private, token, commit_message: As for `push_folder`.
        tag: A tag to put on the published state; by default `step-<n>`, n being the report's step.

    Raises:
        hf_lowrank.report.ReportError: The run's report is missing a field, is not JSON, or is newer than this version.
        As `push_folder` otherwise.
    """
    folder = publish_folder(Path(run).expanduser())
    _check_names(repo_id, revision, tag)
    steps = read_report(folder)["run"]["steps"]
    write_card(folder, repo_id=repo_id)
    return push_folder(
        folder,
        repo_id,
        revision=revision,
        private=private,
        token=token,
        commit_message=commit_message,
        tag=tag or f"step-{steps}",
    )


def push_folder(
    run: str | Path,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    tag: str | None = None,
) -> CommitInfo:
    """Put `publish/` on the Hub in one commit, as it lies there.

    The repository and the branch are made if missing. Files that an earlier push wrote and that `publish/` no longer
    has are deleted in the same commit; files of others stay. Where nothing differs there is no new commit.

    Args:
        run: A run's folder, or its `publish/` folder itself. Nothing outside `publish/` is sent.
        repo_id: `user/name`, or `name` in the user's own namespace.
        revision: The branch; `main` by default. A missing one starts from `main`.
        private: Who may see a repository that this call creates; by default as the account is set up. A repository
            that is there already keeps what it has, and one that has the opposite is an error.
        token: As in `huggingface_hub`: None for the saved one, a string, or False for none.
        commit_message: The commit's title.
        tag: A tag to put on the published state, `step-1000` say; it is moved if it points elsewhere.

    Returns:
        The new commit, or the branch's newest one if nothing differed. `oid` is its hash.

    Raises:
        FileNotFoundError: The folder is missing, has no `publish/`, or nothing is in it.
        ValueError: The repository id, the branch or the tag is not a valid name; `report.json` is not JSON; a file
            holds a Hub token or links out of the run; the repository's visibility is not what `private` asks for; the
            Hub refuses the card's metadata.
        huggingface_hub.errors.HfHubHTTPError: The Hub refuses: 401 without a token, 403 without the right to write,
            412 when another push came in between. For a large file it is the cause of a RuntimeError. Calling again
            is always safe.
    """
    folder = publish_folder(Path(run).expanduser())
    _check_names(repo_id, revision, tag)
    files = dict(_files(folder))
    if not files:
        raise FileNotFoundError(f"{folder} holds nothing to publish: let the run write its report and weights first")
    _check_report(folder / "report.json")
    _check_tokens(files, token)

    api = HfApi(token=token, library_name="hf_lowrank", library_version=version("hf_lowrank"))
    branch = revision or "main"
    there = _repository(api, repo_id, private, branch)
    home = folder.resolve()
    title = f"Publish {home.parent.name if home.name == 'publish' else home.name}" + (f" at {tag}" if tag else "")
    commit = _commit(api, there, branch, files, commit_message or title)
    if tag is not None:
        _put_tag(api, there.id, tag, commit.oid)
    return commit


def publish_folder(run: Path) -> Path:
    """The folder to publish, for a run's folder or the publish folder itself."""
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


def _check_names(repo_id: str, revision: str | None, tag: str | None) -> None:
    """Refuse what the Hub would, before anything is sent. HFValidationError is a ValueError."""
    validate_repo_id(repo_id)
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ValueError(f"revision {revision} is a commit: give the branch to push to")
    for kind, name in (("revision", revision), ("tag", tag)):
        if name is not None and (not re.fullmatch(r"\w[\w./-]*", name, re.ASCII) or ".." in name):
            raise ValueError(f"{kind} {name!r} is not a name git takes: use letters, digits, '-', '_', '.' and '/'")
    if tag is not None and tag in ("main", revision):
        raise ValueError(f"tag {tag!r} is the name of a branch: choose another, such as step-1000")


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Path in the repository and file, for everything that may be published."""
    home = folder.resolve().parent
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        path = file.relative_to(folder)
        if REFUSED_FOLDERS & set(path.parts):
            continue
        if any(fnmatch.fnmatch(file.name.lower(), pattern.lower()) for pattern in REFUSED):
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
        if file.suffix.lower() in TEXT:
            content = file.read_bytes()
            if TOKEN.search(content) or (used.startswith("hf_") and used.encode() in content):
                raise ValueError(f"{file} holds a Hub token: remove it, and revoke it if {path} was public before")


def _repository(api: HfApi, repo_id: str, private: bool | None, branch: str) -> ModelInfo:
    """The repository's state on `branch`; both are made if missing."""
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private is not None and api.model_info(repo_id).private != private:
        raise ValueError(
            f"{repo_id} exists and is {'public' if private else 'private'}, not as private={private} asks: leave "
            "`private` out, or change the visibility in the repository's settings first"
        )
    if branch != "main" and not branch.startswith("refs/"):
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    return api.model_info(repo_id, revision=branch)


def _commit(api: HfApi, there: ModelInfo, branch: str, files: dict[str, Path], message: str) -> CommitInfo:
    """Make `branch`, which is in the state `there`, hold `files` and no others of ours."""
    missing = {sibling.rfilename for sibling in there.siblings or []} - set(files)
    deletions = [CommitOperationDelete(path, is_folder=False) for path in _ours(api, there.id, branch, missing)]
    additions = [CommitOperationAdd(path, str(file)) for path, file in files.items()]
    with warnings.catch_warnings():
        # metrics/*.parquet are curves, not a data set that lost its way
        warnings.filterwarnings("ignore", message=".*about to commit a data file", category=UserWarning)
        return api.create_commit(
            there.id,
            [*deletions, *additions],
            commit_message=message,
            commit_description=f"{MARK} {version('hf_lowrank')}",
            revision=branch,
            # the deletions were chosen on this state: the Hub refuses (412) if somebody pushed since
            parent_commit=there.sha,
        )


def _ours(api: HfApi, repo_id: str, branch: str, paths: Iterable[str]) -> list[str]:
    """Those of `paths` that were last written by a push of this package."""
    wanted = sorted(set(paths) - {".gitattributes"})
    if not wanted:
        return []
    pushed = {commit.commit_id for commit in api.list_repo_commits(repo_id, revision=branch) if MARK in commit.message}
    ours = []
    for start in range(0, len(wanted), 50):
        for info in api.get_paths_info(repo_id, wanted[start : start + 50], revision=branch, expand=True):
            if isinstance(info, RepoFile) and info.last_commit is not None and info.last_commit.oid in pushed:
                ours.append(info.path)
    return ours


def _put_tag(api: HfApi, repo_id: str, tag: str, oid: str) -> None:
    """Have `tag` point at the commit `oid`."""
    there = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}
    if there.get(tag) == oid:
        return
    if tag in there:
        api.delete_tag(repo_id, tag=tag)
    api.create_tag(repo_id, tag=tag, revision=oid)
