"""How similar two models' hidden states are on the same tokens (H14 to H16).

Shapes: x, y: (N, p) and (N, q), one row a position; y is the baseline. Sums are in float64.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from hf_lowrank.metrics.perplexity import Estimate
from hf_lowrank.metrics.sequences import EvaluationSet, check_rows, without_autocast, without_logits
from hf_lowrank.sharding import all_reduce_sum, raise_together

__all__ = [
    "SIMILARITIES", "GroupedEstimate", "Similarity", "StreamingCKA", "compare_activations", "cosine_similarity",
    "hidden_states", "linear_cka", "relative_l2",
]  # fmt: skip

# most bytes that are kept for the standard errors of CKA
GROUPED_SUMS = 2**31


def _rows(x: Tensor, y: Tensor, same_width: bool) -> tuple[Tensor, Tensor]:
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) == 0 or (same_width and x.shape != y.shape):
        raise ValueError(
            f"activations of shapes {tuple(x.shape)} and {tuple(y.shape)}: give (positions, features) with the same "
            "positions" + (" and features" if same_width else "")
        )
    # without float64 on the device, the CPU computes the sums
    if "mps" in (x.device.type, y.device.type):
        x, y = x.cpu(), y.cpu()
    return x.detach().double(), y.detach().double()


def relative_l2(x: Tensor, y: Tensor) -> float:
    """Mean over positions of ||x_i - y_i||, over the baseline's mean ||y_i|| (H14)."""
    x, y = _rows(x, y, same_width=True)
    return ((x - y).norm(dim=1).mean() / y.norm(dim=1).mean()).item()


def cosine_similarity(x: Tensor, y: Tensor) -> float:
    """Mean over positions of the cosine between x_i and y_i (H15)."""
    x, y = _rows(x, y, same_width=True)
    return F.cosine_similarity(x, y, dim=1).mean().item()


def linear_cka(x: Tensor, y: Tensor, debiased: bool = False) -> float:
    """Linear CKA of two representations of the same positions (H16; Kornblith et al. 2019, arXiv 1905.00414).

    Args:
        x, y: (N, p) and (N, q).
        debiased: with the unbiased estimate of HSIC (Nguyen et al. 2021, arXiv 2010.15327, Eq. 3): plain CKA is near
            1 whatever the features are when N is not much larger than p and q.

    Raises:
        ValueError: positions differ, or there are fewer than 4 of them for `debiased`.
    """
    sums = StreamingCKA()
    sums.update(x, y)
    return sums.value(debiased)


