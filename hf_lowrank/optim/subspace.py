"""When a matrix gets a new subspace and which one: the options that GaLore, Fira and FRUGAL share.

`projection` says what the subspace is made of (see `projector.new_projector`); `random_after` makes it random for the
rest of training (GoLore, arXiv 2410.11289); `adaptive_gap` refreshes ever more rarely while the first vector stays
where it is (Q-GaLore, arXiv 2407.08296); `stagger_refreshes` spreads the matrices' refreshes over the gap.

Draws come from generators seeded by a number in the matrix's state, which a refresh replaces by the next, so that they
depend neither on the process nor on where training was cut off.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_lowrank.optim.matrix import Matrix
from hf_lowrank.optim.projector import new_projector

__all__ = [
    "SUBSPACE_OPTIONS",
    "adapt_gaps",
    "check_subspace",
    "compute_projector",
    "is_due",
    "next_seed",
    "subspace_state",
]

# what a projected group gets where it lacks one
SUBSPACE_OPTIONS: dict[str, Any] = {
    "refresh": "gram",
    "projection": "svd",
    "random_after": None,
    "adaptive_gap": False,
    "rotate_moments": False,
    "stagger_refreshes": False,
}

# Q-GaLore's: the gap doubles while the mean cosine of as many refreshes is at least so large
COSINES, COSINE_THRESHOLD = 5, 0.4
# a mean that has one of these in it stays below the threshold
NO_COSINE = -float(COSINES)


def check_subspace(group: dict[str, Any]) -> None:
    """`ValueError` that names the options of a projected group that make no sense together."""
    projection, refresh, after = group["projection"], group["refresh"], group["random_after"]
    if projection not in ("svd", "sampled") and refresh != "gram":
        raise ValueError(
            f"refresh={refresh!r} and projection={projection!r}: refresh says how singular vectors are computed, "
            "which this projection has none of; leave refresh at its default"
        )
    if projection == "sampled" and refresh == "subspace":
        raise ValueError(
            "refresh='subspace' and projection='sampled': subspace iterations find the first singular vectors alone, "
            "and sampling draws from all of them; use refresh='gram' or 'svd'"
        )
    if group["adaptive_gap"] and (projection != "svd" or after is not None):
        which = f"projection={projection!r}" if projection != "svd" else f"random_after={after!r}"
        raise ValueError(
            f"adaptive_gap and {which}: the gap follows how much the first singular vector turns from one refresh to "
            "the next; use projection='svd' throughout"
        )
    if after is not None:
        if isinstance(after, bool) or not isinstance(after, int | float) or not 0 < after < 1:
            raise ValueError(f"random_after={after!r}: give the share of training, between 0 and 1, or None for never")
        if projection == "random":
            raise ValueError(f"random_after={after!r} and projection='random': it is random from the start")


def projection_at(group: dict[str, Any], t: int, total_steps: int | None) -> str:
    """The projection in force at step t, from 1.

    Raises:
        ValueError: `random_after` is given and the length of training is not.
    """
    after = group["random_after"]
    if after is None:
        return str(group["projection"])
    if total_steps is None or total_steps < 1:
        raise ValueError(
            f"random_after={after!r} is a share of training: give max_steps (total_steps of an optimizer)"
        )
    return "random" if t - 1 >= after * total_steps else str(group["projection"])


def subspace_state(group: dict[str, Any], W: Tensor, seed: int, place: int, count: int) -> dict[str, Any]:
    """What a matrix's state holds for these options.

    Args:
        group: the options.
        W: the matrix, or zeros in its shape.
        seed: of its first draw.
        place, count: which of how many matrices of the group it is.
    """
    state: dict[str, Any] = {}
    if group.get("projection", "svd") not in ("svd", "dct") or group.get("random_after") is not None:
        state["seed"] = seed
    if group.get("adaptive_gap"):
        state["gap"], state["cosines"] = group["update_proj_gap"], W.new_full((COSINES,), NO_COSINE)
    if group.get("stagger_refreshes"):
        state["phase"] = place * group["update_proj_gap"] // count
    return state


def is_due(x: Matrix, group: dict[str, Any]) -> bool:
    """Whether a matrix is refreshed before the step that is being taken; always before its first."""
    gap = x.state["gap"] if group.get("adaptive_gap") else group["update_proj_gap"]
    phase = x.state["phase"] if group.get("stagger_refreshes") else 0
    return bool(x.t == 1 or (x.t - 1 - phase) % gap == 0)


def compute_projector(
    x: Matrix, G: Tensor, previous: list[Tensor] | None, group: dict[str, Any], total_steps: int | None
) -> list[Tensor]:
    """The new projector of a matrix from its whole gradient."""
    projection = projection_at(group, x.t, total_steps)
    return new_projector(G, group["r"], x.where, projection, group["refresh"], previous, _seed(x))


def _seed(x: Matrix) -> int:
    # the state of a matrix in a stack is no dict
    return int(x.state["seed"]) if "seed" in x.state else 0


def next_seed(seed: int) -> int:
    """The seed of the next draw: the 15th number that a generator seeded with this one draws."""
    generator = torch.Generator().manual_seed(seed)
    return int(torch.randint(0, torch.iinfo(torch.int64).max, (15,), generator=generator)[-1])


def adapt_gaps(matrices: list[Matrix]) -> None:
    """Double the gap of matrices whose first vector has kept its direction over the last refreshes.

    Unlike in Q-GaLore's code the cosine has no sign: a vector and its negative span the same line. As there the gap
    starts to count at step 0, and the cosines are kept when it doubles.
    """
    rows: dict[Any, list[Matrix]] = {}
    for x in matrices:
        if x.t > 1:
            rows.setdefault(x.shards, []).append(x)
    for shards, alike in rows.items():
        turned = torch.zeros(len(alike), device=alike[0].G.device)
        for i, x in enumerate(alike):
            if x.own:
                turned[i] = x.overlap
        left = torch.tensor([x.where != "right" for x in alike], device=turned.device)
        if not shards.whole:
            # a left vector's entries are spread like the rows, a right one is whole everywhere
            partial = torch.where(left, turned, 0.0)
            shards.all_reduce([partial])
            turned = torch.where(left, partial, turned)
        doubles = torch.zeros(len(alike), device=turned.device)
        for i, x in enumerate(alike):
            if x.own:
                cosines = x.state["cosines"]
                cosines.copy_(torch.cat([cosines[1:], turned[i : i + 1].abs().to(cosines.dtype)]))
                doubles[i] = cosines.mean() >= COSINE_THRESHOLD
        if shards.by_matrix:
            # every process counts the steps of all matrices
            dist.all_reduce(doubles, group=shards.group)
        for x, double in zip(alike, doubles.tolist(), strict=True):
            if double:
                x.state["gap"] = min(2 * x.state["gap"], 2**62)
