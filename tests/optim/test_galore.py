"""GaLoreAdamW against a plain reference, the official package, AdamW, and its own promises about state."""

import io
import logging

import pytest
import torch
from galore_reference import ReferenceGaLore
from optim_matrices import SHAPES, gradients, parameters, relative_error, take_steps

from hf_lowrank.optim import GaLoreAdamW
from hf_lowrank.optim.projector import PROJ_TYPES, REFRESHES, moment_shape


@pytest.mark.parametrize("gap", [200, 7])
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_equals_the_reference(proj_type, gap):
    shapes = [*SHAPES, (50, 8), (16,)]
    params = parameters(shapes)
    options = {"r": 8, "update_proj_gap": gap, "scale": 0.25, "proj_type": proj_type, "refresh": "svd"}
    references = [ReferenceGaLore(p.data, 8, gap, 0.25, proj_type, wd=0.1) for p in params[:3]]
    references += [ReferenceGaLore(p.data.view(len(p), -1), wd=0.1) for p in params[3:]]
    optimizer = GaLoreAdamW([{"params": params[:3], **options}, {"params": params[3:]}], lr=1e-2, weight_decay=0.1)
    grads = gradients(shapes, 20)
    take_steps(optimizer, params, grads)
    for step in grads:
        for reference, g in zip(references, step, strict=True):
            reference.step(g.view(reference.W.shape))
    for p, reference in zip(params, references, strict=True):
        assert relative_error(p.data.view(reference.W.shape), reference.W) < 1e-5


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_equals_galore_torch(proj_type):
    official = pytest.importorskip("galore_torch", reason="the official package is in the test extra")
    mine, theirs = parameters([*SHAPES, (50, 8)]), parameters([*SHAPES, (50, 8)])
    options = {"update_proj_gap": 7, "scale": 0.25, "proj_type": proj_type}
    ours = GaLoreAdamW(
        [{"params": mine[:3], "r": 8, "refresh": "svd", **options}, {"params": mine[3:]}], lr=1e-2, weight_decay=0.1
    )
    reference = official.GaLoreAdamW(
        [{"params": theirs[:3], "rank": 8, **options}, {"params": theirs[3:]}],
        lr=1e-2,
        weight_decay=0.1,
        no_deprecation_warning=True,
    )
    grads = gradients([*SHAPES, (50, 8)], 20)
    take_steps(ours, mine, grads)
    take_steps(reference, theirs, grads)
    for p, q in zip(mine, theirs, strict=True):
        assert relative_error(p, q) < 1e-5


@pytest.mark.parametrize("refresh", ["gram", "subspace"])
def test_a_fast_refresh_within_one_gap_gives_the_same_subspace_of_updates(refresh):
    # the basis may differ, so the updates do; what they must share is the space they move in
    params = parameters([(24, 40)])
    before = params[0].detach().clone()
    optimizer = GaLoreAdamW([{"params": params, "r": 4, "refresh": refresh}], lr=1e-2)
    grads = gradients([(24, 40)], 5)
    take_steps(optimizer, params, grads)
    U = torch.linalg.svd(grads[0][0]).U[:, :4]
    update = params[0].detach() - before
    assert relative_error(U @ U.T @ update, update) < 1e-4


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "right", "left"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("refresh", REFRESHES)
def test_full_rank_is_adam_in_a_rotated_basis(shape, proj_type, refresh):
    (p,) = params = parameters([shape])
    before = p.detach().clone()
    q = min(shape)
    group = {"params": params, "r": q, "proj_type": proj_type, "refresh": refresh, "scale": 1.0}
    take_steps(GaLoreAdamW([group], lr=1.0), params, gradients([shape], 1, scale=10.0))
    # after one step every entry of N is 1 or -1 in the rotated basis (eps is small beside the gradient), so the
    # update's norm is known
    rows, cols = moment_shape(shape, q, proj_type)
    assert (p.detach() - before).norm().item() == pytest.approx((rows * cols) ** 0.5, rel=1e-3)


def test_unprojected_arithmetic_is_adams_when_eps_does_not_matter():
    mine, theirs = parameters([(8, 8), (5,)], torch.float64), parameters([(8, 8), (5,)], torch.float64)
    grads = gradients([(8, 8), (5,)], 20, dtype=torch.float64, scale=1.0)
    take_steps(GaLoreAdamW(mine, lr=1e-2, eps=0.0), mine, grads)
    take_steps(torch.optim.AdamW(theirs, lr=1e-2, eps=0.0, weight_decay=0.0), theirs, grads)
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=0)


