"""Finding a published run on this machine: a local folder as it is, a Hub repository after its download."""

from __future__ import annotations

import hashlib
import re
import time
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from hf_lowrank.hub.network import FAILURES, TIMEOUT, DamagedError, describe_error, status_of, with_retries

__all__ = ["ALLOWED", "FetchError", "download", "fetch"]

ALLOWED = (
    *("*.safetensors", "*.json", "README.md", "*.txt", "*.model", "*.jinja", "*.parquet", "*.png"),
    "modeling_cola.py",
)
"""What is downloaded by default: weights, configs, the card, tokenizer files, metrics and figures.

Of code only CoLA's modelling file at the root, so that what is fetched can be published again: nothing here runs it.
"""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib")
"""Never downloaded, whatever `allow_patterns` says: loading them can run code."""


_REFUSED = "the Hub refuses the token: log in again with `hf auth login`"


class FetchError(OSError):
    """A repository could not be downloaded; the message names it, its revision and the way out."""


def fetch(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    allow_patterns: list[str] | None = None,
) -> Path:
    """Return the folder that holds a published run.

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
        FetchError: The repository or revision does not exist, may not be read, or is neither reachable nor in the
            cache; a file keeps arriving damaged, or its name points out of the cache. Short failures were tried
            again. The files that arrived stay: another call continues from there.
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
    return download(repo_id, inline or revision or "main", token, allow_patterns or list(ALLOWED))


def download(repo_id: str, revision: str, token: str | bool | None, allow_patterns: list[str]) -> Path:
    """Return a repository's snapshot in the cache, after downloading what is missing; raises `FetchError`."""
    wanted = f"{repo_id} at revision {revision!r}"

    def snapshot() -> Path:
        started = time.time()
        folder = snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            allow_patterns=allow_patterns,
            ignore_patterns=list(PICKLES),
            library_name="hf_lowrank",
        )
        _drop_damaged(Path(folder), since=started)
        return Path(folder)

    try:
        return with_retries(snapshot)
    except RevisionNotFoundError as error:
        raise FetchError(f"{wanted} does not exist: {_revisions(repo_id, token)}") from error
    except RepositoryNotFoundError as error:
        raise FetchError(
            f"{wanted}: no such repository on the Hub, or it is private (and no local folder has that name): check "
            "the name, or log in with `hf auth login` to an account that may read it"
        ) from error
    except LocalEntryNotFoundError as error:
        if status_of(error) in (401, 403):
            raise FetchError(f"{wanted}: {_REFUSED}") from error
        why = "the Hub cannot be reached: go online once to download it"
        if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE=1 is set: go online once to download it"
        elif status_of(error) is not None or isinstance(error.__cause__, TIMEOUT):
            why = describe_error(error, _secret(token))
        raise FetchError(f"{wanted} is not complete in the cache (nor a local folder) and {why}") from error
    except FAILURES as error:
        if status_of(error) in (401, 403):
            raise FetchError(f"{wanted}: {_REFUSED}") from error
        raise FetchError(f"{wanted} cannot be downloaded: {describe_error(error, _secret(token))}") from error
    except ValueError as error:
        # the client's own check of names, which whoever owns the repository chooses
        if not str(error).startswith(("Invalid filename", "Invalid pointer path")):
            raise
        raise FetchError(f"{wanted} has a file that would leave the cache, do not use it: {error}") from error


def _secret(token: str | bool | None) -> str | None:
    return token if isinstance(token, str) else None


def _drop_damaged(snapshot: Path, since: float) -> None:
    """Remove new files from the cache whose bytes differ from the Hub's.

    The client checks only sizes. The cache names every file by its content, with SHA-256 for LFS and git's SHA-1
    otherwise. Older files were checked when they arrived.

    Args:
        snapshot: The snapshot's folder.
        since: Time (seconds since 1970) after which a file counts as new.

    Raises:
        DamagedError: There were some. They are gone, so the next download fetches them again.
    """
    damaged = []
    for path in snapshot.rglob("*"):
        # without symbolic links the name of the content is not known
        if not path.is_symlink():
            continue
        content = path.parent / path.readlink()
        # file systems may round times down to two seconds
        if content.is_file() and content.stat().st_mtime >= since - 2 and not _is_content(content, content.name):
            content.unlink()
            path.unlink()
            damaged.append(path.relative_to(snapshot).as_posix())
    if damaged:
        raise DamagedError(f"{', '.join(sorted(damaged))} arrived damaged and is not kept: download it again")


def _is_content(path: Path, etag: str) -> bool:
    """Tell whether a file's content is the one that the Hub names `etag`; yes for a name of another kind."""
    with path.open("rb") as file:
        if re.fullmatch(r"[0-9a-f]{64}", etag):
            return hashlib.file_digest(file, "sha256").hexdigest() == etag
        if re.fullmatch(r"[0-9a-f]{40}", etag):
            content = file.read()
            return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == etag
    return True


def _revisions(repo_id: str, token: str | bool | None) -> str:
    """What may be asked for instead of a revision that is not there."""
    try:
        refs = HfApi(token=token).list_repo_refs(repo_id)
    except FAILURES:
        return "see the repository's page for its branches and tags"
    names = [ref.name for ref in (*refs.branches, *refs.tags)]
    return "it has " + ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
