"""Optimizers that step the groups they know by a key of their own, and leave the others to `torch.optim.AdamW`."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from hf_lowrank.optim.sharding import all_finite
from hf_lowrank.sharding import local

__all__ = ["MarkedAdamW"]

logger = logging.getLogger(__name__)


class MarkedAdamW(torch.optim.AdamW):
    """AdamW with groups that are stepped by `step_marked`: those that carry the key `mark`.

    A gradient that is not finite leaves its parameter out of that step, and a warning is logged once.
    """

    mark: ClassVar[str]
    # (group, place in it) -> name, set by a plan
    names: dict[tuple[int, int], str] = {}  # noqa: RUF012
    _warned = False

    def step_marked(self, group: dict[str, Any]) -> None:
        """Step the parameters of a marked group that have gradients."""
        raise NotImplementedError

    def bound(self, group: dict[str, Any], place: int) -> list[int]:
        """Places in a group of the parameters that are stepped together with the one at `place`."""
        return [place]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        with self._finite_alone():
            try:
                self.param_groups = [group for group in groups if self.mark not in group]
                super().step()
            finally:
                self.param_groups = groups
            for group in groups:
                if self.mark in group:
                    self.step_marked(group)
        return loss

    @contextmanager
    def _finite_alone(self) -> Iterator[None]:
        """Without the gradients that are not finite, which are there again afterwards."""
        places = [
            (index, place, p)
            for index, group in enumerate(self.param_groups)
            for place, p in enumerate(group["params"])
            if p.grad is not None
        ]
        meshes = [getattr(p, "device_mesh", None) for _, _, p in places]
        finite = all_finite([local(p.grad) for _, _, p in places if p.grad is not None], meshes)
        aside = []
        for (index, place, _), good in zip(places, finite, strict=True):
            if good:
                continue
            self._warn(index, place)
            group = self.param_groups[index]
            for other in self.bound(group, place) if self.mark in group else [place]:
                p = group["params"][other]
                if p.grad is not None:
                    aside.append((p, p.grad))
                    p.grad = None
        try:
            yield
        finally:
            for p, grad in aside:
                p.grad = grad

    def _warn(self, index: int, place: int) -> None:
        if not self._warned:
            name = self.names.get((index, place), f"parameter {place} of group {index}")
            logger.warning(
                "the gradient of %s is not finite: such parameters are left out of their step (logged once)", name
            )
            self._warned = True