class StreamingCKA:
    """Linear CKA over batches of positions; it keeps only sums over them.

    phi: (p + q + 3,) = (x, y, |x|^2, |y|^2, 1) of a position; M: sum of phi phi^T over positions. x and y are taken
    from an origin, the mean of the first batch: HSIC does not depend on it, and M loses no digits to a large mean.
    """

    def __init__(self, origin: tuple[Tensor, Tensor] | None = None) -> None:
        self.origin = origin
        self._sums: Tensor | None = None
        # rounding of the features as they came
        self._eps = 0.0

    @property
    def _count(self) -> int:
        return 0 if self._sums is None else int(self._sums[-1, -1])

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add positions; raises `ValueError` if x and y have different numbers of them."""
        self._eps = max(self._eps, *(torch.finfo(u.dtype).eps if u.is_floating_point() else 0.0 for u in (x, y)))
        x, y = _rows(x, y, same_width=False)
        self.origin = self.origin or (x.mean(0), y.mean(0))
        x, y = x - self.origin[0], y - self.origin[1]
        rest = torch.cat([y, torch.stack([x.square().sum(1), y.square().sum(1), torch.ones_like(x[:, 0])], 1)], 1)
        p, width = x.shape[1], x.shape[1] + rest.shape[1]
        M = self._sums = x.new_zeros(width, width) if self._sums is None else self._sums
        M[:p, :p].addmm_(x.T, x)
        M[:p, p:].addmm_(x.T, rest)
        M[p:, p:].addmm_(rest.T, rest)
        M[p:, :p] = M[:p, p:].T

    def __add__(self, other: "StreamingCKA") -> "StreamingCKA":
        """CKA of the positions of both."""
        return self._combined(other, 1)

    def __sub__(self, other: "StreamingCKA") -> "StreamingCKA":
        """CKA without the positions of `other`, which must be a part of these."""
        return self._combined(other, -1)

    def _combined(self, other: "StreamingCKA", sign: int) -> "StreamingCKA":
        if self._sums is None or other._sums is None:
            return other if self._sums is None else self
        assert self.origin is not None
        result = StreamingCKA(self.origin)
        result._eps = max(self._eps, other._eps)
        result._sums = self._sums + sign * other._from(self.origin)
        return result

    def _from(self, origin: tuple[Tensor, Tensor]) -> Tensor:
        """M with x and y taken from another origin: T M T^T, where phi = T phi of the own origin."""
        assert self.origin is not None
        assert self._sums is not None
        if all(map(torch.equal, self.origin, origin)):
            return self._sums
        shifts = [own - other for own, other in zip(self.origin, origin, strict=True)]
        p, shift, M = len(shifts[0]), torch.cat(shifts), self._sums.clone()
        for _ in range(2):
            for row, part in ((-3, slice(0, p)), (-2, slice(p, len(shift)))):
                M[row] += 2 * (shift[part] @ M[part]) + shift[part].square().sum() * M[-1]
            M[:-3].addr_(shift, M[-1])
            M = M.T
        return M

    def over_processes(self, p: int, q: int, device: torch.device) -> "StreamingCKA":
        """CKA of the positions of all processes, each of which calls this; p and q are the numbers of features."""
        width = p + q
        sent = torch.zeros(width + 2, dtype=torch.float64, device=device)
        if self.origin is not None and self._sums is not None:
            sent = torch.cat([*self.origin, sent.new_tensor([self._eps, 1.0])])
        mean = all_reduce_sum(sent)
        mean = mean / mean[-1].clamp_min(1)
        result = StreamingCKA((mean[:p], mean[p:width]))
        result._eps = mean[-2].item()
        own = sent.new_zeros(width + 3, width + 3) if self._sums is None else self._from((mean[:p], mean[p:width]))
        result._sums = all_reduce_sum(own)
        return result

    def value(self, debiased: bool = False) -> float:
        """CKA of all positions so far; NaN if a representation is constant up to its rounding."""
        n, least = self._count, 4 if debiased else 2
        if n < least:
            raise ValueError(f"{n} positions: CKA{' without bias' if debiased else ''} needs {least} or more")
        return self.values()[debiased]

    def values(self) -> tuple[float, float]:
        """Plain and debiased CKA; the latter is NaN below 4 positions."""
        assert self._sums is not None
        assert self.origin is not None
        n, p = self._count, len(self.origin[0])
        center = torch.cat(self.origin) + self._sums[-1, :-3] / n
        M = self._from((center[:p], center[p:]))
        # what the features' own rounding and that of the sums leave of no spread at all
        spread = M.diagonal() > n * F.pad(self._eps * center, (0, 3)).square() + 1e-13 * self._sums.diagonal()
        both, first, second = ((slice(0, p), slice(p, -3)), (slice(0, p),) * 2, (slice(p, -3),) * 2)
        if not (spread[first[0]].any() and spread[second[0]].any()):
            return math.nan, math.nan

        def ratio(hsic: Callable[[slice, slice], float]) -> float:
            squares = hsic(*first) * hsic(*second)
            return hsic(*both) / math.sqrt(squares) if hsic(*first) > 0 and squares > 0 else math.nan

        def biased(u: slice, v: slice) -> float:
            """Squared Frobenius norm of the centred cross-product."""
            return M[u, v].square().sum().item()

        def unbiased(u: slice, v: slice) -> float:
            """n (n - 3) HSIC_1 of centred features, from Gram matrices with their diagonals set to zero."""
            k, m = (-3 if side.start == 0 else -2 for side in (u, v))
            pairs = M[k, -1] * M[m, -1] / ((n - 1) * (n - 2)) - M[k, m] * n / (n - 2)
            return biased(u, v) + pairs.item()

        return ratio(biased), ratio(unbiased) if n >= 4 else math.nan


@torch.no_grad()
def hidden_states(model: nn.Module, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """Hidden states of the embeddings and of every layer, each (n, t, H); no logits are computed.

    Args:
        model: in eval mode; any model that returns `hidden_states`.
        batch: `input_ids` (n, t) and the model's other inputs; `labels` are ignored.

    Raises:
        ValueError: the model gives none.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with without_logits(model) as options:
        states = getattr(model(**inputs, output_hidden_states=True, **options), "hidden_states", None)
    if not states:
        raise ValueError(f"{type(model).__name__} gives no hidden states: its activations cannot be compared")
    return list(states)


