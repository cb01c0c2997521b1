"""What the projected optimizers share: groups, state, projector refreshes, sharded matrices, skipped gradients.

A step treats every projected matrix alike: it refreshes the projector when that is due, projects the gradient, updates
Adam's moments in the projection, and hands N = M / (sqrt(V) + eps) to the method, which turns it into the weight's
update. On a CPU matrices go one by one; on a GPU, and where rows are sharded, as many as fit into `CHUNK_ELEMENTS` go
together, so that element-wise operations are fused over matrices and collectives overlap.

Shapes: W, G: (m, n), by rows if they are sharded; R, M, V, N: the projection (see `projector`); t: step from 1. A
parameter (E, m, n) is a stack of E such matrices (see `matrix`).
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_lowrank.optim.adam import adam_direction, adamw
from hf_lowrank.optim.matrix import PROJECTORS, Matrix, apply_back_projection, matrices_in, stack_states
from hf_lowrank.optim.projector import (
    PROJ_TYPES,
    PROJECTIONS,
    REFRESHES,
    moment_shape,
    project,
    projector_shapes,
    side,
)
from hf_lowrank.optim.refresh import refresh
from hf_lowrank.optim.sharding import RowShards, all_finite
from hf_lowrank.optim.subspace import (
    SUBSPACE_OPTIONS,
    adapt_gaps,
    check_subspace,
    compute_projector,
    is_due,
    next_seed,
    subspace_state,
)
from hf_lowrank.sharding import local

__all__ = ["Matrix", "ProjectedAdamW", "apply_back_projection"]

logger = logging.getLogger(__name__)

CHUNK_ELEMENTS = 2**26


class ProjectedAdamW(torch.optim.Optimizer):
    """Base of the optimizers whose Adam moments live in a projection of the gradient, for the groups that carry `r`.

    A projected parameter is a matrix, or a stack of E matrices (E, m, n), each of which has its own moments, projector
    and whatever else a method keeps for it, and is stepped as it would be by itself.

    The other groups get the official packages' AdamW: eps is added before the bias correction and weight decay
    follows the update, unlike in `torch.optim.AdamW`.

    State of a projected weight: `step`, `exp_avg`, `exp_avg_sq` (the shape of R), `projector` and, for "full",
    `projector_right`, beside what a method adds: tensors and numbers of fixed shapes, made at the first step or by
    `init_state`; a stack has those of its matrices along a first dimension. Where a weight is a DTensor with sharded
    rows, whatever has its rows is one too.

    A gradient that is not finite changes nothing: its matrix is left out of that step, and a warning is logged.

    Attributes:
        replicas: whether the processes of the default group train copies of one model with the same gradients (DDP),
            so that each finds its share of the projectors and broadcasts them. Every process must then make every
            step. Trainer's DDP runs on prepared models switch it on (see `plan.with_plan`); a loop of one's own may.

    Args:
        params: parameters or groups, as for any `torch.optim.Optimizer`.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay, of projected weights as well.
        seed: of what is drawn for projections.
        total_steps: length of training, which `random_after` is a share of.

    Raises:
        ValueError: an option out of range; a projected parameter that is neither a matrix nor a stack of some, or
            whose min(m, n) is below r.
    """

    # what a projected group gets where it lacks an option
    options: ClassVar[dict[str, Any]]
    # the option that scales the update
    factor: ClassVar[str]
    # the values that an option of the method's own may have
    choices: ClassVar[dict[str, tuple[str, ...]]] = {}
    # entered around every refresh of projectors, to measure what refreshes take
    refreshing: Callable[[], AbstractContextManager[None]] = staticmethod(nullcontext)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        seed: int = 0,
        total_steps: int | None = None,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay}: none is negative, betas are below 1"
            )
        self._warned = False
        self.replicas = False
        self._seed, self._total_steps = seed, total_steps
        # (group, place in it) -> name: FSDP2 puts other objects in the parameters' place
        self.names: dict[tuple[int, int], str] = {}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.register_load_state_dict_post_hook(_after_loading)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in `torch.optim.Optimizer`; a group with `r` is checked and gets the options it lacks."""
        if "r" in param_group:
            param_group = {**self.options, **param_group}
            self.check_options(param_group)
        super().add_param_group(param_group)
        index, group = len(self.param_groups) - 1, self.param_groups[-1]
        for place, p in enumerate(group["params"]) if "r" in group else ():
            if p.ndim not in (2, 3) or min(p.shape[-2:]) < group["r"]:
                raise ValueError(
                    f"r={group['r']} and {self._name(index, place)} of shape {tuple(p.shape)}: r is at most the "
                    "shorter side of a matrix, and a parameter (m, n) or (E, m, n)"
                )

    @classmethod
    def check_options(cls, group: dict[str, Any]) -> None:
        """`ValueError` that names the option where the options of a projected group make no sense."""
        r, gap, factor = group["r"], group["update_proj_gap"], group[cls.factor]
        if not isinstance(r, int) or isinstance(r, bool) or r < 1:
            raise ValueError(f"r={r!r}: the rank is a whole number of 1 or more")
        if not isinstance(gap, int) or gap < 1:
            raise ValueError(f"update_proj_gap={gap!r}: give a whole number of steps, 1 or more")
        if not 0 < factor < math.inf:
            raise ValueError(f"{cls.factor}={factor!r}: the factor on the update is a positive number")
        choices = {"proj_type": PROJ_TYPES, "refresh": REFRESHES, "projection": PROJECTIONS, **cls.choices}
        for key, values in choices.items():
            if key in group and group[key] not in values:
                raise ValueError(f"{key}={group[key]!r}: it is one of {', '.join(values)}")
        if "projection" in group:
            check_subspace(group)

    def _name(self, group: int, place: int) -> str:
        return self.names.get((group, place), f"parameter {place} of group {group}")

    # State

    @torch.no_grad()
    def init_state(self) -> None:
        """Make the state of every parameter that has none, without a step."""
        for index, group in enumerate(self.param_groups):
            for place, p in enumerate(group["params"]):
                self._state_of(p, index, place)

    def _state_of(self, p: Tensor, index: int, place: int) -> dict[str, Any]:
        state: dict[str, Any] = self.state[p]
        group = self.param_groups[index]
        if state:
            return state
        state["step"] = torch.tensor(0.0)
        if "r" not in group:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            return state
        shards, where = RowShards.of(p, self._name(index, place)), side(p.shape[-2:], group["proj_type"])
        stack = tuple(p.shape[:-2])
        shapes = projector_shapes(p.shape[-2:], group["r"], group["proj_type"])
        for key, shape in zip(PROJECTORS, shapes, strict=False):
            state[key] = shards.zeros(p, stack + shape, by_rows=where != "right" and key == "projector")
        for key in ("exp_avg", "exp_avg_sq"):
            moment = moment_shape(p.shape[-2:], group["r"], group["proj_type"])
            state[key] = shards.zeros(p, stack + moment, by_rows=where == "right")
        first = sum(matrices_in(group)[:place])
        if not stack:
            self._add_state(state, local(p), index, first)
            return state
        state["step"] = torch.zeros(stack)
        W = local(p).new_zeros(()).expand(local(p).shape[-2:])
        added: list[dict[str, Any]] = [{} for _ in range(stack[0])]
        for i, own in enumerate(added):
            self._add_state(own, W, index, first + i)
        state.update(stack_states(added, p, shards))
        return state

    def _add_state(self, state: dict[str, Any], W: Tensor, index: int, place: int) -> None:
        group = self.param_groups[index]
        count = sum(matrices_in(group))
        state.update(subspace_state(group, W, self.first_seed(index, place), place, count))
        self.add_state(state, W, index, place)

    def first_seed(self, index: int, place: int) -> int:
        """Seed of a matrix's first draw; arguments as for `add_state`."""
        earlier = sum(sum(matrices_in(group)) for group in self.param_groups[:index])
        return (earlier + place + 1 + 1_000_003 * self._seed) % 2**63

    def add_state(self, state: dict[str, Any], W: Tensor, index: int, place: int) -> None:
        """What a method keeps for a projected matrix beside its moments and projector.

        Args:
            state: of the matrix.
            W: the matrix, this process's rows if they are sharded; zeros in its shape for one of a stack.
            index: of its group.
            place: of the matrix in its group; each one of a stack counts.
        """

    # A step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            if "r" not in group:
                self._step_plain(index, group)
                continue
            matrices = self._refresh_due(list(self._matrices(index, group)), group)
            for chunk in _chunks(matrices):
                self._step_projected(chunk, group)
        return loss

    def _matrices(self, index: int, group: dict[str, Any]) -> Iterator[Matrix]:
        """The group's matrices that have gradients."""
        for place, p in enumerate(group["params"]):
            if p.grad is not None:
                self._check_dense(p.grad, index, place)
                state = self._state_of(p, index, place)
                yield from Matrix.each(p, state, group["proj_type"], self._name(index, place))

    def _refresh_due(self, matrices: list[Matrix], group: dict[str, Any]) -> list[Matrix]:
        """Refresh the projectors that are due; the matrices that are left to be stepped."""
        due = [x for x in matrices if is_due(x, group)]
        if not due:
            return matrices
        finite = self._finite(due, [x.G for x in due])
        kept = [x for x, good in zip(due, finite, strict=True) if good]
        if kept:
            with self.refreshing():
                self.refresh_projectors(kept, group)
        broken = {id(x) for x, good in zip(due, finite, strict=True) if not good}
        return [x for x in matrices if id(x) not in broken]

    def _step_projected(self, matrices: list[Matrix], group: dict[str, Any]) -> None:
        for x in matrices:
            if x.own:
                x.R = project(x.G, x.projector, x.where)
        matrices[0].shards.all_reduce([x.R for x in matrices if not x.by_rows])
        # any entry of G that is not finite spreads into R, which is smaller to look through
        kept = self._finite(matrices, [x.R for x in matrices])
        matrices = [x for x, good in zip(matrices, kept, strict=True) if good]
        for x in matrices:
            x.state["step"] += 1
        matrices = [x for x in matrices if x.own]
        if matrices:
            self.update(matrices, self.direction(matrices, group), group)

    def refresh_projectors(self, matrices: list[Matrix], group: dict[str, Any]) -> None:
        """Overwrite projectors that are due, here as `projection` and the options beside it say."""
        options = {**SUBSPACE_OPTIONS, **group}

        def compute(x: Matrix, G: Tensor, previous: list[Tensor] | None) -> list[Tensor]:
            return compute_projector(x, G, previous, options, self._total_steps)

        refresh(matrices, compute, self.replicas, options["rotate_moments"])
        if options["adaptive_gap"]:
            adapt_gaps(matrices)
        for x in matrices:
            # every process counts on for the matrices of all
            if "seed" in x.state:
                x.state["seed"] = next_seed(x.state["seed"])

    def direction(self, matrices: list[Matrix], group: dict[str, Any]) -> list[Tensor]:
        """Update the moments and return N."""
        return adam_direction([x.R for x in matrices], [x.M for x in matrices], [x.V for x in matrices], group)

    def update(self, matrices: list[Matrix], N: list[Tensor], group: dict[str, Any]) -> None:
        """Change the weights, given N = M / (sqrt(V) + eps) in the projection; weight decay included."""
        raise NotImplementedError

    def _step_plain(self, index: int, group: dict[str, Any]) -> None:
        """The official packages' AdamW, computed by torch's fused one, which adds eps after the bias correction."""
        places = [place for place, p in enumerate(group["params"]) if p.grad is not None]
        if not places:
            return
        for place in places:
            self._check_dense(group["params"][place].grad, index, place)
        params = [group["params"][place] for place in places]
        states = [self._state_of(p, index, place) for p, place in zip(params, places, strict=True)]
        meshes = [getattr(p, "device_mesh", None) for p in params]
        finite = all_finite([local(p.grad) for p in params], meshes)
        by_step: dict[int, list[tuple[Tensor, dict[str, Any]]]] = {}
        for p, state, place, good in zip(params, states, places, finite, strict=True):
            if good:
                state["step"] += 1
                by_step.setdefault(int(state["step"]), []).append((p, state))
            else:
                self._skip(self._name(index, place))
        for t, pairs in by_step.items():
            self.step_adamw(pairs, group, t)

    def step_adamw(self, pairs: list[tuple[Tensor, dict[str, Any]]], group: dict[str, Any], t: int) -> None:
        """Step parameters that are not projected, each with its state, all of which are at step t."""
        adamw(pairs, group, t)

    def _check_dense(self, grad: Tensor, index: int, place: int) -> None:
        if grad.is_sparse:
            raise ValueError(
                f"the gradient of {self._name(index, place)} is sparse, which AdamW cannot take: make the embedding "
                "with sparse=False"
            )

    # Gradients that are not finite

    def _finite(self, matrices: list[Matrix], tensors: list[Tensor]) -> list[bool]:
        finite = all_finite(tensors, [x.shards.mesh for x in matrices])
        for x, good in zip(matrices, finite, strict=True):
            if not good:
                self._skip(x.name)
        return finite

    def _skip(self, name: str) -> None:
        if not self._warned:
            logger.warning(
                "the gradient of %s is not finite: such parameters are left out of their step (logged once)", name
            )
            self._warned = True


def _after_loading(optimizer: torch.optim.Optimizer) -> None:
    """Keep step counters on the CPU, and give groups of an older version the options that it had no name for.

    Trainer loads a state to the GPU, where reading a counter would wait for the device.
    """
    assert isinstance(optimizer, ProjectedAdamW)
    for group in optimizer.param_groups:
        if "r" in group:
            group.update({**optimizer.options, **group})
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].cpu()


def _chunks(matrices: list[Matrix]) -> Iterator[list[Matrix]]:
    """The matrices in chunks that are stepped together."""
    chunk: list[Matrix] = []
    elements = 0
    for matrix in matrices:
        size = math.prod(matrix.shape)
        if chunk and (elements + size > CHUNK_ELEMENTS or not _go_together(chunk[0], matrix)):
            yield chunk
            chunk, elements = [], 0
        chunk.append(matrix)
        elements += size
    if chunk:
        yield chunk


def _go_together(x: Matrix, y: Matrix) -> bool:
    """Whether two matrices are stepped together; on a CPU whole ones go one by one."""
    if y.shards.mesh is None and not y.W.is_cuda:
        return False
    return x.shards == y.shards and x.W.device == y.W.device
