"""The search for learning rates, on surfaces whose lowest point is known."""

import math
import random
import sys

import pytest

from hf_lowrank.study.search import Grid, search


def bowl(lowest, slant=0.0):
    """A loss that is lowest at a point; `slant` couples the two coordinates."""

    def loss(point):
        x, y = point[0] - lowest[0], point[1] - lowest[1]
        return 4 + x * x + y * y + slant * x * y

    return loss


def run(surface, limit=25, losses=None):
    """Evaluate what the search asks for until it asks for nothing."""
    losses = dict(losses or {})
    while (state := search(losses, limit)).coming:
        assert not set(state.coming) & losses.keys()
        losses |= {point: surface(point) for point in state.coming}
    return state, losses


@pytest.mark.parametrize("slant", [0.0, 0.8, -0.8])
@pytest.mark.parametrize("lowest", [(0, 0), (2, 0), (0, -2), (1, 2), (-2, 3)])
def test_the_lowest_point_is_found_with_neighbours_on_both_sides(lowest, slant):
    state, losses = run(bowl(lowest, slant))
    assert (state.best, state.loss, state.bracketed) == (lowest, 4, True)
    i, j = state.best
    assert {(i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)} <= losses.keys()


def test_what_a_search_costs():
    assert len(run(bowl((0, 0)))[1]) == 5
    # one step along one coordinate: its further neighbour, and both in the other coordinate
    assert len(run(bowl((1, 0)))[1]) == 6
    assert len(run(bowl((0, 1)))[1]) == 8


def test_it_goes_on_from_any_part_of_its_results_and_in_any_order():
    state, losses = run(bowl((2, -1), 0.5))
    items = list(losses.items())
    for cut in range(len(items)):
        part = items[:cut]
        random.Random(cut).shuffle(part)
        assert run(bowl((2, -1), 0.5), losses=part) == (state, losses)


def test_equal_losses_end_the_search_at_the_start():
    state, losses = run(lambda point: 5.0)
    assert (state.best, state.bracketed, len(losses)) == ((0, 0), True, 5)
    # two equal points on either side of the start: the lower one, whatever came first
    assert search({(1, 0): 1.0, (-1, 0): 1.0, (0, 0): 2.0}).best == (-1, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_run_that_diverged_is_worse_than_any_other(bad):
    state, losses = run(lambda point: bad if point[0] > 0 or point[1] > 1 else bowl((2, 3))(point))
    assert state.best == (0, 1)
    assert state.bracketed
    assert losses[(1, 1)] is bad


def test_where_every_run_diverges_the_search_goes_down_until_one_does_not():
    def surface(point):
        return math.nan if sum(point) > -3 else bowl((-3, -1))(point)

    state, _ = run(surface)
    assert (state.best, state.bracketed) == ((-3, -1), True)
    state, losses = run(lambda point: math.nan, limit=12)
    assert (len(losses), state.loss, state.bracketed) == (12, math.inf, False)


def test_a_search_gives_up_at_its_limit():
    state, losses = run(lambda point: -point[0], limit=9)
    assert (len(losses), state.bracketed) == (9, False)
    with pytest.raises(ValueError, match="limit=0: a search evaluates 1 point or more"):
        search({}, 0)


@pytest.mark.parametrize("ratio", [2.0, 3.0, 10**0.5])
def test_settings_and_points_belong_together(ratio):
    grid = Grid(3e-3, 1e-2, ratio)
    points = [(i, j) for i in range(-4, 5) for j in range(-4, 5)]
    settings = [grid.settings(point) for point in points]
    assert len(set(settings)) == len(points)
    assert [grid.point(*each) for each in settings] == points
    for (i, j), (rate, scale) in zip(points, settings, strict=True):
        assert rate == pytest.approx(3e-3 * ratio**i, rel=5e-3)
        assert rate * scale == pytest.approx(1e-2 * ratio**j, rel=1e-2)
    assert grid.point(4e-3, 1.0) is None


@pytest.mark.parametrize(
    ("values", "message"), [((0, 1), "targets=0"), ((1, math.nan), "others=nan"), ((1, 1, 1.0), "ratio=1.0")]
)
def test_a_grid_that_makes_no_sense_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Grid(*values)


def test_the_search_needs_no_torch():
    import subprocess

    code = "import sys, hf_lowrank.study.search; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
