"""Activations by depth and step against full-rank's, with full-rank of another seed as the null.

Two models that were trained from other starts differ in their activations whatever the method, so a method's
similarity to full-rank is read against that of two full-rank seeds. Depth runs from 0, the embeddings, to 1, the last
layer; the slope is the similarity's change over the whole depth, by least squares.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from hf_lowrank.report.catalogue import headline_metric
from hf_lowrank.report.significance import Delta
from hf_lowrank.study.analysis.figures import draw_activations
from hf_lowrank.study.analysis.inputs import StudyData
from hf_lowrank.study.analysis.result import Analysis, Claim, decide, listed
from hf_lowrank.study.analysis.statistics import delta_columns, interval_text, seed_jackknife, verdict, with_q

__all__ = ["SIMILARITIES", "activation_pairs", "analyse_activations"]

# metric -> the sign that a drift apart with depth gives its slope
SIMILARITIES = {"activation/cka": -1, "activation/cosine": -1, "activation/relative_l2": 1}


def activation_pairs(data: StudyData) -> pd.DataFrame:
    """Return the similarity of each run to a full-rank run of its size, layer by layer, in long form.

    Columns: size, group, run, peer, seed, peer_seed, same_start, step, metric, part (a layer's number, `mean` over
    layers or `slope` over depth) and value. Rows of the reference's own group are the null.
    """
    layers = data.layers
    runs = data.runs.set_index("run")
    kept = set(data.kept["run"])
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for (run, peer, step), rows in layers.groupby(["run", "peer", "step"], sort=True):
        run, peer = int(run), int(peer)
        if run == peer or not {run, peer} <= kept or runs.at[run, "size"] != runs.at[peer, "size"]:
            continue
        size, group = runs.at[run, "size"], runs.at[run, "group"]
        if runs.at[peer, "group"] != data.reference.get(size):
            continue
        # of a pair of the null that was measured from both sides one counts
        ends = tuple(sorted((run, peer))) if group == data.reference[size] else (run, peer)
        rows = rows.drop_duplicates("layer", keep="last").sort_values("layer")
        seeds = [f"run {i}" if (order := runs.at[i, "order"]) is None else str(order) for i in (run, peer)]
        head = {"size": size, "group": group, "run": run, "peer": peer, "seed": seeds[0], "peer_seed": seeds[1]}
        head |= {"same_start": seeds[0] == seeds[1], "step": step}
        for metric in SIMILARITIES:
            if metric in rows:
                for part, value in _parts(rows["layer"], rows[metric]).items():
                    lines.setdefault(
                        (ends, step, metric, part), {**head, "metric": metric, "part": part, "value": value}
                    )
    columns = ["size", "group", "run", "peer", "seed", "peer_seed", "same_start", "step", "metric", "part", "value"]
    return pd.DataFrame(list(lines.values()), columns=columns)


def _parts(layers: Any, values: Any) -> dict[str, float]:
    """A profile over depth as its values, their mean and their slope over the whole depth."""
    x, y = np.asarray(layers, dtype=float), np.asarray(values, dtype=float)
    known = np.isfinite(y)
    parts = {f"{int(layer)}": float(value) for layer, value in zip(x[known], y[known], strict=True)}
    if known.sum() > 1:
        depth = (x - x.min()) / (x.max() - x.min())
        parts |= {"mean": float(y[known].mean()), "slope": float(np.polyfit(depth[known], y[known], 1)[0])}
    return parts


def _triples(rows: pd.DataFrame) -> list[tuple[float, str, str]]:
    return [(float(v), str(a), str(b)) for v, a, b in zip(rows["value"], rows["seed"], rows["peer_seed"], strict=True)]


def analyse_activations(data: StudyData) -> Analysis:
    """Compare each group's profile with the null's, at each step and in each part."""
    pairs = activation_pairs(data)
    lines: list[dict[str, Any]] = []
    deltas: list[Delta] = []
    for (size, step, metric, part), here in pairs.groupby(["size", "step", "metric", "part"], sort=False):
        reference = data.reference[str(size)]
        null = here[here["group"] == reference]
        for group in data.groups(str(size)):
            mine = here[here["group"] == group]
            if group == reference or mine.empty:
                continue
            # like the null's, pairs of different starts if there are enough
            apart = mine[~mine["same_start"]]
            tested = apart if apart["seed"].nunique() > 1 else mine
            lines.append(
                {
                    "size": size, "group": group, "step": step, "metric": metric, "part": part,
                    "mean": tested["value"].mean(), "pairs": len(tested), "null": null["value"].mean(),
                    "null_pairs": len(null), "same_start": bool(tested["same_start"].any()),
                }
            )  # fmt: skip
            deltas.append(seed_jackknife(_triples(tested), _triples(null)))
    deltas = with_q(deltas)
    table = pd.DataFrame([line | delta_columns(delta) for line, delta in zip(lines, deltas, strict=True)])
    tested_lines = list(zip(lines, deltas, strict=True))
    return Analysis(
        key="activations",
        title="Activations by depth and step",
        question="Do a method's activations drift from full-rank's more, and more with depth, than another seed's?",
        sentences=_sentences(data, tested_lines),
        table=table,
        more={"pairs": pairs},
        claim=_claim(data, tested_lines),
        draw=lambda: draw_activations(pairs, data.reference),
    )


def _last(tested: Sequence[tuple[dict[str, Any], Delta]], size: str) -> list[tuple[dict[str, Any], Delta]]:
    here = [(line, delta) for line, delta in tested if line["size"] == size]
    last = max((line["step"] for line, _ in here), default=None)
    return [(line, delta) for line, delta in here if line["step"] == last]


def _sentences(data: StudyData, tested: Sequence[tuple[dict[str, Any], Delta]]) -> list[str]:
    if not tested:
        return ["No activations were compared with a full-rank run's layer by layer, so the data do not tell."]
    sentences = []
    for size in data.sizes:
        at_end = _last(tested, size)
        for metric, sign in SIMILARITIES.items():
            for part, words in (("mean", "over all layers"), ("slope", "over depth")):
                here = [(line, delta) for line, delta in at_end if (line["metric"], line["part"]) == (metric, part)]
                if not here:
                    continue
                name = getattr(headline_metric(metric), "label", metric)
                said = []
                for line, delta in here:
                    if verdict(delta):
                        more = "more" if verdict(delta) == sign else "less"
                        what = "is" if part == "mean" else "drifts"
                        said.append(f"{line['group']} {what} {more} apart than another seed ({interval_text(delta)})")
                open_to = [f"{line['group']} ({interval_text(delta)})" for line, delta in here if not verdict(delta)]
                if open_to:
                    said.append(f"the data do not tell for {listed(open_to)}")
                shared = "; pairs share their start" if any(line["same_start"] for line, _ in here) else ""
                sentences.append(f"{size}, {name}, {words} at the last step{shared}: {'; '.join(said)}.")
    return sentences


def _claim(data: StudyData, tested: Sequence[tuple[dict[str, Any], Delta]]) -> Claim:
    """Activations drift apart in later layers: by CKA, more than those of another seed of full-rank."""
    controls = set(data.runs.loc[(data.runs["method"] == "fullrank") | (data.runs["role"] == "control"), "group"])
    claim = "Activations drift apart in later layers"
    here = [
        (line, delta)
        for size in data.sizes
        for line, delta in _last(tested, size)
        if (line["metric"], line["part"]) == ("activation/cka", "slope") and line["group"] not in controls
    ]
    if not here:
        return Claim(claim, "the data do not tell", "no method's activations were compared with full-rank's by layer")
    texts = []
    for size in data.sizes:
        of_size = [(line, delta) for line, delta in here if line["size"] == size]
        if of_size:
            line, delta = max(of_size, key=lambda each: abs(each[1].value / (each[1].stderr or math.inf)))
            change = f"{line['mean']:+.3g}".replace("-", "−")
            null = "" if math.isnan(line["null"]) else f", of another seed {line['null']:+.3g}".replace("-", "−")
            texts.append(f"{size} {line['group']} {change}{null} (difference {interval_text(delta)})")
    more = sum(verdict(delta) < 0 for _, delta in here)
    text = f"CKA falls more over depth than another full-rank seed's for {more} of {len(here)}"
    change = f"{text}: clearest, change over the whole depth: {'; '.join(texts)}"
    # a method is compared with full-rank of its own seed, and shares start and data with it: less drift than between
    # seeds may be these and says nothing
    return Claim(claim, decide([(delta, -1) for _, delta in here if verdict(delta) <= 0]), change)
