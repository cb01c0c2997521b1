"""Barriers between methods against those between seeds of one method, by two definitions, plain and aligned.

Is it the method, or any two runs? The contrast is the barrier between two methods minus the mean of the barriers
between seeds inside each (`statistics.additive_contrast`). The paper's definition takes the mean of the two ends off
the highest point, so a straight way down from a worse to a better end has a barrier; the chord takes off the line
between the ends (Frankle et al. 2020).
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from hf_lowrank.report.significance import Delta
from hf_lowrank.study.analysis.figures import draw_barriers
from hf_lowrank.study.analysis.inputs import StudyData
from hf_lowrank.study.analysis.result import Analysis, Claim, decide, listed
from hf_lowrank.study.analysis.statistics import (
    additive_contrast,
    delta_columns,
    interval_text,
    seed_jackknife,
    verdict,
    with_q,
)

__all__ = ["analyse_barriers", "barrier_pairs", "between_minus_within"]

DEFINITIONS = {"barrier": "the paper's definition", "barrier_chord": "against the chord"}


def barrier_pairs(data: StudyData) -> pd.DataFrame:
    """Return one line for each pair of runs of one size and each kind of barrier, at the last step they share.

    Columns: size, a, b (runs), their names, groups and seeds, same_start (equal seed and data order), aligned,
    definition, step, value, stderr.
    """
    numbers = data.numbers[
        data.numbers["metric"].str.match(r"interpolation/cross_(method|seed)(_aligned)?/barrier(_chord)?$")
        & (data.numbers["peer"] >= 0)
        & data.numbers["value"].notna()
        & (data.numbers["place"] != "matched")
    ]
    runs = data.runs.set_index("run")
    kept = set(data.kept["run"])
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in numbers.itertuples(index=False):
        a, b = sorted((int(row.run), int(row.peer)))
        if a == b or not {a, b} <= kept or runs.at[a, "size"] != runs.at[b, "size"]:
            continue
        _, subject, definition = row.metric.split("/")
        key = (a, b, subject.endswith("_aligned"), definition)
        # measured from both sides, or at several steps: the last
        if key in lines and lines[key]["step"] >= row.step:
            continue
        same = runs.at[a, "order"] is not None and runs.at[a, "order"] == runs.at[b, "order"]
        lines[key] = {
            "size": runs.at[a, "size"],
            "a": a,
            "b": b,
            "run_a": runs.at[a, "name"],
            "run_b": runs.at[b, "name"],
            "group_a": runs.at[a, "group"],
            "group_b": runs.at[b, "group"],
            "seed_a": _seed(runs, a),
            "seed_b": _seed(runs, b),
            "same_start": bool(same),
            "aligned": key[2],
            "definition": definition,
            "step": row.step,
            "value": row.value,
            "stderr": row.stderr,
        }
    columns = ["size", "a", "b", "run_a", "run_b", "group_a", "group_b", "seed_a", "seed_b"]
    columns += ["same_start", "aligned", "definition", "step", "value", "stderr"]
    ordered = [lines[key] for key in sorted(lines)]
    return pd.DataFrame(ordered, columns=columns)


def _seed(runs: pd.DataFrame, run: int) -> str:
    """What a run shares with those of the same seed and data; its own number if that is not known."""
    order = runs.at[run, "order"]
    return f"run {run}" if order is None else str(order)


def between_minus_within(pairs: pd.DataFrame, one: str, other: str) -> tuple[Delta, dict[str, Any]]:
    """Return how much higher barriers between two groups are than inside them, and the means.

    Pairs of two methods with one seed share start and data, and are kept apart from the others. The contrast is of
    pairs of different seeds, as those inside a method are, or of pairs of one seed where there are no others.

    Where no seeds of `one` were joined, barriers are compared with those inside `other` alone.

    Args:
        pairs: of one size, definition and alignment.
    """
    groups = list(zip(pairs["group_a"], pairs["group_b"], strict=True))
    sets = []
    for of_pair, same in zip(groups, pairs["same_start"], strict=True):
        if set(of_pair) == {one, other}:
            sets.append("between, one seed" if same else "between")
        else:
            sets.append(f"within {of_pair[0]}" if of_pair[0] == of_pair[1] and of_pair[0] in (one, other) else "")
    chosen = np.array([name != "" for name in sets], dtype=bool)
    names = [name for name in sets if name]
    values = pairs["value"].to_numpy(dtype=float)[chosen]
    ends = list(zip(pairs["a"][chosen], pairs["b"][chosen], strict=True))
    between = "between" if "between" in names else "between, one seed"
    weights = {between: 1.0, f"within {one}": -0.5, f"within {other}": -0.5}
    delta = additive_contrast(values, names, ends, weights)
    if f"within {one}" not in names and f"within {other}" in names:
        # what a method's own runs bring does not cancel, so seeds are left out one after the other
        seeds = list(zip(pairs["seed_a"][chosen], pairs["seed_b"][chosen], strict=True))
        of_set = {
            wanted: [(v, *s) for v, s, name in zip(values.tolist(), seeds, names, strict=True) if name == wanted]
            for wanted in (between, f"within {other}")
        }
        delta = seed_jackknife(of_set[between], of_set[f"within {other}"])
    by_name = pd.Series(values).groupby(pd.Series(names, dtype=object)).mean() if len(values) else {}
    means = {
        "between": by_name.get("between", math.nan),
        "between_one_seed": by_name.get("between, one seed", math.nan),
        "within_one": by_name.get(f"within {one}", math.nan),
        "within_other": by_name.get(f"within {other}", math.nan),
        "pairs": len(values),
        "tested_pairs": "different seeds" if between == "between" else "one seed: the two share start and data",
    }
    return delta, means


def analyse_barriers(data: StudyData) -> Analysis:
    """Compare barriers between every method and the reference with those inside each."""
    pairs = barrier_pairs(data)
    lines: list[dict[str, Any]] = []
    deltas: list[Delta] = []
    for (size, aligned, definition), here in pairs.groupby(["size", "aligned", "definition"], sort=False):
        reference = data.reference.get(str(size))
        for group in data.groups(str(size)):
            ends = {frozenset(each) for each in zip(here["group_a"], here["group_b"], strict=True)}
            if reference is None or group == reference or frozenset((group, reference)) not in ends:
                continue
            delta, means = between_minus_within(here, group, reference)
            lines.append({"size": size, "group": group, "aligned": aligned, "definition": definition, **means})
            deltas.append(delta)
    deltas = with_q(deltas)
    table = pd.DataFrame([line | delta_columns(delta) for line, delta in zip(lines, deltas, strict=True)])
    tested = list(zip(lines, deltas, strict=True))
    return Analysis(
        key="barriers",
        title="Barriers between methods and between seeds",
        question="Is a barrier between two methods one of the methods, or of any two runs?",
        sentences=_sentences(data, tested, pairs),
        table=table,
        more={"pairs": pairs},
        claim=_claim(data, tested),
        draw=lambda: draw_barriers(pairs, data.reference),
    )


def _sentences(data: StudyData, tested: Sequence[tuple[dict[str, Any], Delta]], pairs: pd.DataFrame) -> list[str]:
    if pairs.empty:
        return ["No barrier between two of the runs was measured, so the data do not tell."]
    sentences = []
    for size in data.sizes:
        for aligned in (False, True):
            for definition, words in DEFINITIONS.items():
                here = [
                    (line, delta)
                    for line, delta in tested
                    if (line["size"], line["aligned"], line["definition"]) == (size, aligned, definition)
                ]
                if not here:
                    continue
                said = [
                    f"full-rank's barrier to {line['group']} is {'higher' if verdict(delta) > 0 else 'lower'} than "
                    f"those between seeds ({interval_text(delta)}{_shared(line)})"
                    for line, delta in here
                    if verdict(delta)
                ]
                open_to = [f"{line['group']} ({interval_text(delta)})" for line, delta in here if not verdict(delta)]
                if open_to:
                    said.append(f"the data do not tell whether it is another than between seeds for {listed(open_to)}")
                how = "after alignment" if aligned else "plain"
                sentences.append(f"{size}, {how}, {words}: {'; '.join(said)}.")
    return [*sentences, *_monotone(pairs)]


def _shared(line: dict[str, Any]) -> str:
    return "; the two share start and data" if line["tested_pairs"].startswith("one seed") else ""


def _monotone(pairs: pd.DataFrame) -> list[str]:
    """How often the paper's definition sees a barrier where the loss never rises above the chord."""
    keys = ["size", "a", "b", "aligned"]
    wide = pairs.pivot_table(index=keys, columns="definition", values="value", aggfunc="last")
    if not {"barrier", "barrier_chord"} <= set(wide):
        return []
    wide = wide.dropna()
    only = int(((wide["barrier"] > 0) & (wide["barrier_chord"] <= 0)).sum())
    return [f"In {only} of {len(wide)} paths the paper's definition sees a barrier and the chord does not."]