@dataclass(frozen=True)
class GroupedEstimate(Estimate):
    """A number with its jackknife standard error.

    Attributes:
        left_out: the number without each group of sequences in turn; NaN where it cannot be told.
    """

    left_out: tuple[float, ...] = ()


@dataclass(frozen=True)
class Similarity:
    """Similarity of one layer's activations to the baseline's, or the mean over the layers.

    Attributes:
        relative_l2, cosine, cka: H14 to H16.
        cka_debiased: CKA from the unbiased estimate of HSIC.
        norm, baseline_norm: mean length of a position's hidden state.
    """

    relative_l2: GroupedEstimate
    cosine: GroupedEstimate
    cka: GroupedEstimate
    cka_debiased: GroupedEstimate
    norm: GroupedEstimate
    baseline_norm: GroupedEstimate


SIMILARITIES = tuple(Similarity.__dataclass_fields__)


class _Sums:
    """Sums over positions for every layer and group of sequences, so that a group can be left out."""

    def __init__(self, layers: int, groups: int, width: int) -> None:
        self.layers, self.groups, self.width = layers, groups, width
        # positions, sums of |x - y|, cos(x, y), |x|, |y|
        self.plain = torch.zeros(layers, groups, 5, dtype=torch.float64)
        grouped = (groups + 1) * layers * 4 * width**2 * 8 <= GROUPED_SUMS
        self.cka = [[StreamingCKA() for _ in range(groups if grouped else 1)] for _ in range(layers)]

    def add(self, layer: int, group: int, x: Tensor, y: Tensor) -> None:
        """Add hidden states (positions, H) of the model and the baseline."""
        sums = self.cka[layer]
        sums[group % len(sums)].update(x, y)
        # sums from one origin are added as they are
        for cka in sums:
            cka.origin = cka.origin or sums[group % len(sums)].origin
        x, y = _rows(x, y, same_width=True)
        cosines = F.cosine_similarity(x, y, dim=1)
        plain = [(x - y).norm(dim=1).sum(), cosines.sum(), x.norm(dim=1).sum(), y.norm(dim=1).sum()]
        self.plain[layer, group] += torch.tensor([float(len(x)), *(value.item() for value in plain)])

    def over_processes(self, device: torch.device) -> None:
        """Add up the sums of all processes; each process calls this."""
        self.plain = all_reduce_sum(self.plain)
        for layer in self.cka:
            layer[:] = [cka.over_processes(self.width, self.width, device) for cka in layer]

    def values(self, without: int | None = None) -> Tensor:
        """(layers, 6) in the order of `Similarity`, from all groups but one; NaN for CKA that has one group alone."""
        kept = [g for g in range(self.groups) if g != without]
        count, l2, cosine, norm, baseline = self.plain[:, kept].sum(1).unbind(1)
        cka = torch.full((self.layers, 2), math.nan, dtype=torch.float64)
        for layer, sums in enumerate(self.cka):
            if without is None or len(sums) == self.groups > 1:
                total = sum((g for i, g in enumerate(sums) if i != without), StreamingCKA())
                if count[layer] >= 4:
                    cka[layer] = torch.tensor(total.values())
        return torch.stack([l2 / baseline, cosine / count, cka[:, 0], cka[:, 1], norm / count, baseline / count], 1)


