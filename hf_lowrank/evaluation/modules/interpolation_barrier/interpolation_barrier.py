"""Loss barrier between two models: how high the loss rises on the straight line between their weights. It takes the
losses on the line; `hf_lowrank.metrics.interpolation` measures them on any PyTorch model.
"""

from typing import Any

import datasets
import numpy as np

from hf_lowrank.evaluation import measurement
from hf_lowrank.metrics.interpolation import barrier


class InterpolationBarrier(measurement.Measurement):
    """Barrier of the loss on the line between two sets of weights.

    Args:
        alphas: list of positions on the line, 0 (one model) and 1 (the other) and at least one between them; positions
            beyond 0 and 1 do not count.
        losses: list of losses, one a position, in any unit.
        subject: what the two models are to each other, the middle part of the names: "consecutive" checkpoints
            of a run
            (default), "cross_method", "cross_seed", ...

    Returns:
        dict of float:
        interpolation/consecutive/barrier: highest loss between the ends minus the mean of the two end losses,
        interpolation/consecutive/barrier_chord: highest excess over the straight line between the end losses,
        interpolation/consecutive/barrier_alpha: where the highest loss between the ends lies.
        They are exact for the given losses: a standard error needs the losses of single sequences, as in
        `hf-lowrank measure`.

    Raises:
        ValueError: not one loss a position, or positions without 0, 1 or a point between them.

    Examples:

        >>> import evaluate
        >>> from hf_lowrank.evaluation.modules import path
        >>> interpolation_barrier = evaluate.load(path("interpolation_barrier"), module_type="measurement")
        >>> results = interpolation_barrier.compute(alphas=[0.0, 0.25, 0.5, 1.0], losses=[3.0, 5.0, 4.5, 2.0])
        >>> print(results["interpolation/consecutive/barrier"], results["interpolation/consecutive/barrier_chord"])
        2.5 2.25
        >>> print(results["interpolation/consecutive/barrier_alpha"])
        0.25

        Of two state dicts, with `loss_fn(model)` a number:

        >>> import numpy
        >>> import torch
        >>> from hf_lowrank.metrics import interpolation
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> first = {"weight": torch.tensor([[-1.0]])}
        >>> second = {"weight": torch.tensor([[1.0]])}
        >>> def loss_fn(model):
        ...     return 1 - model.weight.item() ** 2
        >>> alphas = numpy.linspace(0, 1, 21)
        >>> losses = interpolation.loss_path(model, first, second, loss_fn, alphas)
        >>> results = interpolation_barrier.compute(alphas=alphas, losses=losses, subject="cross_seed")
        >>> print(results["interpolation/cross_seed/barrier"])
        1.0
    """

    features = datasets.Features({"alphas": datasets.Value("float64"), "losses": datasets.Value("float64")})
    citations = ("beyondperplexity2026", "frankle2020linear")
    reference_urls = (
        "https://arxiv.org/abs/2605.13652",
        "https://arxiv.org/abs/1912.05671",
    )

    def _compute(self, alphas: list[Any], losses: list[Any], subject: str = "consecutive") -> dict[str, float]:
        found = barrier(np.array(alphas, dtype=np.float64), np.array(losses, dtype=np.float64))
        named = {"barrier": found.value, "barrier_chord": found.chord, "barrier_alpha": found.alpha}
        return {f"interpolation/{subject}/{name}": value for name, value in named.items()}
