"""Published runs that the Hub lists under a tag, and their small files. Anybody may have put anything there."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from huggingface_hub import HfApi

from hf_lowrank.hub.fetch import FetchError, download
from hf_lowrank.hub.network import FAILURES, describe_error, with_retries

__all__ = ["TAG", "Listed", "fetch_listed", "published_runs"]

TAG = "hf-lowrank"
"""The tag that every card of a run carries."""

_LARGEST_REPORT = 32 * 2**20  # bytes
_LARGEST_CURVES = 256 * 2**20  # bytes, of all tables of a run


@dataclass(frozen=True)
class Listed:
    """A repository of the Hub's listing, at the commit it had then."""

    repo_id: str
    commit: str | None


def published_runs(tag: str, limit: int, token: str | None = None) -> list[Listed]:
    """The newest `limit` model repositories with a tag, newest first.

    Raises:
        ValueError: `limit` is less than 1.
        FetchError: the Hub cannot be asked.
    """
    if limit < 1:
        raise ValueError(f"--limit {limit}: give 1 or more")
    api = HfApi(token=token, library_name="hf_lowrank")
    try:
        infos = with_retries(lambda: list(api.list_models(filter=tag, sort="created_at", limit=limit, full=True)))
    except FAILURES as error:
        raise FetchError(f"the runs with the tag {tag} cannot be listed: {describe_error(error, token)}") from error
    infos.sort(key=lambda info: info.created_at or datetime.min.replace(tzinfo=UTC), reverse=True)
    return [Listed(info.id, info.sha) for info in infos]


def fetch_listed(listed: Listed, token: str | None = None) -> tuple[Path, list[str]]:
    """Download the report and the curves of a listed run; return the folder and what was left out.

    Raises:
        ValueError: there is no report, or one larger than any real one.
        FetchError: the repository cannot be read.
    """
    api = HfApi(token=token, library_name="hf_lowrank")
    try:
        info = with_retries(lambda: api.model_info(listed.repo_id, revision=listed.commit, files_metadata=True))
    except FAILURES as error:
        raise FetchError(f"{listed.repo_id} cannot be read: {describe_error(error, token)}") from error
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
    if "report.json" not in sizes:
        raise ValueError("it has the tag and no report.json")
    if sizes["report.json"] > _LARGEST_REPORT:
        raise ValueError(f"its report.json has {sizes['report.json']:,} bytes, more than any real one")
    curves = {name: size for name, size in sizes.items() if name.startswith("metrics/") and name.endswith(".parquet")}
    wanted, problems = ["report.json", "metrics/*.parquet"], []
    if sum(curves.values()) > _LARGEST_CURVES:
        wanted.pop()
        problems.append(f"its curves are left out: {sum(curves.values()):,} bytes")
    # `fetch` would take a local folder of the repository's name
    return download(listed.repo_id, listed.commit or "main", token, wanted), problems
