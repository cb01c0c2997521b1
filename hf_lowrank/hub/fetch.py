"""Where a published run lies on this machine: a local folder as it is, a Hub repository after its download."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

__all__ = ["ALLOWED", "FetchError", "fetch"]

ALLOWED = (
    *("*.safetensors", "*.json", "README.md", "*.txt", "*.model", "*.jinja", "*.parquet", "*.png"),
    "modeling_cola.py",
)
"""What is downloaded by default: weights, configs, the card, tokenizer files, metrics and figures.

Of code only CoLA's modelling file at the root, so that what is fetched can be published again: nothing here runs it.
"""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib")
"""Never downloaded, whatever `allow_patterns` says: loading them can run code."""


class FetchError(OSError):
    """A repository could not be had; the message names it, the revision and the way out."""


def fetch(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    allow_patterns: list[str] | None = None,
) -> Path:
    """The folder that holds a published run.

    Args:
        source: A run's folder (its `publish/` is returned if it has one), a publish or checkpoint folder, or a Hub
            repository, `user/name` or `user/name@revision`. A local folder of that name comes first.
        revision: Branch, tag (`step-1000`) or commit of the repository.
        token: As in `huggingface_hub`: None for the saved one, a string, or False for none.
        allow_patterns: Which files to download (fnmatch on the whole path) instead of `ALLOWED`. Pickles never are.

    Returns:
        The local folder, or the snapshot in the Hub's cache (read-only by convention: other programs share it).

    Raises:
        FileNotFoundError: `source` looks like a path and is missing.
        NotADirectoryError: `source` is a file.
        ValueError: `source` is neither a folder nor a repository id, or a revision is given twice or for a folder.
        FetchError: No such repository or revision, no right to it, not reachable and not in the cache, or a file in
            it has a name that points out of the cache.
        huggingface_hub.errors.HfHubHTTPError: The Hub fails otherwise.
    """
    local = Path(source).expanduser()
    if local.is_dir():
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} is for Hub repositories, and {local} is a local folder: leave it out"
            )
        return local / "publish" if (local / "publish").is_dir() else local
    if local.exists():
        raise NotADirectoryError(f"{local} is a file: give the folder of a run, or a Hub repository as user/name")
    if isinstance(source, Path) or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no folder at {local}: give the folder of a run, or a Hub repository as user/name")
    repo_id, _, inline = source.partition("@")
    if inline and revision not in (None, inline):
        raise ValueError(f"two revisions for {repo_id}, {inline!r} and {revision!r}: give one")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{source!r} is neither a local folder nor a Hub repository: {error}") from error
    return _download(repo_id, inline or revision or "main", token, allow_patterns or list(ALLOWED))


def _download(repo_id: str, revision: str, token: str | bool | None, allow_patterns: list[str]) -> Path:
    """The snapshot of `repo_id` at `revision` in the cache, downloaded where it is not there yet."""
    wanted = f"{repo_id} at revision {revision!r}"
    try:
        return Path(
            snapshot_download(
                repo_id,
                revision=revision,
                token=token,
                allow_patterns=allow_patterns,
                ignore_patterns=list(PICKLES),
                library_name="hf_lowrank",
            )
        )
    except RevisionNotFoundError as error:
        raise FetchError(f"{wanted} does not exist: {_revisions(repo_id, token)}") from error
    except RepositoryNotFoundError as error:
        raise FetchError(
            f"{wanted}: no such repository on the Hub, or it is private (and no local folder has that name): check "
            "the name, or log in with `hf auth login` to an account that may read it"
        ) from error
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE=1 is set"
        elif isinstance(error.__cause__, HfHubHTTPError):
            why = f"the Hub answers {error.__cause__.response.status_code}"
        else:
            why = "the Hub cannot be reached"
        raise FetchError(f"{wanted} is not complete in the cache and {why}: go online once to download it") from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise FetchError(f"{wanted}: the Hub refuses the token: log in again with `hf auth login`") from error
        raise
    except ValueError as error:
        # the client's own check of names, which whoever owns the repository chooses
        if not str(error).startswith(("Invalid filename", "Invalid pointer path")):
            raise
        raise FetchError(f"{wanted} has a file that would leave the cache, do not use it: {error}") from error


def _revisions(repo_id: str, token: str | bool | None) -> str:
    """What may be asked for instead of a revision that is not there."""
    try:
        refs = HfApi(token=token).list_repo_refs(repo_id)
    except OSError:
        return "see the repository's page for its branches and tags"
    names = [ref.name for ref in (*refs.branches, *refs.tags)]
    return "it has " + ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
