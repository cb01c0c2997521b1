"""Linear centred kernel alignment (CKA): how alike two representations of the same inputs are, from 0 to 1, whatever
rotation and scale separate them. The debiased form is near 0 for unrelated representations where the plain one is not.
"""

import math
from typing import Any

import datasets
import torch

from hf_lowrank.evaluation import measurement
from hf_lowrank.families.records import jackknife
from hf_lowrank.metrics.activations import StreamingCKA


class CKA(measurement.Measurement):
    """Linear CKA of two models' activations.

    Args:
        x: (positions, p) activations of one model: nested lists, numpy array or tensor.
        y: (positions, q) activations of the other for the same inputs, in the same order. Leave padding out of both.
        debiased: also return CKA from the unbiased estimate of HSIC: plain CKA is near 1 whatever the features
            are when
            there are not many more positions than features.
        groups: blocks of neighbouring positions that are left out in turn for the standard errors (default 8), fewer
            where there are fewer positions.

    Returns:
        dict of float: activation/cka and its standard error activation/cka_stderr; with `debiased` also
        activation/cka_debiased and activation/cka_debiased_stderr. CKA is nan if a representation is
        constant. There is
        no standard error if a block left out leaves too few positions, or with `groups` below 2.

    Raises:
        ValueError: different numbers of positions, fewer than 2 of them (4 for `debiased`), or rows of
            different lengths.

    Examples:

        >>> import evaluate
        >>> from hf_lowrank.evaluation.modules import path
        >>> cka = evaluate.load(path("cka"), module_type="measurement")
        >>> x = [[1.0, 2.0], [3.0, 1.0], [0.0, 2.0], [4.0, 4.0], [2.0, 5.0], [1.0, 1.0]]
        >>> turned = [[-2.0 * b, 2.0 * a] for a, b in x]
        >>> results = cka.compute(x=x, y=turned, debiased=True)
        >>> print(round(results["activation/cka"], 6), round(results["activation/cka_debiased"], 6))
        1.0 1.0
        >>> cka.add_batch(x=x[:4], y=turned[:4])
        >>> cka.add_batch(x=x[4:], y=turned[4:])
        >>> print(round(cka.compute()["activation/cka"], 6))
        1.0
    """

    features = datasets.Features(
        {"x": datasets.Sequence(datasets.Value("float64")), "y": datasets.Sequence(datasets.Value("float64"))}
    )
    citations = ("beyondperplexity2026", "kornblith2019similarity", "nguyen2021wide")
    reference_urls = (
        "https://arxiv.org/abs/1905.00414",
        "https://arxiv.org/abs/2010.15327",
    )

    def _compute(self, x: list[Any], y: list[Any], debiased: bool = False, groups: int = 8) -> dict[str, float]:
        first, second = _matrix(x, "x"), _matrix(y, "y")
        blocks: list[StreamingCKA] = []
        for rows in torch.arange(len(first)).tensor_split(max(1, min(groups, len(first)))):
            blocks.append(StreamingCKA(blocks[0].origin if blocks else None))
            blocks[-1].update(first[rows], second[rows])
        total = sum(blocks, StreamingCKA())
        results: dict[str, float] = {}
        for name, unbiased in {"cka": False, "cka_debiased": True}.items() if debiased else [("cka", False)]:
            value = total.value(unbiased)
            enough = len(first) - math.ceil(len(first) / len(blocks)) >= (4 if unbiased else 2)
            # added anew: a difference of sums would leave rounding where a representation is constant
            others = [sum((b for b in blocks if b is not block), StreamingCKA()) for block in blocks] if enough else []
            left_out = [other.value(unbiased) for other in others]
            results[f"activation/{name}"] = value
            if math.isfinite(stderr := jackknife(value, left_out).stderr):
                results[f"activation/{name}_stderr"] = stderr
        return results


def _matrix(rows: list[Any], name: str) -> torch.Tensor:
    if len({len(row) for row in rows}) != 1:
        raise ValueError(f"{name}: {len(rows)} rows of {len({len(row) for row in rows})} lengths: give one length")
    return torch.tensor(rows, dtype=torch.float64)
