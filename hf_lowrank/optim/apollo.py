"""APOLLO's AdamW (arXiv 2412.05270, Algorithm 1) with the arithmetic of the official `apollo-torch`.

Shapes: G: (m, n), P: (r, n) or (m, r) random, R and N as in `projector`; phi: (m, 1), (1, n) or a scalar.
"""

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_lowrank.optim.adam import step_size
from hf_lowrank.optim.projected import Matrix, ProjectedAdamW
from hf_lowrank.optim.scaling import limit_growth, norms, sum_over_rows

__all__ = ["ApolloAdamW", "check_scale_type"]

SCALE_TYPES = ("channel", "tensor")


def check_scale_type(scale_type: str) -> None:
    """`ValueError` for a `scale_type` that there is not."""
    if scale_type not in SCALE_TYPES:
        raise ValueError(f"scale_type={scale_type!r}: it is one of {', '.join(SCALE_TYPES)}")


class ApolloAdamW(ProjectedAdamW):
    """Gradient descent scaled by Adam in a random projection of rank r, for the groups that carry `r`.

    Such a group holds matrices only and may carry `update_proj_gap` (200), `scale` (1.0) and `scale_type` ("channel"
    or "tensor"). The shorter side is projected by entries of N(0, 1/r), re-drawn every `update_proj_gap` steps. With
    phi = ||N|| / (||R|| + 1e-8) per channel (row where m >= n, column otherwise) or for the tensor, and `limit` the
    factor that lets ||G phi|| grow by 1 % a step: W <- (1 - lr wd) (W - lr_t sqrt(scale) limit G phi).

    State: as in `ProjectedAdamW`, and `scaled_norm`, a scalar, and `seed`, the number that the next projection is
    drawn from. The projection is kept, as in the official package, rather than drawn again in every step.

    Args:
        seed: with 0 each parameter's first projection is the official package's; any other gives other draws.
    """

    options: ClassVar[dict[str, Any]] = {"update_proj_gap": 200, "scale": 1.0, "scale_type": "channel"}
    factor: ClassVar[str] = "scale"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        self._seed = seed
        super().__init__(params, lr, betas, eps, weight_decay)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if "r" in param_group:
            check_scale_type(param_group.get("scale_type", "channel"))
            # the shorter side alone, as the paper has it
            param_group = {**param_group, "proj_type": "std"}
        super().add_param_group(param_group)

    def add_state(self, state: dict[str, Any], W: Tensor, index: int, place: int) -> None:
        earlier = sum(len(group["params"]) for group in self.param_groups[:index])
        state["scaled_norm"] = W.new_zeros(())
        state["seed"] = (earlier + place + 1 + 1_000_003 * self._seed) % 2**63

    def refresh_projectors(self, matrices: list[Matrix], group: dict[str, Any]) -> None:
        for x in matrices:
            (kept,) = x.projector
            m, n = x.shape
            shape = (group["r"], n) if x.where == "right" else (m, group["r"])
            generator = torch.Generator(x.G.device).manual_seed(x.state["seed"])
            fresh = torch.randn(shape, generator=generator, device=x.G.device) / math.sqrt(group["r"])
            kept.copy_(x.shards.local_rows(fresh) if x.shards is not None and x.where == "left" else fresh)
            x.state["seed"] = next_seed(x.state["seed"])

    def update(self, matrices: list[Matrix], N: list[Tensor], group: dict[str, Any]) -> None:
        decay, root = 1 - group["lr"] * group["weight_decay"], math.sqrt(group["scale"])
        scalings = _scalings(matrices, N, group["scale_type"])
        squares = [
            (phi * norms(x.G, None if phi.ndim == 0 else 1 if x.where == "right" else 0)).square().sum()
            for x, phi in zip(matrices, scalings, strict=True)
        ]
        for x, phi, square in zip(matrices, scalings, sum_over_rows(matrices, squares), strict=True):
            limit = limit_growth(square.sqrt(), x.state["scaled_norm"])
            if decay != 1:
                x.W.mul_(decay)
            step = step_size(group["lr"], group["betas"], x.t) * decay * root
            x.W.addcmul_(x.G, (phi * limit).to(x.G.dtype), value=-step)


def next_seed(seed: int) -> int:
    """The seed of the next projection: the 15th number that a generator seeded with this one draws."""
    generator = torch.Generator().manual_seed(seed)
    return int(torch.randint(0, torch.iinfo(torch.int64).max, (15,), generator=generator)[-1])


def _scalings(matrices: list[Matrix], N: list[Tensor], scale_type: str) -> list[Tensor]:
    if scale_type == "channel":
        axes = [1 if x.where == "right" else 0 for x in matrices]
        return [norms(n, axis) / (norms(x.R, axis) + 1e-8) for x, n, axis in zip(matrices, N, axes, strict=True)]
    squares = [[norms(X, None).square() for X in (n, x.R)] for x, n in zip(matrices, N, strict=True)]
    spread = [i for i, x in enumerate(matrices) if x.by_rows]
    if spread:
        # R has W's rows for some shapes and is whole for others
        chosen = [matrices[i] for i in spread]
        for k in range(2):
            for i, total in zip(spread, sum_over_rows(chosen, [squares[i][k] for i in spread]), strict=True):
                squares[i][k] = total
    return [n.sqrt() / (r.sqrt() + 1e-8) for n, r in squares]
