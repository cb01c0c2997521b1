"""LORO: low-rank factors that take a Riemannian step on the manifold of rank-r matrices every so many steps.

Shapes: W = B A: (m, n), A: (r, n), B: (m, r), r at most min(m, n); dA and dB have the shapes of A and B.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_lowrank.methods.base import LowRankConfig, MethodCallback, Paper, register
from hf_lowrank.methods.lowrank import LowRankLinear, factorized, in_float64
from hf_lowrank.methods.schedule import check_restarts, restart_schedule
from hf_lowrank.optim.adam import adam_direction, step_size
from hf_lowrank.optim.projected import ProjectedAdamW
from hf_lowrank.optim.sharding import all_finite
from hf_lowrank.sharding import assembled, like, local, whole

__all__ = ["LoroAdamW", "LoroCallback", "LoroConfig", "riemannian_step"]

logger = logging.getLogger(__name__)

REFRESHES = ("all", "factors", "none")


def riemannian_step(A: Tensor, B: Tensor, dA: Tensor, dB: Tensor, lr: float) -> tuple[Tensor, Tensor] | None:
    """Factors of the rank-r matrix nearest to W - lr T, where T is the gradient's part in the tangent space at W.

    With the QR decompositions B = U R and A^T = V T', a gradient G of W enters as G V = dB T'^-1 and U^T G = R^-T dA.
    W - lr T has rank 2r in the frames [U, Q2] and [V, Q1], and its SVD is that of a (2r, 2r) matrix; nothing as
    large as W is made. The new factors share the singular values evenly. Computed in fp64.

    Args:
        A, B: the factors, whole.
        dA, dB: their gradients, or the directions of an optimizer in their place.
        lr: length of the step.

    Returns:
        New A and B in fp64; None where the factors have no full rank, so that there is no tangent space of rank r.
    """
    A, B, dA, dB = (in_float64(x) for x in (A, B, dA, dB))
    r = len(A)
    U, R = torch.linalg.qr(B)
    V, T = torch.linalg.qr(A.T)
    GV = torch.linalg.solve_triangular(T, dB, upper=True, left=False)
    UG = torch.linalg.solve_triangular(R.T, dA, upper=False)
    inside = UG @ V
    if not bool(GV.isfinite().all() & UG.isfinite().all()):
        return None
    Q1, K1 = torch.linalg.qr((UG - inside @ V.T).T)
    Q2, K2 = torch.linalg.qr(GV - U @ (U.T @ GV))
    core = torch.zeros(2 * r, 2 * r, dtype=A.dtype, device=A.device)
    core[:r, :r] = R @ T.T - lr * inside
    core[:r, r:], core[r:, :r] = -lr * K1.T, -lr * K2
    return factorized(torch.cat([U, Q2], 1), core, torch.cat([V, Q1], 1), r)


class LoroAdamW(ProjectedAdamW):
    """Adam on pairs of factors with a `riemannian_step` every `exact_every` steps, for the groups that carry that key.

    Such a group's parameters are A: (r, n) and B: (m, r) of one layer after the other, and it has `lr_scale` (factor
    on the rate between exact steps) and `refresh` (whether moments and step count start anew after an exact one). A
    pair counts the steps it took. If one gradient of a pair is not finite, both are left out of that step.

    The other groups get the Adam of `ProjectedAdamW`. State of every parameter: `step`, `exp_avg`, `exp_avg_sq`.

    Args:
        params: parameters or groups, as for any `torch.optim.Optimizer`.
        refresh_every: steps after which the state of a parameter in the other groups starts anew; 0 for never.
        **kwargs: `ProjectedAdamW`'s.

    Raises:
        ValueError: a group of factors does not consist of pairs.
    """

    def __init__(self, params: Iterable[Any], refresh_every: int = 0, **kwargs: Any) -> None:
        self.refresh_every = refresh_every
        super().__init__(params, **kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in `torch.optim.Optimizer`; the pairs of a group of factors are checked."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if "exact_every" not in group:
            return
        params, index = group["params"], len(self.param_groups) - 1
        for place in range(0, len(params), 2):
            A, B = params[place], params[place + 1] if place + 1 < len(params) else None
            if B is None or A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
                raise ValueError(
                    f"{self._name(index, place)} of shape {tuple(A.shape)} is not followed by its other factor: a "
                    "group of factors holds A (r, n) and B (m, r) of one layer after the other; leave both to the "
                    "grouping of Trainer, and train both or neither"
                )

    def _step_plain(self, index: int, group: dict[str, Any]) -> None:
        if "exact_every" in group:
            for place in range(0, len(group["params"]), 2):
                self._step_pair(index, place, group)
            return
        super()._step_plain(index, group)
        for p in group["params"]:
            if self.refresh_every and self.state[p] and int(self.state[p]["step"]) >= self.refresh_every:
                _restart(self.state[p])

    def _step_pair(self, index: int, place: int, group: dict[str, Any]) -> None:
        pair = group["params"][place : place + 2]
        gradients = [p.grad for p in pair if p.grad is not None]
        if len(gradients) < 2:
            return
        G = [local(g) for g in gradients]
        finite = all_finite(G, [getattr(p, "device_mesh", None) for p in pair])
        if not all(finite):
            self._skip(self._name(index, place + finite.index(False)))
            return
        states = [self._state_of(p, index, place + i) for i, p in enumerate(pair)]
        for state in states:
            state["step"] += 1
        t = int(states[0]["step"])
        M, V = ([local(state[key]) for state in states] for key in ("exp_avg", "exp_avg_sq"))
        N = [adam_direction([g], [m], [v], group)[0] for g, m, v in zip(G, M, V, strict=True)]
        lr = step_size(group["lr"], group["betas"], t)
        if t % group["exact_every"] == 0:
            with self.refreshing():
                exact = self._exact(pair, N, lr)
            if not exact:
                self._lazy(pair, N, lr, group)
            for state in states if group["refresh"] else ():
                _restart(state)
        else:
            self._lazy(pair, N, lr, group)

    def _lazy(self, pair: list[Tensor], N: list[Tensor], lr: float, group: dict[str, Any]) -> None:
        (r, n), m = pair[0].shape, len(pair[1])
        scale = r / min(m, n) if group["lr_scale"] is None else group["lr_scale"]
        for p, direction in zip(pair, N, strict=True):
            W = local(p)
            W.add_(direction, alpha=-lr * scale)
            if group["weight_decay"] > 0:
                W.mul_(1 - lr * group["weight_decay"])

    def _exact(self, pair: list[Tensor], N: list[Tensor], lr: float) -> bool:
        directions = [assembled(n, p) for p, n in zip(pair, N, strict=True)]
        factors = riemannian_step(whole(pair[0]), whole(pair[1]), directions[0], directions[1], lr)
        if factors is None:
            logger.warning(
                "factors of shapes %s have no full rank: Adam's step instead", [tuple(p.shape) for p in pair]
            )
            return False
        for p, factor in zip(pair, factors, strict=True):
            local(p).copy_(local(like(factor.to(p.device, p.dtype), p)))
        return True


def _restart(state: dict[str, Any]) -> None:
    for key in ("step", "exp_avg", "exp_avg_sq"):
        local(state[key]).zero_()


class LoroCallback(MethodCallback):
    """Puts a warm-up after each exact step into the learning-rate schedule.

    Args:
        config: the method's settings.
    """

    def __init__(self, config: "LoroConfig") -> None:
        self.config = config

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Trainer has made or restored optimizer and schedule by now; `ValueError` if that is no `LambdaLR`."""
        every, warmup = self.config.exact_every, self.config.restart_warmup_steps
        restart_schedule(kwargs["lr_scheduler"], every, warmup, "LORO", args)
        if state.max_steps < every and state.is_world_process_zero:
            logger.warning("exact_every=%d: no exact step within the %d steps of training", every, state.max_steps)


