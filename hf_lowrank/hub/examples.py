"""Cards kept as examples: the report and the figures of a run without its weights, and the card rendered from them."""

import os
import platform
import re
import shutil
from pathlib import Path

from PIL import Image

from hf_lowrank.hub.card import write_card
from hf_lowrank.report.files import atomic_path
from hf_lowrank.report.io import read_report, write_report
from hf_lowrank.report.markdown import slug
from hf_lowrank.report.model import Report

__all__ = ["store_card"]

# the figures' flat colours survive this many; a photograph's would not
COLOURS = 32


def store_card(publish: Path, output: Path, repo_id: str | None = None) -> Path:
    """Store report, figures and card of the run in `publish` under `output/<run's name>`; return the card.

    The figures are reduced to a palette of 32 colours, a quarter of their size. What lay in the folder before is
    replaced.

    Raises:
        ValueError: the report names this machine or a folder on it, which an example must not.
        What `read_report` and `write_card` raise.
    """
    report = read_report(publish)
    if private := _tells_where(report, publish):
        raise ValueError(
            f"{publish / 'report.json'} holds {private}, which says where it was made: measure and evaluate the run "
            "by a relative path, from the folder that holds it"
        )
    folder = output / slug(report["run"]["name"])
    if folder.resolve() == publish.resolve():
        return write_card(folder, repo_id=repo_id)
    shutil.rmtree(folder / "figures", ignore_errors=True)
    write_report(report, folder / "report.json")
    for figure in sorted((publish / "figures").glob("*.png")):
        with Image.open(figure) as image, atomic_path(folder / "figures" / figure.name) as path:
            reduced = image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
            reduced.save(path, format="PNG", optimize=True)
    return write_card(folder, repo_id=repo_id)


def _tells_where(report: Report, publish: Path) -> str | None:
    """This machine's name or a folder on it, where a text of the report holds one."""
    text = report.model_dump_json()
    for private in map(str, (publish.resolve().parent, Path.cwd(), Path.home(), platform.node())):
        if private not in ("", os.sep, "localhost") and re.search(rf"(?<![\w.-]){re.escape(private)}(?![\w-])", text):
            return private
    return None
