"""How much of a method's difference to full-rank is its rank, and how much its learning rates.

With F full-rank at its own rates, F' full-rank at the method's pair of rates and M the method, M - F is the sum of
what the rates do, F' - F, and of what the method and its rank do, M - F'. Where the method was trained at a higher
rank with the same rates, M', the latter is the sum of M' - F' and M - M'. Other controls, such as a warm start, are
compared with the groups of their method, and every method with plain low-rank factors.
"""

import math
from collections.abc import Iterator
from typing import Any

import pandas as pd

from hf_lowrank.report.catalogue import headline_metrics
from hf_lowrank.report.significance import Delta
from hf_lowrank.study.analysis.figures import draw_controls
from hf_lowrank.study.analysis.inputs import StudyData
from hf_lowrank.study.analysis.metrics import in_form
from hf_lowrank.study.analysis.perplexity import LOSS
from hf_lowrank.study.analysis.result import Analysis, listed
from hf_lowrank.study.analysis.statistics import delta_columns, interval_text, over_seeds, values_of, verdict, with_q

__all__ = ["analyse_controls", "parts_of"]

WORDS = {
    "total": "method and rates",
    "rates": "the rates",
    "method": "method and rank at equal rates",
    "full rank": "the method at its highest rank, at equal rates",
    "rank": "the rank, at equal method and rates",
    "control": "the control against its method",
    "factors": "the method against plain low-rank factors",
}


def parts_of(data: StudyData, size: str) -> list[tuple[str, str, str, str]]:
    """Return the contrasts of a size: (method's group, part, minuend, subtrahend), the parts as in `WORDS`."""
    reference = data.reference.get(size)
    kept = data.kept[data.kept["size"] == size].drop_duplicates("group").set_index("group")
    if reference is None:
        return []
    parts = []
    plain = [str(group) for group in kept.index[kept["method"] == "fullrank"] if group != reference]
    factors = next((str(group) for group in kept.index[kept["method"] == "lowrank"]), None)
    for group, row in kept.iterrows():
        if row["method"] == "fullrank":
            continue
        name = str(group)
        parts.append((name, "total", name, reference))
        at_rates = next((other for other in plain if _rates_of(kept.loc[other], row)), None)
        if at_rates is None and _equal_rates(kept.loc[reference], row):
            at_rates = reference
        if at_rates is not None:
            if at_rates != reference:
                parts.append((name, "rates", at_rates, reference))
            parts.append((name, "method", name, at_rates))
        higher = _higher_rank(kept, name)
        if higher is not None:
            parts.append((name, "rank", name, higher))
            if at_rates is not None:
                parts.append((name, "full rank", higher, at_rates))
        if row["role"] == "control":
            kin = kept.index[(kept["method"] == row["method"]) & (kept["role"] != "control")]
            parts += [(name, "control", name, str(other)) for other in kin]
        if factors is not None and name != factors:
            parts.append((name, "factors", name, factors))
    return parts


def _equal_rates(one: Any, other: Any) -> bool:
    pairs = [(one[name], other[name]) for name in ("learning_rate", "other_rate")]
    return all(pd.notna(a) and pd.notna(b) and math.isclose(a, b, rel_tol=1e-6) for a, b in pairs)


def _rates_of(control: Any, method: Any) -> bool:
    named = control["rates_of"]
    return bool(named == method["label"]) if named else _equal_rates(control, method)


def _higher_rank(kept: pd.DataFrame, name: str) -> str | None:
    """The group of the same method and rates with the highest rank, if that is higher."""
    row = kept.loc[name]
    kin = kept[(kept["method"] == row["method"]) & (kept["rank"] > row["rank"])] if pd.notna(row["rank"]) else kept[:0]
    kin = kin[[_equal_rates(other, row) for _, other in kin.iterrows()]]
    return None if kin.empty else str(kin["rank"].idxmax())


def _measured(data: StudyData, size: str) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Yield the loss and each metric in the way that most runs share, in comparable form."""
    for metric in headline_metrics():
        if metric.between_runs or metric.name == "perplexity":
            continue
        rows = in_form(data.at("end", size=size, metric=metric.name, kind="metric"), "comparable")
        if len(rows):
            # the mode is the first of equally common ways
            rows = rows[rows["way"] == rows["way"].mode().iloc[0]].drop_duplicates("run", keep="last")
            yield {"id": metric.id or "", "metric": metric.name, "label": metric.label}, rows


def analyse_controls(data: StudyData) -> Analysis:
    """Split each method's difference to full-rank into its parts, in the loss and in every metric."""
    lines: list[dict[str, Any]] = []
    deltas: list[Delta] = []
    for size in data.sizes:
        parts = parts_of(data, size)
        for about, rows in _measured(data, size):
            values = {str(group): values_of(mine) for group, mine in rows.groupby("group")}
            for group, part, one, other in parts:
                if one in values and other in values:
                    lines.append({"size": size, **about, "group": group, "part": part, "of": one, "minus": other})
                    deltas.append(over_seeds(values[one], values[other]))
    # one contrast may be a part of several methods
    deltas = with_q(deltas, [(line["size"], line["metric"], line["of"], line["minus"]) for line in lines])
    table = pd.DataFrame([line | delta_columns(delta) for line, delta in zip(lines, deltas, strict=True)])
    return Analysis(
        key="controls",
        title="Controls: rank or rates?",
        question="How much of each difference to full-rank is the method and its rank, and how much are the rates?",
        sentences=_sentences(data, list(zip(lines, deltas, strict=True))),
        table=table,
        draw=lambda: draw_controls(table),
    )


def _sentences(data: StudyData, tested: list[tuple[dict[str, Any], Delta]]) -> list[str]:
    losses = [(line, delta) for line, delta in tested if line["metric"] == LOSS]
    sentences = []
    for size in data.sizes:
        here = [(line, delta) for line, delta in losses if line["size"] == size]
        split = list(dict.fromkeys(line["group"] for line, _ in here if line["part"] not in ("total", "factors")))
        for group in split:
            told: list[str] = []
            untold: list[str] = []
            for line, delta in here:
                if line["group"] == group:
                    said = f"{WORDS[line['part']]} ({line['of']} minus {line['minus']}: {interval_text(delta)})"
                    (told if verdict(delta) else untold).append(said)
            words = [f"changed by {listed(told)}"] if told else []
            words += [f"the data do not tell what is due to {listed(untold)}"] if untold else []
            sentences.append(f"{size}, validation loss of {group}: {'; '.join(words)}.")
        others = [group for group in data.groups(size) if group not in split and group != data.reference.get(size)]
        methods = set(data.runs.loc[data.runs["method"] != "fullrank", "group"])
        without = [group for group in others if group in methods]
        if without:
            sentences.append(f"{size}: no control tells rank from rates for {listed(without)}.")
    return sentences or ["There is no control among the runs, so the data do not tell rank from rates."]
