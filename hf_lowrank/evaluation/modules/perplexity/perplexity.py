"""Perplexity from losses that are known already, as a measurement of `evaluate`."""

import math
from typing import Any

import datasets
import evaluate
import torch

from hf_lowrank.metrics.perplexity import mean_loss, perplexity

_DESCRIPTION = """\
Perplexity and token-weighted mean loss with standard errors, from the losses of sequences. The measurement of the same
name at evaluate-measurement runs a model of the Hub over texts; this one takes the losses that an evaluation has
computed already, of any model: in a Trainer's `compute_metrics` for example.
"""

_CITATION = """\
@misc{beyondperplexity2026,
  title         = {Beyond Perplexity: A Geometric and Spectral Study of Low-Rank Pre-Training},
  year          = {2026},
  eprint        = {2605.13652},
  archivePrefix = {arXiv},
  url           = {https://arxiv.org/abs/2605.13652}
}

@article{jelinek1977perplexity,
  title   = {Perplexity: a measure of the difficulty of speech recognition tasks},
  author  = {Jelinek, Fred and Mercer, Robert L. and Bahl, Lalit R. and Baker, James K.},
  journal = {The Journal of the Acoustical Society of America},
  volume  = {62},
  number  = {S1},
  pages   = {S63},
  year    = {1977}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    losses: summed negative log-likelihood of each sequence, in nats.
    tokens: number of predicted tokens of each sequence. Losses of single tokens take 1 each, and the standard error
        is then over tokens.

Returns:
    dict of float:
    perplexity: exp of the token-weighted mean loss,
    loss: that mean, in nats a token,
    tokens: how many there are in all.
    With two or more sequences also perplexity_stderr (to first order) and loss_stderr, over sequences.

Raises:
    ValueError: different numbers of losses and tokens, or no predicted token.

Examples:

    >>> import evaluate
    >>> from hf_lowrank.evaluation.modules import path
    >>> perplexity = evaluate.load(path("perplexity"), module_type="measurement")
    >>> results = perplexity.compute(losses=[40.0, 20.0, 60.0], tokens=[20, 10, 30])
    >>> print(results["loss"], round(results["perplexity"], 4), results["perplexity_stderr"])
    2.0 7.3891 0.0
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Perplexity(evaluate.Measurement):
    """Perplexity of losses, token-weighted, with its standard error."""

    def _info(self) -> evaluate.MeasurementInfo:
        return evaluate.MeasurementInfo(
            module_type="measurement",
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"losses": datasets.Value("float64"), "tokens": datasets.Value("int64")}),
            reference_urls=["https://arxiv.org/abs/2605.13652"],
        )

    def _compute(self, losses: list[Any], tokens: list[Any]) -> dict[str, float]:
        counts = torch.tensor(tokens, dtype=torch.float64)
        loss = mean_loss(torch.tensor(losses, dtype=torch.float64), counts)
        results = {"tokens": float(counts.sum())}
        for name, found in {"loss": loss, "perplexity": perplexity(loss)}.items():
            results[name] = found.value
            if math.isfinite(found.stderr):
                results[f"{name}_stderr"] = found.stderr
        return results
