"""Expected sharpness of a loss landscape: how much the loss rises on average when the weights move along a line, and
how
much that differs between directions. It takes the losses along the lines; `hf_lowrank.metrics.landscape` measures them
on any PyTorch model.
"""

import math
from typing import Any

import datasets
import numpy as np

from hf_lowrank.evaluation import measurement
from hf_lowrank.families.landscape import over_directions
from hf_lowrank.metrics.landscape import LossCurve, mean_curve


class LandscapeSharpness(measurement.Measurement):
    """Sharpness and variance of losses along directions through the weights.

    Args:
        x: list of grids, one a direction and all the same: step lengths, symmetric about an exact 0.
        losses: list of curves, one a direction: the loss at each step length, in any unit.
        subject: which directions these are, the middle part of the names: "random" (default), "svd_1", "svd_5", ...

    Returns:
        dict of float, in the unit of the losses (its square for the variance):
        landscape/random/sharpness: mean over x > 0 of (L(x) + L(-x)) / 2 - L(0), of the mean curve,
        landscape/random/variance: variance over the directions (ddof 0), averaged over the grid,
        landscape/random/center_loss, min_loss and center_to_min of the mean curve.
        Random directions are a sample: with two or more of them there is landscape/random/sharpness_stderr,
        with three or
        more landscape/random/variance_stderr (a jackknife).

    Raises:
        ValueError: no curve, not one loss a step length, different grids, or a grid that is not symmetric about a 0.

    Examples:

        >>> import evaluate
        >>> from hf_lowrank.evaluation.modules import path
        >>> sharpness = evaluate.load(path("landscape_sharpness"), module_type="measurement")
        >>> grid = [-0.5, 0.0, 0.5]
        >>> results = sharpness.compute(x=[grid, grid], losses=[[4.0, 3.0, 4.0], [6.0, 3.0, 6.0]])
        >>> print(results["landscape/random/sharpness"], results["landscape/random/sharpness_stderr"])
        2.0 1.0
        >>> for curve in ([4.0, 3.0, 4.0], [6.0, 3.0, 6.0]):
        ...     sharpness.add(x=grid, losses=curve)
        >>> sharpness.compute() == results
        True

        Of a model, with `loss_fn(model)` a number:

        >>> import torch
        >>> from hf_lowrank.metrics import landscape
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> def loss_fn(model):
        ...     return model.weight.square().sum().item()
        >>> grid = landscape.symmetric_grid(0.1, points=5)
        >>> for seed in range(4):
        ...     direction = landscape.random_direction(model, seed, normalize="unit")
        ...     curve = landscape.loss_curve(model, loss_fn, direction, grid)
        ...     sharpness.add(x=curve.x, losses=curve.loss)
        >>> print(round(sharpness.compute()["landscape/random/sharpness"], 5))
        0.00625
    """

    features = datasets.Features(
        {
            "x": datasets.Sequence(datasets.Value("float64")),
            "losses": datasets.Sequence(datasets.Value("float64")),
        }
    )
    citations = ("beyondperplexity2026", "li2018visualizing")
    reference_urls = (
        "https://arxiv.org/abs/2605.13652",
        "https://arxiv.org/abs/1712.09913",
    )

    def _compute(self, x: list[Any], losses: list[Any], subject: str = "random") -> dict[str, float]:
        curves = [
            LossCurve(np.array(grid, dtype=np.float64), np.array(loss, dtype=np.float64))
            for grid, loss in zip(x, losses, strict=True)
        ]
        mean = mean_curve(curves)
        results: dict[str, float] = {}
        for name, found in over_directions(curves).items():
            results[f"landscape/{subject}/{name}"] = found.value
            if subject == "random" and math.isfinite(found.stderr):
                results[f"landscape/{subject}/{name}_stderr"] = found.stderr
        for name in ("center_loss", "min_loss", "center_to_min"):
            results[f"landscape/{subject}/{name}"] = getattr(mean, name)
        return results
