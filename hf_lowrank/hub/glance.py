"""What a card shows first: the loss against its baseline, the sixteen headline metrics, three figures."""

from collections.abc import Sequence
from dataclasses import dataclass

from hf_lowrank.report.baseline import Pair
from hf_lowrank.report.catalogue import headline_metrics
from hf_lowrank.report.tables import HeadlineRow

__all__ = ["Glance", "Line", "at_a_glance", "first_figures"]

_LOSS, _PERPLEXITY = "validation_loss", "perplexity"
# the figures that say most, before any other
_FIRST = (
    *("loss.png", "landscape_curves.png", "spectra_over_steps.png", "spectra_over_depth.png"),
    *("interpolation_paths.png", "similarity_over_depth.png"),
)


@dataclass(frozen=True)
class Line:
    """A metric on one line: its number and label, its value, the baseline's, and the difference of the two."""

    id: str | None
    label: str
    value: str
    baseline: str = ""
    difference: str = ""


@dataclass(frozen=True)
class Glance:
    """The first part of a card.

    Attributes:
        loss, perplexity: None where it was not measured.
        lines: the measured ones of H1 to H16, one line each.
        missing: the numbers of the others.
    """

    loss: Line | None
    perplexity: Line | None
    lines: Sequence[Line]
    missing: Sequence[str]


def at_a_glance(rows: Sequence[HeadlineRow], pairs: Sequence[Pair], baseline: str | None) -> Glance:
    """Choose one number of each metric.

    A number that is compared with the baseline comes before one that is not, a barrier to the baseline before those to
    other runs, dense weights before others.

    Args:
        rows: all headline metrics of a run.
        pairs: its numbers beside the baseline's.
        baseline: the baseline's name, None without one.
    """
    beside = {pair.number.column: pair for pair in pairs}

    def place(row: HeadlineRow) -> tuple[bool, bool, bool]:
        other = row.entry.settings.get("other")
        return row.number.column not in beside, other is not None and other != baseline, row.entry.space != "dense"

    lines: dict[str, Line] = {}
    for row in sorted((row for row in rows if row.entry.value is not None), key=place):
        other = row.entry.settings.get("other") if row.metric.between_runs else None
        label = row.metric.label if other is None else f"{row.metric.label} ({other})"
        pair = beside.get(row.number.column)
        compared = () if pair is None else (pair.baseline_text, pair.delta.size)
        lines.setdefault(row.metric.name, Line(row.metric.id, label, row.text, *compared))
    numbered = [metric for metric in headline_metrics() if metric.id is not None]
    return Glance(
        loss=lines.get(_LOSS),
        perplexity=lines.get(_PERPLEXITY),
        lines=[lines[metric.name] for metric in numbered if metric.name in lines],
        missing=[str(metric.id) for metric in numbered if metric.name not in lines],
    )


def first_figures(figures: Sequence[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return the three figures that say most, and the others; a figure is its file's name and its caption."""
    by_name = dict(figures)
    chosen = [name for name in (*_FIRST, *by_name) if name in by_name]
    first = list(dict.fromkeys(chosen))[:3]
    return [(name, by_name[name]) for name in first], [(name, text) for name, text in figures if name not in first]
