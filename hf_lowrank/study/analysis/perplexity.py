"""Perplexity by method at equal tokens, with the optimizer's memory and the time."""

import math
from typing import Any

import pandas as pd

from hf_lowrank.report.significance import Delta
from hf_lowrank.study.analysis.figures import draw_perplexity
from hf_lowrank.study.analysis.inputs import StudyData
from hf_lowrank.study.analysis.result import Analysis, listed
from hf_lowrank.study.analysis.statistics import (
    delta_columns,
    interval_text,
    mean_and_error,
    over_seeds,
    values_of,
    verdict,
    with_q,
)

__all__ = ["LOSS", "analyse_perplexity", "differences_to_reference"]

LOSS = "validation_loss"
_COSTS = ("optimizer_state_bytes", "peak_memory_bytes", "wall_time_seconds", "tokens_per_second")


def differences_to_reference(data: StudyData, rows: pd.DataFrame, size: str) -> dict[str, Delta]:
    """Return by group what its numbers differ from the reference's, not yet corrected.

    Args:
        rows: of one metric that was measured in one way, one number a run.
    """
    base = values_of(rows[rows["group"] == data.reference.get(size)])
    deltas = {}
    for group in data.groups(size):
        ours = values_of(rows[rows["group"] == group])
        if ours and base and group != data.reference.get(size):
            deltas[group] = over_seeds(ours, base)
    return deltas


def losses(data: StudyData, size: str, place: str = "end") -> pd.DataFrame:
    """Return the validation losses of a size, measured in the way that most of its runs share."""
    rows = data.at(place, metric=LOSS, size=size)
    return rows[rows["way"] == rows["way"].mode().iloc[0]] if len(rows) else rows


def analyse_perplexity(data: StudyData) -> Analysis:
    """Compare the losses of all groups with the reference's, size by size."""
    lines: list[dict[str, Any]] = []
    deltas: list[Delta] = []
    for size in data.sizes:
        rows = losses(data, size)
        found = differences_to_reference(data, rows, size)
        for group in data.groups(size):
            mine = rows[rows["group"] == group]
            if mine.empty:
                continue
            mean, error = mean_and_error(mine["value"].tolist())
            lines.append(
                {
                    "size": size,
                    "group": group,
                    "seeds": len(mine),
                    "tokens": data.runs.loc[mine["run"], "tokens"].iloc[0],
                    "validation_loss": mean,
                    "validation_loss_stderr": error,
                    "perplexity": math.exp(min(mean, 700.0)),
                    **{cost: _cost(data, mine["run"].tolist(), cost) for cost in _COSTS},
                }
            )
            deltas.append(found.get(group, Delta(math.nan, None, None, None, "the reference")))
    deltas = with_q(deltas)
    table = pd.DataFrame([line | delta_columns(delta) for line, delta in zip(lines, deltas, strict=True)])
    return Analysis(
        key="perplexity",
        title="Perplexity, memory and time",
        question="Which methods end at another loss than full-rank after the same number of tokens, and at what cost?",
        sentences=_sentences(data, lines, deltas),
        table=table,
        draw=lambda: draw_perplexity(table),
    )


def _cost(data: StudyData, runs: list[int], name: str) -> float:
    values = data.numbers[
        (data.numbers["metric"] == name) & (data.numbers["kind"] == "cost") & data.numbers["run"].isin(runs)
    ]["value"].dropna()
    return float(values.mean()) if len(values) else math.nan


def _sentences(data: StudyData, lines: list[dict[str, Any]], deltas: list[Delta]) -> list[str]:
    sentences = []
    for size in data.sizes:
        here = [(line, delta) for line, delta in zip(lines, deltas, strict=True) if line["size"] == size]
        reference = data.reference.get(size)
        if not here:
            sentences.append(f"{size}: no validation loss was measured at a run's end.")
            continue
        if reference is None:
            sentences.append(f"{size}: there is no full-rank run to compare with.")
            continue
        tokens = here[0][0]["tokens"]
        after = "" if pd.isna(tokens) else f" after {int(tokens):,} tokens"
        said = []
        for sign, word in ((-1, "lower"), (1, "higher")):
            said += [
                f"{line['group']} has a {word} loss than {reference} ({interval_text(delta)})"
                for line, delta in here
                if verdict(delta) == sign
            ]
        unclear = [
            f"{line['group']} ({interval_text(delta)})"
            for line, delta in here
            if line["group"] != reference and verdict(delta) == 0
        ]
        if unclear:
            said.append(f"the data do not tell whether the loss of {listed(unclear)} differs from that of {reference}")
        sentences.append(f"{size}{after}: {'; '.join(said) or f'only {reference} has a loss'}.")
    return sentences
