"""Runs in, report, tables and figures out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

from hf_lowrank.compare.gather import Skipped
from hf_lowrank.compare.text import csv_text
from hf_lowrank.figures import drawing, save_figure
from hf_lowrank.report.files import atomic_path
from hf_lowrank.study.analysis.activations import analyse_activations
from hf_lowrank.study.analysis.barriers import analyse_barriers
from hf_lowrank.study.analysis.controls import analyse_controls
from hf_lowrank.study.analysis.downstream import analyse_downstream
from hf_lowrank.study.analysis.inputs import StudyData, read_runs
from hf_lowrank.study.analysis.metrics import analyse_metrics
from hf_lowrank.study.analysis.perplexity import analyse_perplexity
from hf_lowrank.study.analysis.report import render_html, render_markdown
from hf_lowrank.study.analysis.result import Analysis, Claim

__all__ = ["Findings", "analyse", "analyse_data"]

_ANALYSES = (
    analyse_perplexity, analyse_metrics, analyse_barriers, analyse_activations, analyse_controls, analyse_downstream,
)  # fmt: skip
# the paper's claims in its order
_CLAIMS = ("barriers", "metrics", "activations", "downstream")


@dataclass(frozen=True)
class Findings:
    """What an analysis of runs came to.

    Attributes:
        data: the runs and their numbers.
        analyses: all six.
        claims: what they say of the paper's four claims, in its order.
        skipped: runs that could not be read, and why.
    """

    data: StudyData
    analyses: Sequence[Analysis]
    claims: Sequence[Claim]
    skipped: Sequence[Skipped] = ()


def analyse(folders: Sequence[str | Path], output: Path | str, *, token: str | None = None) -> Findings:
    """Analyse runs and write report.md, report.html, tables/*.csv and figures/*.png; equal runs give equal bytes.

    Args:
        folders: run folders, folders of runs (with their `study.json`, if there is one), or Hub repositories.
        output: the folder for what is written.
        token: of the Hub.

    Raises:
        ValueError: there is no run, a study.json is damaged, or `output` is a file.
    """
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file: give a folder")
    data, skipped = read_runs(folders, token)
    findings = analyse_data(data, skipped)
    files = {each.key: [*_tables(each, output), *_figure(each, output)] for each in findings.analyses}
    _write(output / "tables" / "runs.csv", csv_text(data.runs))
    _write(output / "report.md", render_markdown(data, findings.analyses, findings.claims, files))
    _write(output / "report.html", render_html(data, findings.analyses, findings.claims, files, output))
    return findings


def analyse_data(data: StudyData, skipped: Sequence[Skipped] = ()) -> Findings:
    """Run the six analyses; nothing is written."""
    analyses = [analysis(data) for analysis in _ANALYSES]
    claims = {each.key: each.claim for each in analyses}
    said = [claim for key in _CLAIMS if (claim := claims[key]) is not None]
    notes = (*data.notes, *(f"{each.source} could not be read: {each.reason}" for each in skipped))
    data = StudyData(data.runs, data.numbers, data.layers, data.reference, notes)
    return Findings(data, analyses, said, skipped)


def _tables(analysis: Analysis, output: Path) -> list[str]:
    """Write an analysis's tables; return their names, and remove those of an earlier one that are empty now."""
    tables = {analysis.key: analysis.table, **{f"{analysis.key}_{end}": table for end, table in analysis.more.items()}}
    names = []
    for old in sorted((output / "tables").glob(f"{analysis.key}*.csv")):
        if old.stem not in tables or tables[old.stem].empty:
            old.unlink()
    for name, table in tables.items():
        if len(table):
            _write(output / "tables" / f"{name}.csv", csv_text(table))
            names.append(f"tables/{name}.csv")
    return names


def _figure(analysis: Analysis, output: Path) -> list[str]:
    path = output / "figures" / f"{analysis.key}.png"
    with matplotlib.rc_context(drawing.STYLE):
        figure = analysis.draw()
        if figure is None:
            path.unlink(missing_ok=True)
            return []
        save_figure(figure, path)
    return [f"figures/{path.name}"]


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
