"""The sixteen headline metrics and the scalars shown beside them: numbers, names and labels, written once.

Numbers and names are those of the project's metric definitions; the study is arXiv 2605.13652.
"""

from dataclasses import dataclass

__all__ = ["HEADLINE_METRICS", "HeadlineMetric"]


@dataclass(frozen=True)
class HeadlineMetric:
    """One metric of the headline table.

    `id` is its number (H1 to H16) or None for a scalar beside the sixteen; `name` is the one used in logs and reports;
    `label` is for people; `axis` is the quantity with its unit, for an axis of a figure.
    """

    id: str | None
    name: str
    label: str
    axis: str


# W: a weight matrix (m, n); dW: its change since the measurement before
HEADLINE_METRICS: tuple[HeadlineMetric, ...] = (
    HeadlineMetric(None, "validation_loss", "Validation loss", "nats per token"),
    HeadlineMetric(None, "perplexity", "Validation perplexity", "perplexity (per token)"),
    HeadlineMetric(
        "H1", "landscape/random/sharpness", "Expected sharpness, random directions", "loss increase (nats)"
    ),
    HeadlineMetric("H2", "landscape/random/variance", "Loss variance over random directions", "variance (nats²)"),
    HeadlineMetric("H3", "landscape/svd_1/sharpness", "Expected sharpness, top SVD direction", "loss increase (nats)"),
    HeadlineMetric(
        "H4", "landscape/svd_k/sharpness", "Expected sharpness, top K SVD directions", "loss increase (nats)"
    ),
    HeadlineMetric("H5", "landscape/svd_k/variance", "Loss variance over top K SVD directions", "variance (nats²)"),
    HeadlineMetric("H6", "interpolation/consecutive/barrier", "Barrier between neighbouring checkpoints", "nats"),
    HeadlineMetric("H7", "interpolation/cross_method/barrier", "Barrier to another method", "nats"),
    HeadlineMetric(
        "H8", "spectral/weight/effective_rank_score", "Effective rank score of W", "effective rank / min(m, n)"
    ),
    HeadlineMetric("H9", "spectral/weight/stable_rank", "Stable rank of W", "stable rank"),
    HeadlineMetric("H10", "spectral/weight/spectral_gap", "Spectral gap of W", "(s₁ − s₂) / s₁"),
    HeadlineMetric("H11", "spectral/update/relative_norm", "Relative norm of dW", "‖dW‖ / ‖W‖ (Frobenius)"),
    HeadlineMetric(
        "H12", "spectral/update/effective_rank_score", "Effective rank score of dW", "effective rank / min(m, n)"
    ),
    HeadlineMetric("H13", "spectral/update/stable_rank", "Stable rank of dW", "stable rank"),
    HeadlineMetric("H14", "activation/relative_l2", "Relative L2 distance to the baseline's activations", "ratio"),
    HeadlineMetric("H15", "activation/cosine", "Cosine similarity to the baseline's activations", "cosine"),
    HeadlineMetric("H16", "activation/cka", "Linear CKA with the baseline's activations", "CKA"),
    HeadlineMetric(None, "curvature/top_eigenvalue", "Top eigenvalue of the Hessian", "nats per squared weight"),
    HeadlineMetric(None, "curvature/trace", "Trace of the Hessian", "nats per squared weight"),
)
