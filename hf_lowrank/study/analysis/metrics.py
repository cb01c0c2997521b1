"""The sixteen metrics by method, at the same step and at matched loss, in two forms that may rank methods differently.

The form `native` is the study's: the parameters as trained, random directions not normalised. The form `comparable` is
that of the dense matrices, along filter-normalised random directions. A method without dense matrices has no
comparable form.
"""

import json
import math
from collections.abc import Iterator
from functools import cache
from itertools import combinations
from typing import Any

import pandas as pd
from scipy.stats import kendalltau

from hf_lowrank.report.catalogue import headline_metrics
from hf_lowrank.report.significance import Delta
from hf_lowrank.report.values import describe
from hf_lowrank.study.analysis.figures import draw_metrics
from hf_lowrank.study.analysis.inputs import StudyData
from hf_lowrank.study.analysis.perplexity import differences_to_reference
from hf_lowrank.study.analysis.result import Analysis, Claim, Holds, decide, listed
from hf_lowrank.study.analysis.statistics import (
    Value,
    delta_columns,
    interval_text,
    mean_and_error,
    over_seeds,
    values_of,
    verdict,
    with_q,
)

__all__ = ["FORMS", "PLACES", "analyse_metrics", "in_form", "ranking"]

FORMS = ("native", "comparable")
PLACES = {"end": "at the last step", "matched": "at matched loss"}
_RANDOM, _TOP = "landscape/random/sharpness", "landscape/svd_1/sharpness"


def in_form(rows: pd.DataFrame, form: str) -> pd.DataFrame:
    """Return the rows of a metric that are of a form, one a run and way.

    Args:
        rows: of one metric.
        form: `native` takes dense rows where a run's layers are plain, which have no native ones.
    """
    normalize = rows["way"].map(lambda way: _settings(way).get("normalize", ""))
    if form == "comparable":
        return rows[normalize.isin(("", "filter")) & rows["space"].isin(("dense", ""))]
    rows = rows[normalize.isin(("", "none")) & rows["space"].isin(("native", "dense", ""))]
    native = set(rows.loc[rows["space"] == "native", "run"])
    return rows[(rows["space"] == "native") | ~rows["run"].isin(native)]


@cache
def _settings(way: str) -> dict[str, Any]:
    """A way of measuring as settings; that of an unknown text is no JSON."""
    return dict(json.loads(way)) if way.startswith("{") else {"text": way}


def _measured(data: StudyData) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Yield every metric in every form, place, size and way that two or more groups share, with its numbers."""
    names = {metric.name: metric for metric in headline_metrics()}
    for size in data.sizes:
        for place in PLACES:
            everything = data.at(place, size=size, kind="metric")
            # of a number between two runs, that to the reference speaks for a run
            peers = everything["peer"].map(data.runs["group"]).fillna("")
            everything = everything[(everything["peer_name"] == "") | (peers == data.reference.get(size))]
            for name, metric in names.items():
                rows = everything[everything["metric"] == name]
                if metric.id is None and not name.startswith("curvature/"):
                    continue
                for form in FORMS:
                    chosen = in_form(rows, form)
                    for way, of_way in chosen.groupby("way", sort=True):
                        one = of_way.drop_duplicates("run", keep="last")
                        if one["group"].nunique() > 1:
                            about = {"size": size, "place": place, "form": form, "id": metric.id or "", "metric": name}
                            yield {**about, "label": metric.label, "way": way}, one


def analyse_metrics(data: StudyData) -> Analysis:
    """Compare every metric of every group with the reference's, and its rankings in the two forms."""
    lines: list[dict[str, Any]] = []
    deltas: list[Delta] = []
    keys: list[Any] = []
    measured = list(_measured(data))
    words = _words([about for about, _ in measured])
    for (about, rows), said in zip(measured, words, strict=True):
        found = differences_to_reference(data, rows, about["size"])
        for group in data.groups(about["size"]):
            mine = rows[rows["group"] == group]["value"].tolist()
            if mine:
                mean, error = mean_and_error(mine)
                shown = {key: value for key, value in about.items() if key != "way"} | {"way": said, "group": group}
                lines.append({**shown, "seeds": len(mine), "mean": mean, "mean_stderr": error})
                delta = found.get(group, Delta(math.nan, None, None, None, "no number of the reference"))
                deltas.append(delta)
                # what is equal in both forms or places is one number
                number = (f"{mean:.9g}", f"{delta.value:.9g}", f"{delta.stderr or 0:.9g}")
                keys.append((about["size"], about["metric"], group, *number))
    deltas = with_q(deltas, keys)
    table = pd.DataFrame([line | delta_columns(delta) for line, delta in zip(lines, deltas, strict=True)])
    tested = list(zip(lines, deltas, strict=True))
    pairs, rankings = ranking(measured)
    claim = _claim(data, tested)
    return Analysis(
        key="metrics",
        title="The metrics, in native and in comparable form",
        question="Which metrics differ from full-rank's, and does the answer depend on the form and on the loss?",
        sentences=[*_counts(data, tested), *_disagreements(pairs), *_missing_forms(data, measured)],
        table=table,
        more={"pairs": pairs, "rankings": rankings},
        claim=claim,
        draw=lambda: draw_metrics(table),
    )


