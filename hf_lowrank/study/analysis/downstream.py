"""Downstream scores from the loss and the metrics: which runs and features there are, and what the fits say."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control

from hf_lowrank.report.catalogue import headline_metrics
from hf_lowrank.report.significance import format_p
from hf_lowrank.study.analysis.figures import draw_prediction
from hf_lowrank.study.analysis.inputs import StudyData
from hf_lowrank.study.analysis.metrics import in_form
from hf_lowrank.study.analysis.perplexity import LOSS
from hf_lowrank.study.analysis.prediction import Floats, partial_ranks, prediction_rows
from hf_lowrank.study.analysis.result import Analysis, Claim, Holds, listed
from hf_lowrank.study.analysis.statistics import LEVEL

__all__ = ["Features", "analyse_downstream", "features"]

# scores of a task, the first that it has
_SCORES = ("acc", "acc_norm", "exact_match", "em", "f1")
_ALL = "mean of tasks"
_SCHEMES = {"run": "run", "method": "method", "size": "size"}
_FEW, _FEWEST_RUNS, _FEWEST_GROUPS = 30, 8, 4
# a metric that fewer runs have is left out; else the runs without it are
_SHARE = 0.75


class Features:
    """What is predicted from what.

    Attributes:
        runs: of the study, those that have everything.
        loss: (n,).
        metrics: (n, k), logarithms where all numbers are positive and spread over more than a factor of 10.
        names: of the k metrics, as ids or labels.
        scores: by task, and their mean.
        notes: what is left out.
    """

    def __init__(
        self,
        runs: pd.DataFrame,
        loss: Floats,
        metrics: Floats,
        names: list[str],
        scores: Mapping[str, Floats],
        notes: list[str],
    ) -> None:
        self.runs, self.loss, self.metrics, self.names = runs, loss, metrics, names
        self.scores, self.notes = scores, notes

    @property
    def blocks(self) -> list[str]:
        """The group of each run, with its size."""
        return [f"{size}: {group}" for size, group in zip(self.runs["size"], self.runs["group"], strict=True)]


def _column(rows: pd.DataFrame) -> pd.Series:
    """One number a run, measured in the way that most runs share."""
    rows = rows[rows["way"] == rows["way"].mode().iloc[0]] if len(rows) else rows
    return rows.drop_duplicates("run", keep="last").set_index("run")["value"]


def features(data: StudyData) -> Features:
    """Gather loss, metrics in comparable form, and scores; runs without one of them are named and left out."""
    everything = data.at("end")
    loss = _column(everything[everything["metric"] == LOSS]).rename(LOSS)
    evaluations = everything[everything["kind"] == "evaluation"]
    tasks: dict[str, pd.Series] = {}
    for name in sorted(set(evaluations["metric"])):
        task, _, measure = name.rpartition("/")
        places = [other for other in _SCORES if f"{task}/{other}" in set(evaluations["metric"])]
        if places and measure.partition(",")[0] == places[0]:
            tasks[task] = _column(evaluations[evaluations["metric"] == name])
    metrics: dict[str, pd.Series] = {}
    for metric in headline_metrics():
        if metric.between_runs or metric.name in (LOSS, "perplexity"):
            continue
        rows = in_form(everything[(everything["metric"] == metric.name)], "comparable")
        if len(rows):
            metrics[metric.id or metric.label] = _column(rows)
    notes: list[str] = []
    having = data.kept[data.kept["run"].isin(loss.index)]
    table = pd.DataFrame({**metrics}, index=having["run"])
    scores = pd.DataFrame({**tasks}, index=having["run"])
    table, scores = _often(table, "metrics", notes), _often(scores, "tasks", notes)
    whole = table.notna().all(axis=1) & scores.notna().all(axis=1)
    if not whole.all():
        missing = having[having["run"].isin(whole.index[~whole])].groupby(["size", "group"], sort=False).size()
        words = [f"{count} of {group} ({size})" for (size, group), count in missing.items()]
        notes.append(f"left out because they lack a metric or a task: runs {listed(words)}")
    table, scores = table[whole], scores[whole]
    runs = having.set_index("run").loc[table.index]
    columns = [_scaled(table[name].to_numpy(float)) for name in table]
    matrix = np.stack(columns, axis=1) if columns else np.empty((len(table), 0))
    values = {str(name): scores[name].to_numpy(float) for name in scores}
    values = {_ALL: np.mean(list(values.values()), axis=0), **values} if values else {}
    return Features(runs, loss.loc[table.index].to_numpy(float), matrix, list(table), values, notes)


def _often(table: pd.DataFrame, what: str, notes: list[str]) -> pd.DataFrame:
    """The columns that enough runs have; a note names the others."""
    few = [str(name) for name in table if table[name].notna().mean() < _SHARE]
    if few:
        notes.append(f"left out because too few runs have them: {what} {listed(few)}")
    return table.drop(columns=few)


def _scaled(values: Floats) -> Floats:
    positive = len(values) > 0 and values.min() > 0 and values.max() > 10 * values.min()
    return np.log(values) if positive else values


def analyse_downstream(data: StudyData) -> Analysis:
    """Predict every task's scores, and their mean, for runs, methods and sizes that were left out."""
    given = features(data)
    title, key = "Prediction of downstream scores", "downstream"
    question = "Do the metrics predict downstream scores beyond what the loss predicts?"
    count, groups = len(given.runs), len(set(given.blocks))
    if not given.scores or not given.names or count < _FEWEST_RUNS or groups < _FEWEST_GROUPS:
        what = (
            f"{count} runs in {groups} groups have the loss, {len(given.names)} metrics and {len(given.scores)} scores"
        )
        text = (
            f"{what}: too few to predict anything (at least {_FEWEST_RUNS} runs in {_FEWEST_GROUPS} groups are needed)"
        )
        return Analysis(
            key, title, question, [f"{text}.", *(f"{note}." for note in given.notes)], pd.DataFrame(),
            claim=Claim(_CLAIM, "the data do not tell", text),
        )  # fmt: skip
    table = _table(given)
    ranks = _ranks(given)
    return Analysis(
        key=key,
        title=title,
        question=question,
        sentences=[*_sentences(given, table, ranks), *(f"{note}." for note in given.notes)],
        table=table,
        more={"partial_ranks": ranks},
        claim=_claim(given, table),
        draw=lambda: draw_prediction(table, ranks),
    )


