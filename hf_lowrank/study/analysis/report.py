"""The report of a study: Markdown, and one self-contained HTML page in the style of a comparison."""

import base64
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from hf_lowrank.compare.page import page_file, policy_hash
from hf_lowrank.report.markdown import Markdown, escape, one_line
from hf_lowrank.report.values import format_bytes, format_count, format_duration, format_value
from hf_lowrank.study.analysis.inputs import StudyData
from hf_lowrank.study.analysis.result import Analysis, Claim, listed

__all__ = ["readable", "render_html", "render_markdown"]

_ENVIRONMENT = Environment(
    loader=PackageLoader("hf_lowrank.study.analysis", "templates"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_MOST_ROWS = {"md": 40, "html": 400}
# what stands beside the number that it belongs to, or says nothing to readers
_BESIDE = ("stderr", "low", "high", "dof", "p", "why")
_SHOWN = {
    "optimizer_state_bytes": format_bytes,
    "peak_memory_bytes": format_bytes,
    "wall_time_seconds": format_duration,
    "tokens": lambda value: format_count(int(value)),
    "tokens_per_second": lambda value: f"{value:,.0f}",
}
_READING = (
    "A difference is the group's mean minus the reference's, with its 95 % interval over seeds: in pairs where both "
    "saw the same data in the same order (“paired over n seeds”), else by Welch's t-test. It is about methods, not "
    "about two trained models; of a single seed nothing is tested.",
    "A number of a pair of runs shares its runs with other pairs. Barriers are tested in an additive model with an "
    "effect of each run, where that is possible, activations by leaving out one seed after the other.",
    "q is p corrected for all tests of an analysis (Benjamini and Hochberg). Something is said to differ if q < 0.05, "
    "so that about one in twenty of these findings is there by chance; otherwise the data do not tell, which is no "
    "proof of equality.",
    "The native form of a metric is of the parameters as trained, along random directions as they are drawn. The "
    "comparable form is of dense matrices, along filter-normalised random directions.",
)


def render_markdown(
    data: StudyData, analyses: Sequence[Analysis], claims: Sequence[Claim], files: Mapping[str, Sequence[str]]
) -> str:
    """Return the report as Markdown; `files` are those of each analysis, by its key."""
    environment = _ENVIRONMENT.overlay(finalize=escape)
    environment.filters["raw"] = Markdown
    parts = [_part(each, files[each.key], "md") for each in analyses]
    return environment.get_template("study.md.jinja").render(analyses=parts, **_common(data, claims))


def render_html(
    data: StudyData,
    analyses: Sequence[Analysis],
    claims: Sequence[Claim],
    files: Mapping[str, Sequence[str]],
    folder: Path,
) -> str:
    """Return the report as one page with its figures, which are in `folder`."""
    style = page_file("compare.css") + _file("study.css")
    parts = []
    for each in analyses:
        part = _part(each, files[each.key], "html")
        if part["figure"]:
            path = folder / part["figure"]
            with Image.open(path) as image:
                part |= {"width": image.width // 2, "height": image.height // 2}
            part["picture"] = base64.b64encode(path.read_bytes()).decode()
        parts.append({"picture": "", **part})
    return (
        _ENVIRONMENT.overlay(autoescape=True)
        .get_template("study.html.jinja")
        .render(analyses=parts, style=Markup(style), style_hash=policy_hash(style), **_common(data, claims))
    )


def _file(name: str) -> str:
    return resources.files("hf_lowrank.study.analysis").joinpath("templates", name).read_text(encoding="utf-8")


def _common(data: StudyData, claims: Sequence[Claim]) -> dict[str, Any]:
    kept = data.kept
    seeds = kept.groupby(["size", "group"], sort=False)["run"].size()
    most, least = (int(seeds.max()), int(seeds.min())) if len(seeds) else (0, 0)
    per_group = f"{most}" if most == least else f"{least} to {most}"
    sizes = [f"{size} ({len(data.groups(size))} groups)" for size in data.sizes]
    left_out = len(data.runs) - len(kept)
    lede = f"{len(kept)} runs at {listed(sizes)}, {per_group} seed{'s' if most > 1 else ''} a group"
    if left_out:
        lede += f"; {left_out} run{'s are' if left_out > 1 else ' is'} left out, see the notes"
    if most < 2:
        lede += ". With one seed a group no difference between methods can be told from chance"
    columns = ["name", "size", "group", "role", "seed", "rank", "learning_rate", "other_rate", "why"]
    shown = data.runs[columns].rename(columns={"why": "left out because"})
    shown = shown.loc[:, [shown[name].map(_text).ne("").any() for name in shown]]
    return {
        "heading": f"A study of {len(data.runs)} pre-training runs",
        "lede": f"{lede}.",
        "claims": claims,
        "notes": list(data.notes),
        "reading": _READING,
        "runs": {"header": [_title(name) for name in shown], "rows": _cells(shown)},
    }


def _part(analysis: Analysis, files: Sequence[str], form: str) -> dict[str, Any]:
    table = readable(analysis.table)
    return {
        "key": analysis.key,
        "title": analysis.title,
        "question": analysis.question,
        "sentences": [one_line(sentence) for sentence in analysis.sentences],
        "header": [_title(name) for name in table],
        "rows": _cells(table.head(_MOST_ROWS[form])),
        "total": len(table),
        "figure": next((name for name in files if name.endswith(".png")), ""),
        "files": [name for name in files if not name.endswith(".png")],
    }


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table with texts for people: a number with its error or interval in one cell."""
    shown: dict[str, list[str]] = {}
    for name in table:
        if name in _BESIDE or (name.endswith(("_stderr", "_low", "_high")) and name.rpartition("_")[0] in table):
            continue
        column = table[name]
        if f"{name}_stderr" in table:
            shown[name] = [_pair(value, error) for value, error in zip(column, table[f"{name}_stderr"], strict=True)]
        elif name == "difference" or f"{name}_low" in table:
            low, high = ("low", "high") if name == "difference" else (f"{name}_low", f"{name}_high")
            bounds = zip(column, table[low], table[high], strict=True)
            shown[f"{name} (95 % interval)"] = [_between(*each) for each in bounds]
        else:
            shown[name] = [_text(value, name) for value in column]
    return pd.DataFrame(shown)


def _pair(value: Any, error: Any) -> str:
    if pd.isna(value):
        return ""
    return format_value(float(value), None if pd.isna(error) else float(error)) or ""


def _between(value: Any, low: Any, high: Any) -> str:
    if pd.isna(value):
        return ""
    texts = [f"{each:.3g}".replace("-", "−") for each in (value, low, high)]
    return texts[0] if pd.isna(low) else f"{texts[0]} ({texts[1]} to {texts[2]})"


def _text(value: Any, name: str = "") -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)) or value is pd.NA:
        return ""
    if name in _SHOWN:
        return str(_SHOWN[name](value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{int(value)}" if value == int(value) and abs(value) < 1e9 else f"{value:.4g}".replace("-", "−")
    return one_line(value)


def _cells(table: pd.DataFrame) -> list[list[str]]:
    return [[_text(value) for value in row] for row in table.astype(object).itertuples(index=False)]


def _title(name: object) -> str:
    return str(name).replace("_", " ").replace("r2", "R²").replace("rho", "rank correlation")
