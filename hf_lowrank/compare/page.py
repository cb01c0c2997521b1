"""A comparison as one self-contained HTML page: nothing is loaded, and nothing from a report becomes markup.

What reports say reaches the page in two ways: escaped by the template, and as JSON that the page's script turns into
text nodes. The page's policy (CSP) admits its own script and style by their hashes and no request at all.
"""

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from typing import Any
from urllib.parse import quote

import pandas as pd
from markupsafe import Markup

from hf_lowrank.compare.charts import Chart
from hf_lowrank.compare.heat import heat_maps
from hf_lowrank.compare.notices import by_kind
from hf_lowrank.compare.scatter import scatter
from hf_lowrank.compare.table import Comparison, Row
from hf_lowrank.compare.text import ENVIRONMENT, heading, significance_text
from hf_lowrank.report.markdown import one_line
from hf_lowrank.report.tables import Fact

__all__ = ["page_file", "policy_hash", "render_page"]

_SCRIPTS = tuple(f"compare-{part}.js" for part in ("base", "table", "chart", "scatter", "heat", "view", "start"))
_NAMED = 8  # runs in the page's head
_SHARED = ("model", "data", "tokens_seen", "steps", "sequence_length", "precision")
_SHOWN_COSTS = ("parameters_trained", "optimizer_state_bytes", "steps_taken", "tokens_taken")


def render_page(comparison: Comparison, charts: Sequence[Chart]) -> str:
    """Return the page; equal comparisons give equal text."""
    script = '(function () {\n"use strict";\n' + "\n".join(page_file(name) for name in _SCRIPTS) + "})();\n"
    style = page_file("compare.css")
    labels = [row.label for row in comparison.rows]
    names = ", ".join(labels[:_NAMED]) + (f" and {len(labels) - _NAMED} more" if len(labels) > _NAMED else "")
    return (
        ENVIRONMENT.overlay(autoescape=True)
        .get_template("compare.html.jinja")
        .render(
            title=f"{heading(comparison)}: {names[:100]}",
            heading=heading(comparison),
            names=names,
            shared=_shared_facts(comparison.rows),
            conflicts=by_kind(comparison.conflicts),
            notes=by_kind(comparison.notes),
            place=comparison.at,
            rows=[_shown_row(row) for row in comparison.rows],
            reading=significance_text(comparison),
            style=Markup(style),
            style_hash=policy_hash(style),
            script=Markup(script),
            script_hash=policy_hash(script),
            data=Markup(_json(_page_data(comparison, charts))),
        )
    )


def page_file(name: str) -> str:
    """A file of the page's style or script, as text."""
    return resources.files("hf_lowrank.compare").joinpath("templates", name).read_text(encoding="utf-8")


def policy_hash(text: str) -> str:
    """The hash by which a page's policy admits a style or script of its own."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(data: Any) -> str:
    """Return JSON in ASCII without a character that could end the script element or begin a comment in it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _shared_facts(rows: Sequence[Row]) -> list[Fact]:
    """Return the facts that all rows have in common, for the page's head."""
    facts = {fact.key: fact for fact in rows[0].facts}
    return [facts[key] for key in _SHARED if key in facts and all(facts[key] in row.facts for row in rows)]


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
                "tested": comparison.tested(index),
                "notes": row.notes,
                "place": next((fact.text for fact in row.facts if fact.key == "taken_at"), ""),
                "text": " ".join(fact.text for fact in row.facts),
            }
            for index, row in enumerate(comparison.rows)
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
        "scatter": scatter(comparison),
        "heat": heat_maps(comparison),
    }


def _cell(cell: Any) -> dict[str, Any]:
    """Return a cell for the page's script: value, text, difference, note, marks, what was tested."""
    notes = [cell.note, "" if cell.why == "no standard error" else cell.why]
    value = None if math.isnan(cell.value) else cell.value
    note = "; ".join(one_line(each) for each in notes if each)
    test = "" if pd.isna(cell.test) else cell.test
    return {"v": value, "t": cell.text, "d": cell.delta_text, "n": note, "s": cell.marks, "w": test}


def _chart(chart: Chart) -> dict[str, Any]:
    """Return a chart for the page's script, its numbers with six digits."""
    data = asdict(chart)
    for line in data["lines"]:
        line |= {key: _short(line[key]) for key in ("x", "y", "error")}
    return data


def _short(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else float(f"{value:.6g}") for value in values]
