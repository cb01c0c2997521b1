"""A comparison as one self-contained HTML page: nothing is loaded, and nothing from a report becomes markup.

What reports say reaches the page in two ways: escaped by the template, and as JSON that the page's script turns into
text nodes. The page's policy (CSP) admits its own script and style by their hashes and no request at all.
"""

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib import resources
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from hf_lowrank.compare.charts import Chart
from hf_lowrank.compare.table import Comparison, Row
from hf_lowrank.compare.text import heading, significance_text
from hf_lowrank.report.markdown import one_line

__all__ = ["render_page"]

_SCRIPTS = ("compare-base.js", "compare-table.js", "compare-chart.js", "compare-start.js")
_NAMED = 8  # runs in the page's head
_SHARED = ("model", "data", "tokens_seen", "steps", "sequence_length", "precision")
_SHOWN_COSTS = ("parameters_trained", "optimizer_state_bytes")


def render_page(comparison: Comparison, charts: Sequence[Chart]) -> str:
    """Return the page; equal comparisons give equal text."""
    script = '(function () {\n"use strict";\n' + "\n".join(_file(name) for name in _SCRIPTS) + "})();\n"
    style = _file("compare.css")
    labels = [row.label for row in comparison.rows]
    names = ", ".join(labels[:_NAMED]) + (f" and {len(labels) - _NAMED} more" if len(labels) > _NAMED else "")
    environment = Environment(
        loader=PackageLoader("hf_lowrank.compare", "templates"),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("compare.html.jinja").render(
        title=f"{heading(comparison)}: {names[:100]}",
        heading=heading(comparison),
        names=names,
        shared=_shared_facts(comparison.rows),
        conflicts=comparison.conflicts,
        notes=[notice for notice in comparison.notices if notice.level == "note"],
        rows=[_shown_row(row) for row in comparison.rows],
        reading=significance_text(comparison),
        style=Markup(style),
        style_hash=_hash(style),
        script=Markup(script),
        script_hash=_hash(script),
        data=Markup(_json(_page_data(comparison, charts))),
    )


def _file(name: str) -> str:
    return resources.files("hf_lowrank.compare").joinpath("templates", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(data: Any) -> str:
    """Return JSON in ASCII without a character that could end the script element or begin a comment in it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _shared_facts(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return the facts that all rows have in common, for the page's head."""
    shared = []
    for key in _SHARED:
        found = [next(((f.label, f.text) for f in row.facts if f.key == key), None) for row in rows]
        if found[0] is not None and all(fact == found[0] for fact in found):
            shared.append(found[0])
    return shared


def _shown_row(row: Row) -> dict[str, Any]:
    links = [(repo, f"https://huggingface.co/{_address(repo)}") for repo in row.repos]
    return {"label": row.label, "method": row.method, "differs": row.differs, "facts": row.facts, "links": links}


def _address(repo: str) -> str:
    name, _, revision = repo.partition("@")
    return quote(name) + (f"/tree/{quote(revision, safe='')}" if revision else "")


def _page_data(comparison: Comparison, charts: Sequence[Chart]) -> dict[str, Any]:
    usual = set(comparison.usual)
    return {
        "baseline": comparison.baseline,
        "sort": comparison.sort,
        "descending": comparison.descending,
        "rows": [
            {
                "label": row.label,
                "method": row.method,
                "seeds": ", ".join(str(seed) for seed in row.seeds if seed is not None),
                "differs": row.differs,
                "notes": row.notes,
                "text": " ".join(fact.text for fact in row.facts),
            }
            for row in comparison.rows
        ],
        "columns": [
            {
                "id": column.id,
                "label": column.label,
                "group": column.group,
                "detail": column.distinct,
                "settings": ", ".join(part for part in (column.space, column.settings) if part),
                "shown": index in usual or column.name in _SHOWN_COSTS,
            }
            for index, column in enumerate(comparison.columns)
        ],
        "cells": comparison.pivot(_cell).values.tolist(),
        "charts": [_chart(chart) for chart in charts],
    }


def _cell(cell: Any) -> dict[str, Any]:
    """Return a cell for the page's script: value, text, difference, note, marks."""
    noted = "; ".join(
        one_line(note) for note in (cell.note, None if cell.why == "no standard error" else cell.why) if note
    )
    value = None if math.isnan(cell.value) else cell.value
    return {"v": value, "t": cell.text, "d": cell.delta_text, "n": noted, "s": cell.marks}


def _chart(chart: Chart) -> dict[str, Any]:
    lines = []
    for line in chart.lines:
        lines.append({"row": line.row, "x": _short(line.x), "y": _short(line.y), "error": _short(line.error)})
    return {**asdict(replace(chart, lines=[])), "lines": lines}


def _short(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else float(f"{value:.6g}") for value in values]
