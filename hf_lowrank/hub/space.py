"""A comparison's page as a static Space on the Hugging Face Hub."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version

from huggingface_hub import CommitOperationAdd, HfApi, SpaceCardData
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import GitCommitInfo, RepoFile
from huggingface_hub.utils import validate_repo_id

from hf_lowrank.hub.commit import Hub
from hf_lowrank.hub.ownership import MARK, OverwriteError
from hf_lowrank.report.secrets import TOKEN

__all__ = ["push_space", "space_card"]


def space_card(title: str, body: str, repos: Sequence[str]) -> str:
    """Return README.md of the Space; `repos` are the compared runs' (`user/name`, `user/name@revision`)."""
    models = list(dict.fromkeys(repo.partition("@")[0] for repo in repos))
    metadata = SpaceCardData(
        title=title,
        emoji="📉",
        colorFrom="blue",
        colorTo="gray",
        sdk="static",
        pinned=False,
        models=models or None,
        tags=["hf-lowrank", "hf-lowrank-comparison"],
    )
    return f"---\n{metadata.to_yaml()}\n---\n\n{body}"


def push_space(
    files: Mapping[str, str], repo_id: str, *, overwrite: bool = False, token: str | bool | None = None
) -> str:
    """Put files into a static Space in one commit, or none if nothing differs; return the Space's address.

    The Space is made if missing. An existing one is ours if a push of this package was the last to write its files.

    Args:
        files: path -> text.
        repo_id: `user/name`, or `name` in the user's own namespace.
        overwrite: replace these files in a Space that is not ours; its other files stay in any case.
        token: as in `huggingface_hub`.

    Raises:
        ValueError: the name is none, or a file holds a Hub token.
        OverwriteError: the Space is not ours.
        PushError: the Hub refuses, fails, or cannot be reached; calling again is always safe.
    """
    validate_repo_id(repo_id)
    for path, text in files.items():
        if TOKEN.search(text):
            raise ValueError(f"{path} holds a Hub token: look for it in the reports, and revoke it")
    return Hub(repo_id, token).asked("the Space cannot be written", _push, repo_id, files, overwrite, token)


def _push(repo_id: str, files: Mapping[str, str], overwrite: bool, token: str | bool | None) -> str:
    api = HfApi(token=token, library_name="hf_lowrank", library_version=version("hf_lowrank"))
    repo_id, made = _make(api, repo_id)
    history = api.list_repo_commits(repo_id, repo_type="space")
    theirs = [] if made else _theirs(api, repo_id, list(files), history)
    if theirs and not overwrite:
        raise OverwriteError(
            f"the Space {repo_id} is not one that hf_lowrank made ({', '.join(theirs)} by somebody else): choose "
            "another name, or give --yes to overwrite these files"
        )
    api.create_commit(
        repo_id,
        [CommitOperationAdd(path, text.encode()) for path, text in files.items()],
        commit_message="Publish a comparison of runs",
        commit_description=f"{MARK} {version('hf_lowrank')}",
        repo_type="space",
        # we checked whose the files are at this commit: the Hub refuses (412) if somebody pushed since
        parent_commit=history[0].commit_id,
    )
    return f"{api.endpoint}/spaces/{repo_id}"


def _make(api: HfApi, repo_id: str) -> tuple[str, bool]:
    """Make the Space if it is missing; return its full name and whether it was made."""
    try:
        return api.create_repo(repo_id, repo_type="space", space_sdk="static").repo_id, True
    # it exists, or this token may write to it but not make one: the client tells both from a real refusal
    except HfHubHTTPError:
        return api.create_repo(repo_id, repo_type="space", space_sdk="static", exist_ok=True).repo_id, False


def _theirs(api: HfApi, repo_id: str, paths: list[str], history: Sequence[GitCommitInfo]) -> list[str]:
    """Return those of `paths` that somebody else wrote; a Space without any commit of ours is theirs as a whole."""
    if len(history) == 1 and history[0].title == "initial commit":
        return []  # an earlier push only made the Space: its files are the Hub's own template
    ours = {commit.commit_id for commit in history if MARK in commit.message}
    if not ours:
        return ["its commits"]
    found = api.get_paths_info(repo_id, paths, repo_type="space", expand=True)
    files = [info for info in found if isinstance(info, RepoFile)]
    return [info.path for info in files if info.last_commit is None or info.last_commit.oid not in ours]