@register
@dataclass
class LoroConfig(LowRankConfig):
    """LORO with the arithmetic of mzf666/LORO-main: W = B A, Xavier-normal factors, no other scaling.

    Between exact steps Adam (eps 1e-6, added before the bias correction) trains both factors at `lr_scale` times the
    rate; at an exact step Adam's directions stand for the factors' gradients, at the rate itself and without weight
    decay. The decay of the other steps is multiplied with the bias-corrected rate, as in that code. Different from
    it: d of r / d is the layer's shorter side, which is the hidden size in that code's models; all is computed in
    fp64 and the vectors' signs are fixed; factors without full rank take Adam's step, where that code stops; and a
    warm-up ends where Trainer's schedule stands then, where that code has a cosine that is shifted by the first
    warm-up and starts at the least rate.
    """

    method: ClassVar[str] = "loro"
    label: ClassVar[str] = "LORO"
    paper: ClassVar[Paper | None] = Paper(
        title="Parameter and Memory Efficient Pretraining via Low-rank Riemannian Optimization",
        arxiv=None,
        authors="Zhanfeng Mo, Long-Kai Huang, Sinno Jialin Pan",
        url="https://openreview.net/forum?id=i0zzO7Hslk",
        year=2025,
    )
    replaces_layers: ClassVar[bool] = True

    r: int | None = field(default=None, metadata={"help": "Rank of the weights; default hidden_size / 4."})
    exact_every: int = field(default=500, metadata={"help": "Optimizer steps from one Riemannian step to the next."})
    lr_scale: float | None = field(
        default=None, metadata={"help": "Factor on the factors' rate between them; default r / min(m, n)."}
    )
    refresh: str = field(
        default="all", metadata={"help": "State that starts anew after one: all, the factors' alone, or none."}
    )
    restart_warmup_steps: int = field(
        default=5, metadata={"help": "Steps over which the learning rate climbs again after one; 0 for none."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("exact_every", 1), ("restart_warmup_steps", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r}: give a whole number of optimizer steps, {least} or more")
        if self.restart_warmup_steps >= self.exact_every and self.restart_warmup_steps > 0:
            raise ValueError(
                f"restart_warmup_steps={self.restart_warmup_steps}: the warm-up after an exact step must end before "
                f"the next one, so give less than exact_every={self.exact_every}"
            )
        scale: Any = self.lr_scale
        if scale is not None and (
            isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < 1e9
        ):
            raise ValueError(f"lr_scale={scale!r}: a factor on the rate is a positive number, None for r / min(m, n)")
        if self.refresh not in REFRESHES:
            raise ValueError(f"refresh={self.refresh!r}: it is one of {', '.join(REFRESHES)}")

    def check_arguments(self, args: TrainingArguments) -> None:
        if self.restart_warmup_steps:
            check_restarts(self.label, args)

    def new_layer(self, in_features: int, out_features: int, r: int, **kwargs: Any) -> LowRankLinear:
        layer = LowRankLinear(in_features, out_features, r, alpha=r, **kwargs)
        for factor in (layer.A, layer.B):
            nn.init.xavier_normal_(factor, generator=kwargs.get("generator"))
        return layer

    def group_options(self, r: int) -> dict[str, Any]:
        return {"exact_every": self.exact_every, "lr_scale": self.lr_scale, "refresh": self.refresh != "none"}

    def optimizer(self, args: TrainingArguments) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        kwargs = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2)}
        return LoroAdamW, {**kwargs, "refresh_every": self.exact_every if self.refresh == "all" else 0}

    def callbacks(self, args: TrainingArguments) -> list[MethodCallback]:
        return [LoroCallback(self)] if self.restart_warmup_steps else []

    def state_elements(self, m: int, n: int, r: int) -> int:
        return 2 * r * (m + n)