def _claim(data: StudyData, tested: Sequence[tuple[dict[str, Any], Delta]]) -> Claim:
    controls = set(data.runs.loc[(data.runs["method"] == "fullrank") | (data.runs["role"] == "control"), "group"])
    counted = [
        (line, delta)
        for line, delta in tested
        if line["definition"] == "barrier_chord" and line["group"] not in controls
    ]
    claim = "Methods end in distinct basins"
    if not counted:
        return Claim(claim, "the data do not tell", "no barrier between full-rank and another method was measured")
    texts = []
    for aligned in (False, True):
        here = [(line, delta) for line, delta in counted if line["aligned"] == aligned]
        if here:
            higher = sum(verdict(delta) > 0 for _, delta in here)
            lower = sum(verdict(delta) < 0 for _, delta in here)
            line, delta = max(here, key=lambda each: abs(each[1].value / (each[1].stderr or math.inf)))
            how = "after alignment" if aligned else "plain"
            means = f"mean barrier to it {_mean(line):.3g}"
            texts.append(
                f"{how}, against the chord, the barrier to full-rank is higher than between seeds for {higher} of "
                f"{len(here)} and lower for {lower} (clearest: {line['group']}, {means}, "
                f"difference {interval_text(delta)})"
            )
    # runs of one seed share start and data: a lower barrier than between seeds may be these and says nothing
    told = [(delta, 1) for line, delta in counted if verdict(delta) >= 0 or not math.isnan(line["between"])]
    return Claim(claim, decide(told), "; ".join(texts))


def _mean(line: dict[str, Any]) -> float:
    return float(line["between_one_seed"] if math.isnan(line["between"]) else line["between"])
