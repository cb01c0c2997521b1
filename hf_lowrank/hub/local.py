"""What of a run's folder is published, and what must not be: looked at before anything is sent."""

from __future__ import annotations

import fnmatch
import json
import logging
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import get_token

from hf_lowrank.report.secrets import TOKEN

__all__ = ["files_to_publish", "publish_folder"]

logger = logging.getLogger(__name__)

REFUSED = (
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.pkl",
    "*.pickle",
    "*.tmp",
    "*.partial",
    "*.lock",
    ".DS_Store",
)
"""Files that stay behind wherever they lie in `publish/`: training state, pickles, leftovers."""

REFUSED_FOLDERS = {".git", ".cache", "__pycache__", ".ipynb_checkpoints"}
TEXT = {".json", ".jsonl", ".md", ".py", ".txt", ".yaml", ".yml", ".jinja"}


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


def files_to_publish(folder: Path, token: str | bool | None) -> dict[str, Path]:
    """Path in the repository -> file, for everything in a publish folder that may be published.

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
            content = file.read_text(encoding="utf-8", errors="replace")
            if TOKEN.search(content) or (used.startswith("hf_") and used in content):
                raise ValueError(f"{file} holds a Hub token: remove it, and revoke it if {path} was public before")