def test_state_is_tensors_of_fixed_shapes_and_loads_with_weights_only():
    params = parameters([(24, 40), (6,)])
    groups = [{"params": params[:1], "r": 8, "proj_type": "full"}, {"params": params[1:]}]
    optimizer = GaLoreAdamW(groups, lr=1e-2)
    optimizer.init_state()
    before = {k: v.shape for k, v in optimizer.state[params[0]].items()}
    take_steps(optimizer, params, gradients([(24, 40), (6,)], 3))
    state = optimizer.state[params[0]]
    assert {k: v.shape for k, v in state.items()} == before
    assert set(state) == {"step", "exp_avg", "exp_avg_sq", "projector", "projector_right"}
    assert state["exp_avg"].shape == (8, 8)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    fresh = GaLoreAdamW([{"params": params[:1], "r": 8, "proj_type": "full"}, {"params": params[1:]}], lr=1e-2)
    fresh.load_state_dict(loaded)
    for key, tensor in state.items():
        assert torch.equal(fresh.state[params[0]][key], tensor)


@pytest.mark.parametrize("refresh", REFRESHES)
def test_going_on_from_a_saved_state_is_bit_identical(refresh):
    def make(params):
        return GaLoreAdamW([{"params": params, "r": 8, "update_proj_gap": 4, "refresh": refresh}], lr=1e-2)

    grads = gradients(SHAPES, 12)
    whole, first = parameters(SHAPES), parameters(SHAPES)
    take_steps(make(whole), whole, grads)
    optimizer = make(first)
    take_steps(optimizer, first, grads[:6])
    second = [torch.nn.Parameter(p.detach().clone()) for p in first]
    resumed = make(second)
    resumed.load_state_dict(optimizer.state_dict())
    take_steps(resumed, second, grads[6:])
    for p, q in zip(whole, second, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_reported_once(bad, at, caplog):
    params = parameters([(24, 40), (6,)])
    optimizer = GaLoreAdamW([{"params": params[:1], "r": 8, "update_proj_gap": 2}, {"params": params[1:]}], lr=1e-2)
    grads = gradients([(24, 40), (6,)], 5)
    take_steps(optimizer, params, grads[:at])
    before = [p.detach().clone() for p in params]
    states = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in params]
    broken = [g.clone() for g in grads[at]]
    for g in broken:
        g.view(-1)[3] = bad
    with caplog.at_level(logging.WARNING):
        take_steps(optimizer, params, [broken, broken])
    assert sum("not finite" in record.message for record in caplog.records) == 1
    for p, q in zip(params, before, strict=True):
        assert torch.equal(p, q)
    if at > 0:
        for p, state in zip(params, states, strict=True):
            assert all(torch.equal(optimizer.state[p][k], v) for k, v in state.items())
    take_steps(optimizer, params, [grads[at]])
    assert not torch.equal(params[0], before[0])
    assert torch.isfinite(params[0]).all()


def test_learning_rate_is_read_at_every_step():
    params = parameters([(24, 40)])
    optimizer = GaLoreAdamW([{"params": params, "r": 8}], lr=1e-2)
    optimizer.param_groups[0]["lr"] = 0.0
    before = params[0].detach().clone()
    take_steps(optimizer, params, gradients([(24, 40)], 2))
    assert torch.equal(params[0], before)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"r": 0}, "r=0"),
        ({"r": 25}, "r=25"),
        ({"r": 4, "update_proj_gap": 0}, "update_proj_gap=0"),
        ({"r": 4, "scale": 0.0}, "scale=0.0"),
        ({"r": 4, "proj_type": "diagonal"}, "proj_type='diagonal'"),
        ({"r": 4, "refresh": "magic"}, "refresh='magic'"),
    ],
)
def test_options_that_make_no_sense_are_named(options, word):
    with pytest.raises(ValueError, match=word):
        GaLoreAdamW([{"params": parameters([(24, 40)]), **options}])


def test_a_vector_cannot_be_projected():
    with pytest.raises(ValueError, match="matrix"):
        GaLoreAdamW([{"params": parameters([(24,)]), "r": 4}])
