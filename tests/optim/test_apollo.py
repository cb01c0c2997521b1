"""ApolloAdamW against the official package, and what its random projections are."""

import pytest
import torch
from optim_matrices import SHAPES, gradients, parameters, relative_error, take_steps

from hf_lowrank.optim import ApolloAdamW

KINDS = {
    "APOLLO": {"r": 8, "scale": 1.0, "scale_type": "channel"},
    "APOLLO-Mini": {"r": 1, "scale": 128.0, "scale_type": "tensor"},
    "channels at full rank": {"r": 24, "scale": 1.0, "scale_type": "channel"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_equals_apollo_torch(kind):
    official = pytest.importorskip("apollo_torch", reason="the official package is in the test extra")
    mine, theirs = parameters(), parameters()
    options = {"update_proj_gap": 7, **KINDS[kind]}
    ours = ApolloAdamW([{"params": mine[:3], **options}, {"params": mine[3:]}], lr=1e-2, weight_decay=0.1)
    theirs_options = {**options, "rank": options["r"], "proj": "random", "proj_type": "std"}
    del theirs_options["r"]
    reference = official.APOLLOAdamW(
        [{"params": theirs[:3], **theirs_options}, {"params": theirs[3:]}], lr=1e-2, weight_decay=0.1
    )
    grads = gradients()
    take_steps(ours, mine, grads)
    take_steps(reference, theirs, grads)
    for p, q in zip(mine, theirs, strict=True):
        assert relative_error(p, q) < 1e-5


def test_the_update_is_the_gradient_scaled_by_channels():
    for shape, axis in (((40, 24), 1), ((24, 40), 0)):
        (p,) = params = parameters([shape], torch.float64)
        before, ((G,),) = p.detach().clone(), gradients([shape], 1, dtype=torch.float64)
        take_steps(ApolloAdamW([{"params": params, "r": 8}], lr=1e-2), params, [[G]])
        ratio = (p.detach() - before) / G
        torch.testing.assert_close(ratio, ratio.narrow(axis, 0, 1).expand_as(ratio), rtol=1e-6, atol=0)


def test_the_projection_has_entries_of_variance_one_over_r_and_is_drawn_anew_every_gap():
    shape = (60, 400)
    (p,) = params = parameters([shape])
    optimizer = ApolloAdamW([{"params": params, "r": 50, "update_proj_gap": 3}], lr=1e-3)
    drawn = []
    for _ in range(7):
        take_steps(optimizer, params, gradients([shape], 1))
        drawn.append(optimizer.state[p]["projector"].clone())
    assert torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[3], drawn[5])
    assert len({tuple(P.flatten()[:5].tolist()) for P in drawn}) == 3
    entries = torch.stack([drawn[0], drawn[3], drawn[6]])
    # 9000 entries: the mean's standard error is sigma / 95, the standard deviation's sigma / 134
    sigma = 50**-0.5
    assert abs(entries.mean()) < 4 * sigma / 95
    assert entries.std().item() == pytest.approx(sigma, abs=4 * sigma / 134)


def test_projections_depend_on_the_seed_and_the_parameter():
    def first_projections(seed):
        params = parameters([(24, 40), (24, 40)])
        optimizer = ApolloAdamW([{"params": params, "r": 8}], lr=1e-3, seed=seed)
        take_steps(optimizer, params, gradients([(24, 40), (24, 40)], 1))
        return [optimizer.state[p]["projector"] for p in params]

    one, two = first_projections(0), first_projections(1)
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one[0], two[0])
    assert torch.equal(one[1], first_projections(0)[1])


def test_the_scale_enters_by_its_root():
    updates = []
    for scale in (1.0, 4.0):
        (p,) = params = parameters([(24, 40)], torch.float64)
        before = p.detach().clone()
        optimizer = ApolloAdamW([{"params": params, "r": 1, "scale": scale, "scale_type": "tensor"}], lr=1e-2)
        take_steps(optimizer, params, gradients([(24, 40)], 5, dtype=torch.float64))
        updates.append(p.detach() - before)
    torch.testing.assert_close(updates[1], 2 * updates[0])


def test_an_unknown_scale_type_is_named():
    with pytest.raises(ValueError, match="scale_type='row': it is one of channel, tensor"):
        ApolloAdamW([{"params": parameters(SHAPES), "r": 8, "scale_type": "row"}])