def _words(abouts: list[dict[str, Any]]) -> list[str]:
    """Describe the settings in which ways of one metric differ."""
    parsed = [_settings(about["way"]) for about in abouts]
    said = []
    for about, way in zip(abouts, parsed, strict=True):
        same = [other for each, other in zip(abouts, parsed, strict=True) if each["metric"] == about["metric"]]
        told = {key: value for key, value in way.items() if any(other.get(key) != value for other in same)}
        said.append(describe(told))
    return said


# ---- rankings ----


def ranking(measured: list[tuple[dict[str, Any], pd.DataFrame]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return all differences between two groups in both forms, and how well the two forms' rankings agree.

    Two forms disagree on a pair of groups if both tell the two apart (q < 0.05) and give opposite signs.
    """
    by_metric: dict[tuple[str, ...], dict[str, dict[str, list[Value]]]] = {}
    for about, rows in measured:
        key = (*(about[name] for name in ("size", "place", "id", "metric")), _plain_way(about["way"]))
        groups = {str(group): values_of(mine) for group, mine in rows.groupby("group", sort=True)}
        by_metric.setdefault(key, {})[about["form"]] = groups
    lines: list[dict[str, Any]] = []
    rankings: list[dict[str, Any]] = []
    for key, forms in by_metric.items():
        if len(forms) < 2:
            continue
        native, comparable = (forms[form] for form in FORMS)
        both = sorted(native.keys() & comparable.keys())
        head = dict(zip(("size", "place", "id", "metric"), key[:4], strict=True))
        means = [
            [mean_and_error([v.value for v in form[group]])[0] for group in both] for form in (native, comparable)
        ]
        tau = float(kendalltau(*means).statistic) if len(both) > 2 else math.nan
        rankings.append({**head, "groups": len(both), "kendall_tau": tau})
        for one, other in combinations(both, 2):
            deltas = [over_seeds(form[one], form[other]) for form in (native, comparable)]
            lines.append({**head, "one": one, "other": other, "deltas": deltas})
    flat = with_q([delta for line in lines for delta in line["deltas"]])
    for index, line in enumerate(lines):
        line["deltas"] = flat[2 * index : 2 * index + 2]
    table = []
    for line in lines:
        signs = [verdict(delta) for delta in line["deltas"]]
        row = {key: value for key, value in line.items() if key != "deltas"}
        for form, delta in zip(FORMS, line["deltas"], strict=True):
            row |= {f"{form}_{name}": value for name, value in delta_columns(delta).items() if name != "why"}
        table.append(row | {"disagree": signs[0] * signs[1] < 0})
    return pd.DataFrame(table), pd.DataFrame(rankings)


def _plain_way(way: str) -> str:
    return json.dumps({key: value for key, value in _settings(way).items() if key != "normalize"}, sort_keys=True)


# ---- words ----


def _counts(data: StudyData, tested: list[tuple[dict[str, Any], Delta]]) -> list[str]:
    sentences = []
    for size in data.sizes:
        for place, where in PLACES.items():
            for form in FORMS:
                here = [
                    (line, delta)
                    for line, delta in tested
                    if (line["size"], line["place"], line["form"]) == (size, place, form) and delta.p is not None
                ]
                if not here:
                    continue
                larger = _names([line for line, delta in here if verdict(delta) > 0])
                smaller = _names([line for line, delta in here if verdict(delta) < 0])
                said = [
                    f"{word} than full-rank's: {text}"
                    for word, text in (("larger", larger), ("smaller", smaller))
                    if text
                ]
                found = "; ".join(said) or "no difference to full-rank is told apart from the spread over seeds"
                sentences.append(f"{size}, {where}, {form} form ({len(here)} differences): {found}.")
    return sentences or [
        "No metric was measured with two or more seeds on both sides, so the data tell no difference."
    ]


def _names(lines: list[dict[str, Any]]) -> str:
    groups: dict[str, list[str]] = {}
    for line in lines:
        groups.setdefault(line["group"], []).append(line["id"] or line["label"])
    return "; ".join(f"{group} {', '.join(dict.fromkeys(names))}" for group, names in groups.items())


def _disagreements(pairs: pd.DataFrame) -> list[str]:
    if pairs.empty:
        return ["No metric was measured in both forms, so the data do not tell whether they rank methods alike."]
    opposite = pairs[pairs["disagree"]]
    if opposite.empty:
        told = int(((pairs["native_q"] < 0.05) & (pairs["comparable_q"] < 0.05)).sum())
        return [
            f"Of {len(pairs)} pairs of methods in a metric, both forms tell {told} apart, and none in opposite order."
        ]
    named: dict[str, list[str]] = {}
    for row in opposite.itertuples(index=False):
        named.setdefault(f"{row.id or row.metric} ({row.size}, {PLACES[row.place]})", []).append(
            f"{row.one}/{row.other}"
        )
    said = "; ".join(f"{name}: {', '.join(each)}" for name, each in named.items())
    return [
        f"Native and comparable form put {len(opposite)} of {len(pairs)} pairs of methods in opposite order: {said}."
    ]


def _missing_forms(data: StudyData, measured: list[tuple[dict[str, Any], pd.DataFrame]]) -> list[str]:
    sentences = []
    for size in data.sizes:
        having = {form: set() for form in FORMS}  # type: dict[str, set[str]]
        for about, rows in measured:
            if about["size"] == size and about["metric"] == _RANDOM:
                having[about["form"]] |= set(rows["group"])
        for form, groups in having.items():
            missing = [group for group in data.groups(size) if group not in groups]
            if missing:
                sentences.append(
                    f"{size}: sharpness along random directions in {form} form is missing for {listed(missing)}."
                )
    return sentences


def _claim(data: StudyData, tested: list[tuple[dict[str, Any], Delta]]) -> Claim:
    """Full-rank is sharper along random directions and flatter along the top one, in each form."""
    controls = set(data.runs.loc[(data.runs["method"] == "fullrank") | (data.runs["role"] == "control"), "group"])
    verdicts, texts = [], []
    for size in data.sizes:
        for form in FORMS:
            # at matched loss the loss itself explains nothing; where runs were not taken there, at the last step
            at_loss = any(line["place"] == "matched" and line["size"] == size for line, _ in tested)
            for place in ("matched",) if at_loss else ("end",):
                where = PLACES[place]
                # the others' sharpness minus full-rank's
                expected = [
                    (line, delta, -1 if line["metric"] == _RANDOM else 1)
                    for line, delta in tested
                    if (line["size"], line["form"], line["place"]) == (size, form, place)
                    and line["metric"] in (_RANDOM, _TOP)
                    and line["group"] not in controls
                    and math.isfinite(delta.value)
                ]
                if not expected:
                    continue
                holds = decide([(delta, sign) for _, delta, sign in expected])
                if {line["metric"] for line, *_ in expected} == {_RANDOM, _TOP}:
                    verdicts.append(holds)
                texts.append(f"{size}, {form} form, {where}: {_sides(expected)}")
    overall: Holds = "the data do not tell"
    if "holds" in verdicts and set(verdicts) <= {"holds", "the data do not tell"}:
        overall = "holds" if len(set(verdicts)) == 1 else "holds in part"
    elif "does not hold" in verdicts and set(verdicts) <= {"does not hold", "the data do not tell"}:
        overall = "does not hold"
    elif set(verdicts) - {"the data do not tell"}:
        overall = "holds in part"
    claim = "Full-rank is sharper along random directions and flatter along the top one"
    return Claim(claim, overall, "; ".join(texts) or "sharpness was not measured for full-rank and another method")


def _sides(expected: list[tuple[dict[str, Any], Delta, int]]) -> str:
    parts = []
    for metric, words in (
        (_RANDOM, "along random directions full-rank is sharper than"),
        (_TOP, "along the top one flatter than"),
    ):
        here = [(line, delta, sign) for line, delta, sign in expected if line["metric"] == metric]
        if here:
            as_said = sum(verdict(delta) * sign > 0 for _, delta, sign in here)
            against = sum(verdict(delta) * sign < 0 for _, delta, sign in here)
            line, delta, _ = max(here, key=lambda each: abs(each[1].value / (each[1].stderr or math.inf)))
            most = f"clearest: {line['group']} minus full-rank {interval_text(delta)}"
            parts.append(f"{words} {as_said} of {len(here)} (the reverse in {against}; {most})")
    return ", ".join(parts)