def compare_activations(
    model: nn.Module,
    baseline: nn.Module,
    evaluation: EvaluationSet,
    groups: int = 8,
    progress: Callable[[], Any] = lambda: None,
) -> tuple[Similarity, list[Similarity]]:
    """Compare two models' hidden states on the same tokens, layer by layer (H14 to H16).

    Padding is ignored. Memory does not depend on the number of tokens: (groups + 1) x layers x 4 H x H float64 sums.
    Standard errors are those of a jackknife over `groups` groups of sequences; where the sums would take more than
    2 GB, CKA is summed in one group and has none (NaN), as with a single group.

    Args:
        model, baseline: in eval mode, of the same hidden size and number of layers.
        evaluation: the sequences; if it is shared, every process calls this and computes its part.
        groups: for the standard errors, fewer where there are fewer sequences.
        progress: called after every batch.

    Returns:
        The mean over layers, and every layer, embeddings first.

    Raises:
        ValueError: the models have different layers or hidden sizes, or give no hidden states.
    """
    sums = raise_together(lambda: _accumulated(model, baseline, evaluation, groups, progress), evaluation.shared)
    if evaluation.shared:
        sums.over_processes(next(model.parameters()).device)
    return _similarities(sums)


def _accumulated(
    model: nn.Module, baseline: nn.Module, evaluation: EvaluationSet, groups: int, progress: Callable[[], Any]
) -> _Sums:
    """The sums over this process's sequences."""
    models = {m: next(m.parameters()).device for m in (model, baseline)}
    for m in models:
        check_rows(m, evaluation.rows)
    groups = max(1, min(groups, len(evaluation)))
    group_of = torch.arange(len(evaluation)) * groups // len(evaluation)
    mask = evaluation.rows.get("attention_mask", torch.ones_like(evaluation.rows["input_ids"])).bool()
    sums: _Sums | None = None
    with without_autocast(model), without_autocast(baseline):
        for indices in evaluation.mine():
            # where weights are sharded every process must come along, with a sequence that does not count
            chosen = indices if len(indices) else torch.arange(1)
            states = [hidden_states(m, evaluation.batch(chosen, device)) for m, device in models.items()]
            states = states * 2 if model is baseline else states
            sums = sums or _Sums(len(states[0]), groups, states[0][0].shape[-1])
            _check_alike(*states)
            for group in group_of[indices].unique().tolist():
                rows = group_of[indices] == group
                kept = mask[indices][rows]
                for layer, (x, y) in enumerate(zip(*states, strict=True)):
                    sums.add(layer, group, *(h.to(x.device)[rows.to(x.device)][kept.to(x.device)] for h in (x, y)))
            progress()
    assert sums is not None
    return sums


def _check_alike(x: list[Tensor], y: list[Tensor]) -> None:
    shapes = [(len(states), states[0].shape[-1]) for states in (x, y)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the model has {shapes[0][0] - 1} layers of size {shapes[0][1]}, the baseline {shapes[1][0] - 1} of "
            f"{shapes[1][1]}: take a baseline of the same size"
        )


def _similarities(sums: _Sums) -> tuple[Similarity, list[Similarity]]:
    """Values with jackknife standard errors, averaged over layers and layer by layer."""
    values = sums.values()
    left_out = torch.stack([sums.values(without=g) for g in range(sums.groups)] if sums.groups > 1 else [values])
    factor = (sums.groups - 1) / sums.groups if sums.groups > 1 else math.nan

    def similarity(value: Tensor, others: Tensor) -> Similarity:
        spread = (factor * (others - others.mean(0)).square().sum(0)).sqrt()
        columns = (value.tolist(), spread.tolist(), map(tuple, others.T.tolist()))
        return Similarity(*(GroupedEstimate(*each) for each in zip(*columns, strict=True)))

    return (
        similarity(values.mean(0), left_out.mean(1)),
        [similarity(value, left_out[:, layer]) for layer, value in enumerate(values)],
    )
