"""The families of metrics as plain data: names, labels, units, tables, figures and captions, each written once.

Log, report, card, figures and comparisons read it; `hf_lowrank.families` measures the families. The numbers H1 to H16
are those of the study, arXiv 2605.13652. `register` adds a family of another package.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from hf_lowrank.plugins import load_plugins

__all__ = [
    "ACTIVATION", "CATALOGUE", "CURVATURE", "HEADLINE_METRICS", "INTERPOLATION", "LANDSCAPE", "LOSS", "SPECTRAL",
    "Entry", "HeadlineMetric", "Picture", "Table", "entries", "entry_of", "headline_metric", "headline_metrics",
    "register", "tables",
]  # fmt: skip


@dataclass(frozen=True)
class HeadlineMetric:
    """One metric of the headline table.

    `id` is its number (H1 to H16) or None for a scalar beside the sixteen; `name` is the one used in logs and reports;
    `label` is for people; `axis` is the quantity with its unit, for an axis of a figure. A metric `between_runs`
    compares a run with another one, so as a baseline's number it says nothing.
    """

    id: str | None
    name: str
    label: str
    axis: str
    between_runs: bool = False


_BetweenRuns = partial(HeadlineMetric, between_runs=True)


@dataclass(frozen=True)
class Table:
    """The columns of a parquet table: numbers and texts that must be there, and numbers that may be."""

    numbers: Sequence[str]
    texts: Sequence[str] = ()
    optional: Sequence[str] = ()


@dataclass(frozen=True)
class Picture:
    """A figure of one run.

    `file` is its name in `publish/figures`; `source` in `publish/metrics` is what it is drawn from: a parquet table of
    `Entry.tables` (by default the one with the family's name) or the family's records as JSON. `draw` names the
    function that draws it, `package.module:function`; by default it has the file's name and is in
    `hf_lowrank.figures.<family>`. It takes the source as a data frame and returns a matplotlib figure, or None if
    there is nothing to draw.
    """

    file: str
    caption: str
    source: str = ""
    draw: str = ""


@dataclass(frozen=True)
class Entry:
    """What a reader of reports knows about a family.

    Attributes:
        name: of the family, and the first part of its metrics' names.
        title: heading of its metrics in a comparison.
        metrics: its headline metrics; what else it measures goes by its name.
        pictures: of one run, in the order of the card.
        tables: parquet tables in `publish/metrics` by name.
        file: stem of its files in `publish/metrics`; default: its name.
    """

    name: str
    title: str
    metrics: tuple[HeadlineMetric, ...]
    pictures: tuple[Picture, ...] = ()
    tables: Mapping[str, Table] = field(default_factory=dict)
    file: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "file", self.file or self.name)
        pictures = tuple(replace(each, source=each.source or f"{self.name}.parquet") for each in self.pictures)
        object.__setattr__(self, "pictures", pictures)

    def metric_names(self) -> tuple[str, ...]:
        """The names of the headline metrics."""
        return tuple(metric.name for metric in self.metrics)

    def names(self) -> set[str]:
        """What no other family may be called, measure or draw."""
        return {self.name, *self.metric_names(), *(picture.file for picture in self.pictures)}


# axes that several metrics share
_RISE, _VARIANCE = "loss increase (nats)", "variance (nats²)"
_RANK, _CURVATURE = "effective rank / min(m, n)", "nats per squared weight"

LOSS = Entry(
    "loss",
    "Loss",
    (
        HeadlineMetric(None, "validation_loss", "Validation loss", "nats per token"),
        HeadlineMetric(None, "perplexity", "Validation perplexity", "perplexity (per token)"),
    ),
    (Picture("loss.png", "Training and validation loss", "training.parquet"),),
    {"training": Table(["step"], [], ["loss", "eval_loss", "learning_rate", "grad_norm"])},
    file="validation",
)

LANDSCAPE = Entry(
    "landscape",
    "Loss landscape",
    (
        HeadlineMetric("H1", "landscape/random/sharpness", "Expected sharpness, random directions", _RISE),
        HeadlineMetric("H2", "landscape/random/variance", "Loss variance over random directions", _VARIANCE),
        HeadlineMetric("H3", "landscape/svd_1/sharpness", "Expected sharpness, top SVD direction", _RISE),
        HeadlineMetric("H4", "landscape/svd_k/sharpness", "Expected sharpness, top K SVD directions", _RISE),
        HeadlineMetric("H5", "landscape/svd_k/variance", "Loss variance over top K SVD directions", _VARIANCE),
    ),
    (
        Picture(
            "landscape_curves.png",
            "Loss along random, singular and trajectory directions at the last measured step",
            "landscape.parquet",
        ),
        Picture("sharpness_over_steps.png", "Expected sharpness and loss variance over training", "landscape.json"),
    ),
    {"landscape": Table(["step", "direction", "x", "loss"], ["space", "subject"])},
)

INTERPOLATION = Entry(
    "interpolation",
    "Interpolation",
    (
        HeadlineMetric("H6", "interpolation/consecutive/barrier", "Barrier between neighbouring checkpoints", "nats"),
        _BetweenRuns("H7", "interpolation/cross_method/barrier", "Barrier to another method", "nats"),
    ),
    (
        Picture("interpolation_paths.png", "Loss on straight lines to the neighbouring checkpoint and to other runs"),
        Picture(
            "barriers_over_steps.png",
            "Loss barriers to the neighbouring checkpoint and to other runs over training",
            "interpolation.json",
        ),
        Picture(
            "barrier_map.png",
            "Loss barriers between runs, as trained and after aligning units and heads",
            "barrier_map.parquet",
        ),
    ),
    {
        "interpolation": Table(["step", "other_step", "alpha", "loss"], ["space", "subject", "other"], ["stderr"]),
        "barrier_map": Table(["step", "barrier"], ["run_a", "method_a", "run_b", "method_b", "aligned"]),
    },
)

# W: a weight matrix (m, n); dW: its change since the measurement before
_SPECTRAL_METRICS = (
    HeadlineMetric("H8", "spectral/weight/effective_rank_score", "Effective rank score of W", _RANK),
    HeadlineMetric("H9", "spectral/weight/stable_rank", "Stable rank of W", "stable rank"),
    HeadlineMetric("H10", "spectral/weight/spectral_gap", "Spectral gap of W", "(s₁ − s₂) / s₁"),
    HeadlineMetric("H11", "spectral/update/relative_norm", "Relative norm of dW", "‖dW‖ / ‖W‖ (Frobenius)"),
    HeadlineMetric("H12", "spectral/update/effective_rank_score", "Effective rank score of dW", _RANK),
    HeadlineMetric("H13", "spectral/update/stable_rank", "Stable rank of dW", "stable rank"),
)
SPECTRAL = Entry(
    "spectral",
    "Spectra",
    _SPECTRAL_METRICS,
    (
        Picture("spectra_over_steps.png", "Spectral metrics over training: mean and spread over the weight matrices"),
        Picture("spectra_over_depth.png", "Spectral metrics over depth at the last measured step, by kind of module"),
    ),
    {"spectral": Table(["step", "layer"], ["space", "name", "module"], [metric.name for metric in _SPECTRAL_METRICS])},
)

_SIMILARITIES = ("activation/relative_l2", "activation/cosine", "activation/cka", "activation/cka_debiased")
ACTIVATION = Entry(
    "activation",
    "Activations",
    (
        _BetweenRuns("H14", "activation/relative_l2", "Relative L2 distance to the baseline's activations", "ratio"),
        _BetweenRuns("H15", "activation/cosine", "Cosine similarity to the baseline's activations", "cosine"),
        _BetweenRuns("H16", "activation/cka", "Linear CKA with the baseline's activations", "CKA"),
    ),
    (
        Picture(
            "similarity_over_steps.png",
            "Activations compared with the baseline's over training: mean and range over layers",
            "activation.parquet",
        ),
        Picture("similarity_over_depth.png", "Activations compared with the baseline's over depth"),
    ),
    {
        "activation": Table(
            ["step", "layer", "baseline_step"],
            ["baseline"],
            [*_SIMILARITIES, *(f"{name}_stderr" for name in _SIMILARITIES)],
        )
    },
)

CURVATURE = Entry(
    "curvature",
    "Curvature",
    (
        HeadlineMetric(None, "curvature/top_eigenvalue", "Top eigenvalue of the Hessian", _CURVATURE),
        HeadlineMetric(None, "curvature/trace", "Trace of the Hessian", _CURVATURE),
    ),
    (Picture("curvature_over_steps.png", "Top eigenvalue and trace of the Hessian over training", "curvature.json"),),
)

# this package's families, in the order of the card's figures
CATALOGUE = (LOSS, LANDSCAPE, CURVATURE, INTERPOLATION, SPECTRAL, ACTIVATION)
_ENTRIES = {entry.name: entry for entry in CATALOGUE}


def _in_order(catalogue: Iterable[Entry]) -> tuple[HeadlineMetric, ...]:
    """Return the families' metrics in the order of the headline table: the loss, H1 to H16, the others."""
    metrics = [metric for entry in catalogue for metric in entry.metrics]
    numbers = {metric: int(metric.id[1:]) for metric in metrics if metric.id} | dict.fromkeys(LOSS.metrics, 0)
    return tuple(sorted(metrics, key=lambda metric: numbers.get(metric, math.inf)))


# this package's metrics; `headline_metrics` has those of other packages' families as well
HEADLINE_METRICS = _in_order(CATALOGUE)


def register(entry: Entry) -> Entry:
    """Add a family of another package after ours; return it.

    Raises:
        ValueError: another family has its name or one of its metrics or figures.
    """
    for other in _ENTRIES.values():
        shared = entry.names() & other.names()
        if shared and other != entry:
            raise ValueError(f"family {entry.name!r} cannot be registered: {other.name!r} has {', '.join(shared)}")
    _ENTRIES[entry.name] = entry
    return entry


def entries() -> tuple[Entry, ...]:
    """All families: ours, then those of other packages."""
    load_plugins()
    return tuple(_ENTRIES.values())


def entry_of(metric: str) -> Entry | None:
    """Return the family that a metric belongs to, None if no family is known for it."""
    family = metric.partition("/")[0]
    return next((entry for entry in entries() if family == entry.name or metric in entry.metric_names()), None)


def headline_metrics() -> tuple[HeadlineMetric, ...]:
    """All headline metrics in the order of the headline table."""
    return _in_order(entries())


def headline_metric(name: str) -> HeadlineMetric | None:
    """Return the headline metric with this name, None if there is none."""
    return next((metric for metric in headline_metrics() if metric.name == name), None)


def tables() -> dict[str, Table]:
    """All parquet tables in `publish/metrics`, by name."""
    return {name: table for entry in entries() for name, table in entry.tables.items()}
