"""One projected matrix in one step, by itself or in a stack: the experts of a layer are one parameter (E, m, n).

A stack's state has the state of each of its matrices along its first dimension, and a list where that is a number, so
that every matrix is stepped as it would be by itself.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_lowrank.optim.projector import side
from hf_lowrank.optim.sharding import RowShards
from hf_lowrank.sharding import is_dtensor, local

__all__ = ["PROJECTORS", "Matrix", "apply_back_projection", "matrices_in", "stack_states"]

PROJECTORS = ("projector", "projector_right")


def apply_back_projection(
    W: Tensor, N: Tensor, projector: Sequence[Tensor], where: str, alpha: float, beta: float
) -> None:
    """W <- beta W + alpha back(N) in one fused product."""
    if where == "right":
        W.addmm_(N, projector[0], beta=beta, alpha=alpha)
    elif where == "left":
        W.addmm_(projector[0], N, beta=beta, alpha=alpha)
    else:
        W.addmm_(torch.mm(projector[0], N), projector[1], beta=beta, alpha=alpha)


class _StateInStack:
    """The state of one matrix of a stack, read and written in the stack's: tensors are views of it."""

    def __init__(self, state: dict[str, Any], index: int, start: int) -> None:
        self._state, self._index, self._start = state, index, start

    def _place(self, key: str) -> tuple[Any, int]:
        value = self._state[key]
        # what is sharded starts with this process's first matrix
        return (local(value), self._index - self._start) if is_dtensor(value) else (value, self._index)

    def __contains__(self, key: str) -> bool:
        return key in self._state

    def __getitem__(self, key: str) -> Any:
        values, index = self._place(key)
        return values[index]

    def __setitem__(self, key: str, value: Any) -> None:
        values, index = self._place(key)
        values[index] = value


class Matrix:
    """One projected weight in one step; tensors are this process's rows if it is sharded.

    Args:
        p: the parameter, with a gradient.
        state: the optimizer's state of it.
        proj_type: which side is projected.
        name: for messages.
        index: which matrix of a stack (E, m, n); None for a parameter that is a matrix.

    Attributes:
        shape: (m, n) of the whole matrix.
        own: whether this process holds it, or rows of it; if not, W, G and the like are empty.
        W, G: weight and gradient.
        M, V: moments in the projection; V's root is not taken.
        projector: its one or two matrices, `left` ones by rows.
        where: `left`, `right` or `full`.
        state: its own state.
        t: the step that is being taken, from 1.
        shards: how rows are spread.
        overlap: product of the first vectors of the last projector and the one before, over this process's rows.
        R: the projected gradient; whole on every process unless it has W's rows.
    """

    R: Tensor
    overlap: Tensor
    state: Any

    def __init__(self, p: Tensor, state: dict[str, Any], proj_type: str, name: str, index: int | None = None) -> None:
        assert p.grad is not None
        self.shape: tuple[int, ...] = p.shape[-2:]
        self.where, self.shards = side(self.shape, proj_type), RowShards.of(p, name)
        self.W, self.G, self.own = p, p.grad, True
        if self.shards.mesh is not None:
            self.W, self.G = local(p), local(p.grad)
        if index is None:
            self.name, self.state = name, state
        else:
            held = self.shards.matrices(p.shape[0])
            self.own, start = index in held, held.start if self.shards.by_matrix else 0
            self.name, self.state = f"{name}[{index}]", _StateInStack(state, index, start)
            place = index - start if self.own else slice(0)
            self.W, self.G = self.W[place], self.G[place]
        self.t = int(self.state["step"]) + 1
        if not self.own:
            self.M = self.V = self.R = self.G
            self.projector: list[Tensor] = []
            return
        self.M, self.V = self.state["exp_avg"], self.state["exp_avg_sq"]
        self.projector = [self.state[key] for key in PROJECTORS if key in state]
        if self.shards.mesh is not None:
            self.M, self.V = local(self.M), local(self.V)
            self.projector = [local(P) for P in self.projector]

    @classmethod
    def each(cls, p: Tensor, state: dict[str, Any], proj_type: str, name: str) -> Iterator["Matrix"]:
        """The parameter as a matrix, or every matrix of a stack, those of other processes as well."""
        if p.ndim == 2:
            return iter([cls(p, state, proj_type, name)])
        return (cls(p, state, proj_type, name, index) for index in range(p.shape[0]))

    def set_projector(self, fresh: list[Tensor], rotate: bool = False) -> None:
        """Overwrite the projector, `left` matrices by rows.

        Args:
            fresh: its matrices.
            rotate: whether the first moment is carried over into the new basis: M <- P'^T P M (LDAdam, GoLore). The
                second one, which is no vector, stays as it is.
        """
        new, old = (P[0][0] if self.where == "right" else P[0][:, 0] for P in (fresh, self.projector))
        self.overlap = (new * old).sum()
        if rotate and self.t > 1:
            self._rotate(fresh)
        for kept, new in zip(self.projector, fresh, strict=True):
            kept.copy_(new)

    def _rotate(self, fresh: list[Tensor]) -> None:
        if self.where != "right":
            # both are spread by rows
            change = torch.mm(fresh[0].T, self.projector[0])
            self.shards.all_reduce([change])
            self.M.copy_(torch.mm(change, self.M))
        if self.where != "left":
            self.M.copy_(torch.mm(self.M, torch.mm(self.projector[-1], fresh[-1].T)))

    @property
    def by_rows(self) -> bool:
        """Whether R has W's rows, and is spread like them."""
        return self.where == "right"


def matrices_in(group: dict[str, Any]) -> list[int]:
    """The number of matrices in each parameter of an optimizer's group; a parameter that is not projected counts 1."""
    return [p.shape[0] if "r" in group and p.ndim == 3 else 1 for p in group["params"]]


def stack_states(states: list[dict[str, Any]], p: Tensor, shards: RowShards) -> dict[str, Any]:
    """The states of a stack's E matrices as one: tensors along a new first dimension, sharded as p is; lists."""
    stacked: dict[str, Any] = {}
    for key, value in states[0].items():
        values = [state[key] for state in states]
        if not isinstance(value, Tensor):
            stacked[key] = values
        elif shards.by_matrix:
            held, whole = shards.matrices(len(values)), torch.stack(values)
            stacked[key] = DTensor.from_local(
                whole[held.start : held.stop],
                shards.mesh,
                shards.placements,
                run_check=False,
                shape=whole.shape,
                stride=whole.stride(),
            )
        else:
            stacked[key] = torch.stack(values)
    return stacked