_CLAIM = "Perplexity does not settle downstream scores, and the metrics help"


def _table(given: Features) -> pd.DataFrame:
    lines = []
    for task, scores in given.scores.items():
        if np.ptp(scores) == 0:
            continue
        for scheme, column in _SCHEMES.items():
            folds = list(given.runs.index) if column == "run" else given.runs[column].tolist()
            if len(set(folds)) > 1:
                row = prediction_rows(given.loss, given.metrics, scores, folds, given.blocks)
                lines.append({"task": task, "left_out": scheme, "runs": len(scores), "folds": len(set(folds)), **row})
    table = pd.DataFrame(lines)
    if len(table):
        table["q"] = false_discovery_control(table["p"])
    return table


def _ranks(given: Features) -> pd.DataFrame:
    scores = given.scores[_ALL]
    rho, p, q = partial_ranks(given.loss, given.metrics, scores, given.blocks)
    return pd.DataFrame({"metric": given.names, "task": _ALL, "partial_rank_correlation": rho, "p": p, "q": q})


# ---- words ----


def _number(row: Any, name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{row[name]:.2f} ({low:.2f} to {high:.2f})".replace("-", "−")


def _helps(row: Any) -> bool:
    return bool(row["q"] < LEVEL and row["gain_low"] > 0)


def _sentences(given: Features, table: pd.DataFrame, ranks: pd.DataFrame) -> list[str]:
    count, groups = len(given.runs), len(set(given.blocks))
    few = count < _FEW or groups < 10
    amount = f"{count} runs in {groups} groups and {len(given.names)} metrics"
    sentences = [f"With {amount} only a strong relation could be seen." if few else f"There are {amount}."]
    for row in table[table["task"] == _ALL].to_dict("records") if len(table) else []:
        start = (
            f"Leaving out one {row['left_out']}, the loss alone explains R² = {_number(row, 'loss_r2')} of the {_ALL}"
        )
        start += (
            f", with the metrics {_number(row, 'metrics_r2')}, with as many random numbers {_number(row, 'random_r2')}"
        )
        test = f"gain {_number(row, 'gain')}, permutation {format_p(row['p'])}, {format_p(row['q'], 'q')}"
        told = "the metrics help" if _helps(row) else "the data do not tell whether the metrics help"
        sentences.append(f"{start}: {told} ({test}).")
    single = table[(table["task"] != _ALL)] if len(table) else table
    helped = [f"{row['task']} ({row['left_out']} left out)" for row in single.to_dict("records") if _helps(row)]
    if len(single):
        which = f": {listed(helped)}" if helped else ""
        sentences.append(f"Of single tasks the metrics help in {len(helped)} of {len(single)} fits{which}.")
    strong = ranks[ranks["q"] < LEVEL]
    said = [
        f"{r.metric} ({r.partial_rank_correlation:+.2f}, {format_p(r.q, 'q')})" for r in strong.itertuples(index=False)
    ]
    none = "no metric's rank correlation with the scores, given the loss, is told apart from chance"
    sentences.append(
        f"Given the loss, scores go with {listed(said)}." if said else f"Of {len(ranks)} metrics, {none}."
    )
    return [sentence.replace("(-", "(−") for sentence in sentences]


def _claim(given: Features, table: pd.DataFrame) -> Claim:
    rows = table[table["task"] == _ALL].to_dict("records") if len(table) else []
    if not rows:
        return Claim(_CLAIM, "the data do not tell", "all runs have the same score")
    settled = [row["loss_r2_low"] > 0.9 for row in rows]
    helps = [_helps(row) for row in rows]
    holds: Holds = "the data do not tell"
    if all(helps) and not any(settled):
        holds = "holds"
    elif any(helps):
        holds = "holds in part"
    elif all(settled):
        holds = "does not hold"
    texts = [
        f"leaving out one {row['left_out']}, R² of the loss alone {_number(row, 'loss_r2')}, gain by the metrics "
        f"{_number(row, 'gain')}, {format_p(row['q'], 'q')}"
        for row in rows
    ]
    few = f"{len(given.runs)} runs in {len(set(given.blocks))} groups; "
    return Claim(_CLAIM, holds, few + "; ".join(texts))
