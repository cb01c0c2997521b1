"""A coordinate search over two learning rates, by one rule for every method.

A point of the grid is (i, j): the targets train at `targets * ratio**i` and everything else at `others * ratio**j`.
The two rates are the coordinates, rather than `learning_rate` and `other_lr_scale`, because a change of one of them
should not bring a change of the other along. The search only says which points come next, given the losses so far: it
has no state of its own, so that whoever runs the points can stop and go on at any time.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["RULE", "Grid", "Point", "Search", "search"]

# steps from the start, of the targets' rate and of the others'
Point = tuple[int, int]

RULE = (
    "Coordinate search on a logarithmic grid over the targets' learning rate and that of everything else, from the "
    "start given below, by the validation loss after all steps with a seed that no result uses. From the best point "
    "so far the neighbours below and above are evaluated in the first coordinate and then in the second; the search "
    "ends when all four are evaluated and none is better. Of equal losses the point nearest to the start counts, and "
    "a run that diverged is worse than any that did not."
)


@dataclass(frozen=True)
class Grid:
    """Pairs of learning rates, by their steps from a start.

    Attributes:
        targets: rate of the targets at the point (0, 0).
        others: rate of everything else there.
        ratio: of two neighbouring rates, above 1.
    """

    targets: float
    others: float
    ratio: float = 3.0

    def __post_init__(self) -> None:
        for name in ("targets", "others"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r}: a search starts from a positive rate")
        if not 1 < self.ratio < math.inf:
            raise ValueError(f"ratio={self.ratio!r}: neighbouring rates differ by a factor above 1, 3 for example")

    def settings(self, point: Point) -> tuple[float, float]:
        """`learning_rate` and `other_lr_scale` of a point, to three digits."""
        targets = _round(self.targets * self.ratio ** point[0])
        return targets, _round(self.others * self.ratio ** point[1] / targets)

    def point(self, learning_rate: float, other_lr_scale: float) -> Point | None:
        """The point that has these settings; None if they are not on the grid."""
        i = round(math.log(learning_rate / self.targets, self.ratio))
        j = round(math.log(learning_rate * other_lr_scale / self.others, self.ratio))
        return (i, j) if self.settings((i, j)) == (learning_rate, other_lr_scale) else None


@dataclass(frozen=True)
class Search:
    """Where a search stands.

    Attributes:
        best: the best point on the search's way so far; the start if there is none.
        loss: its loss; infinite if every run so far diverged.
        coming: the points to evaluate next, in any order or at once; empty if the search has ended.
        bracketed: whether the search ended because no neighbour of the best point is better.
    """

    best: Point
    loss: float
    coming: tuple[Point, ...]
    bracketed: bool


def search(losses: Mapping[Point, float], limit: int = 25) -> Search:
    """What a coordinate search has found, and what it needs to know next.

    Args:
        losses: loss of each point evaluated so far, in any order; one that is not finite is a run that diverged.
        limit: points after which the search gives up.

    Raises:
        ValueError: `limit` is below 1.
    """
    if limit < 1:
        raise ValueError(f"limit={limit}: a search evaluates 1 point or more")
    # the search is done again from its start, so that neither the order of the runs nor a stop changes its path
    known: dict[Point, float] = {}
    while True:
        best = min(known, key=lambda point: _order(point, known[point]), default=(0, 0))
        loss = known.get(best, math.inf)
        loss = loss if math.isfinite(loss) else math.inf
        i, j = best
        around = [[(0, 0)], [(i - 1, j), (i + 1, j)], [(i, j - 1), (i, j + 1)]]
        asked = next((points for points in around if not known.keys() >= set(points)), [])
        new = [point for point in asked if point not in known][: limit - len(known)]
        coming = tuple(point for point in new if point not in losses)
        if coming or not new:
            return Search(best, loss, coming, bracketed=not asked and loss < math.inf)
        known |= {point: losses[point] for point in new}


def _order(point: Point, loss: float) -> tuple[float, ...]:
    """Sorts points from the best to the worst, without ties."""
    if not math.isfinite(loss):
        # the way out of where every run diverges is down
        return math.inf, point[0] + point[1], *point
    return loss, abs(point[0]) + abs(point[1]), *point


def _round(value: float) -> float:
    return float(f"{value:.3g}")
