"""What every projected optimizer owes: any shape and rank, gradients that misbehave, state, groups."""

import io
import logging

import pytest
import torch
from optim_matrices import gradients, parameters, take_steps
from tiny_runs import optimizers
from torch import nn

from hf_lowrank.optim import ApolloAdamW, FiraAdamW, FrugalAdamW, GaLoreAdamW
from hf_lowrank.optim.projector import PROJ_TYPES, PROJECTIONS, REFRESHES

KINDS = {
    **{
        f"{cls.__name__} {p}": (cls, {"proj_type": p})
        for cls in optimizers()
        for p in PROJ_TYPES
        if "proj_type" in cls.options
    },
    **{cls.__name__: (cls, {}) for cls in optimizers() if "proj_type" not in cls.options},
    **{f"GaLore {r}": (GaLoreAdamW, {"refresh": r}) for r in REFRESHES},
    **{f"GaLore {p}": (GaLoreAdamW, {"projection": p}) for p in PROJECTIONS[1:]},
    "GaLore adaptive": (GaLoreAdamW, {"adaptive_gap": True, "stagger_refreshes": True, "rotate_moments": True}),
    "Fira full random": (FiraAdamW, {"projection": "random", "proj_type": "full", "rotate_moments": True}),
    "FRUGAL coordinates": (FrugalAdamW, {"projection": "coordinates"}),
    "FRUGAL rotated": (FrugalAdamW, {"projection": "sampled", "rotate_moments": True}),
    "Fira alpha 1": (FiraAdamW, {"alpha": 1.0}),
    "APOLLO-Mini": (ApolloAdamW, {"scale": 128.0, "scale_type": "tensor"}),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def make(kind, params, r, **changes):
    optimizer_cls, options = KINDS[kind]
    return optimizer_cls([{"params": params, "r": r, "update_proj_gap": 3, **options}], **{"lr": 1e-2, **changes})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_shape_and_rank_moves_and_stays_finite(kind, dtype):
    for shape in [(1, 12), (12, 1), (8, 12), (12, 8), (8, 8), (1, 1)]:
        for r in {1, min(shape)}:
            (p,) = params = parameters([shape], dtype)
            before = p.detach().clone()
            # a bf16 weight near 1 moves by steps of 1/128
            take_steps(make(kind, params, r, lr=0.1), params, gradients([shape], 7, dtype=dtype))
            assert torch.isfinite(p).all(), (shape, r)
            assert not torch.equal(p, before), (shape, r)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_and_rank_deficient_gradients(kind):
    shape = (12, 20)
    (p,) = params = parameters([shape])
    before = p.detach().clone()
    optimizer = make(kind, params, 6)
    take_steps(optimizer, params, [[torch.zeros(shape)]] * 4)
    assert torch.equal(p, before)
    rank_two = torch.randn(12, 2) @ torch.randn(2, 20)
    take_steps(optimizer, params, [[1e-3 * rank_two]] * 4)
    assert torch.isfinite(p).all()
    assert not torch.equal(p, before)


@pytest.mark.parametrize("kind", KINDS)
def test_weight_decay_reaches_the_projected_weights_once(kind):
    shape = (12, 20)
    grads = gradients([shape], 1, dtype=torch.float64)
    final = []
    for decay in (0.0, 0.1):
        (p,) = params = parameters([shape], torch.float64)
        take_steps(make(kind, params, 4, weight_decay=decay), params, grads)
        final.append(p.detach())
    # FRUGAL's official code decays before the update, the others' after it
    decayed = parameters([shape], torch.float64)[0].detach() if "rugal" in kind.lower() else final[0]
    torch.testing.assert_close(final[1], final[0] - 1e-2 * 0.1 * decayed, rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_counts_once_and_not_without_a_gradient(kind):
    params = parameters([(12, 20), (20, 12), (5,)])
    optimizer_cls, options = KINDS[kind]
    optimizer = optimizer_cls(
        [{"params": params[:2], "r": 4, "update_proj_gap": 3, **options}, {"params": params[2:]}], lr=1e-2
    )
    grads = gradients([(12, 20), (20, 12), (5,)], 6)
    for step in (1, 4):
        grads[step][0] = grads[step][2] = None
    take_steps(optimizer, params, grads)
    assert [int(optimizer.state[p]["step"]) for p in params] == [4, 6, 4]
    # a parameter that got no gradient in some steps is where one is that only had the others
    alone = parameters([(12, 20)])
    kept = [[step[0]] for step in grads if step[0] is not None]
    take_steps(make(kind, alone, 4), alone, kept)
    # what is drawn for a parameter depends on its place among the others
    if "seed" not in optimizer.state[params[0]]:
        torch.testing.assert_close(params[0], alone[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_is_not_finite_changes_nothing(kind, bad, caplog):
    params = parameters([(12, 20), (5,)])
    optimizer_cls, options = KINDS[kind]
    groups = [{"params": params[:1], "r": 4, "update_proj_gap": 2, **options}, {"params": params[1:]}]
    optimizer = optimizer_cls(groups, lr=1e-2)
    grads = gradients([(12, 20), (5,)], 4)
    take_steps(optimizer, params, grads[:2])
    before = [p.detach().clone() for p in params]
    states = [{k: torch.as_tensor(v).clone() for k, v in optimizer.state[p].items()} for p in params]
    broken = [g.clone() for g in grads[2]]
    for g in broken:
        g.view(-1)[-1] = bad
    with caplog.at_level(logging.WARNING):
        take_steps(optimizer, params, [broken, broken])
    assert sum("not finite" in record.message for record in caplog.records) == 1
    assert "parameter 0 of group 0" in caplog.text
    for p, q, state in zip(params, before, states, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(torch.as_tensor(optimizer.state[p][k]), v) for k, v in state.items())
    take_steps(optimizer, params, grads[2:])
    assert not torch.equal(params[0], before[0])


@pytest.mark.parametrize("kind", KINDS)
def test_huge_gradients_leave_finite_weights(kind):
    shape = (12, 20)
    (p,) = params = parameters([shape])
    optimizer = make(kind, params, 4)
    take_steps(optimizer, params, gradients([shape], 2))
    # squares of these overflow
    take_steps(optimizer, params, gradients([shape], 2, scale=1e25))
    take_steps(optimizer, params, gradients([shape], 2))
    assert torch.isfinite(p).all()


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_tensors_and_numbers_and_going_on_from_it_is_bit_identical(kind):
    shapes = [(12, 20), (20, 12), (5,)]
    optimizer_cls, options = KINDS[kind]

    def make_both(params):
        groups = [{"params": params[:2], "r": 4, "update_proj_gap": 3, **options}, {"params": params[2:]}]
        return optimizer_cls(groups, lr=1e-2)

    grads = gradients(shapes, 10)
    whole, first = parameters(shapes), parameters(shapes)
    take_steps(make_both(whole), whole, grads)
    optimizer = make_both(first)
    optimizer.init_state()
    made = {k: torch.as_tensor(v).shape for k, v in optimizer.state[first[0]].items()}
    take_steps(optimizer, first, grads[:5])
    assert {k: torch.as_tensor(v).shape for k, v in optimizer.state[first[0]].items()} == made
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    second = [nn.Parameter(p.detach().clone()) for p in first]
    resumed = make_both(second)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    take_steps(resumed, second, grads[5:])
    for p, q in zip(whole, second, strict=True):
        assert torch.equal(p, q)


def test_a_weight_and_gradient_that_are_laid_out_by_columns():
    for kind in KINDS:
        (p,), (q,) = rows, columns = (
            parameters([(12, 20)]),
            [nn.Parameter(parameters([(12, 20)])[0].data.T.contiguous().T)],
        )
        assert not q.is_contiguous()
        grads = gradients([(12, 20)], 5)
        take_steps(make(kind, rows, 4), rows, grads)
        take_steps(make(kind, columns, 4), columns, grads)
        torch.testing.assert_close(p, q)
    plain = [parameters([(12, 20)]), [nn.Parameter(parameters([(12, 20)])[0].data.T.contiguous().T)]]
    for params in plain:
        take_steps(GaLoreAdamW(params, lr=1e-2), params, gradients([(12, 20)], 5))
    torch.testing.assert_close(plain[0][0], plain[1][0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_above_the_shorter_side_names_the_parameter(kind):
    with pytest.raises(ValueError, match=r"r=13 and parameter 1 of group 0 of shape \(12, 20\)"):
        make(kind, parameters([(20, 20), (12, 20)]), 13)
    with pytest.raises(ValueError, match="matrix"):
        make(kind, parameters([(12,)]), 4)


def test_a_sparse_gradient_names_the_parameter():
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = GaLoreAdamW(embedding.parameters(), lr=1e-2)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="the gradient of parameter 0 of group 0 is sparse"):
        optimizer.step()


# Stacks of matrices


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_stack_is_stepped_as_its_matrices_are_by_themselves(kind, shape, dtype):
    single = parameters([(9, 8)] + [shape] * 3, dtype)
    stacked = [nn.Parameter(single[0].detach().clone()), nn.Parameter(torch.stack([p.detach() for p in single[1:]]))]
    grads = gradients([(9, 8)] + [shape] * 3, 11, dtype=dtype)
    # a matrix whose gradient is not finite is left out alone, also where its projector is due; one that is zero is not
    grads[3][2].view(-1)[0] = float("nan")
    grads[5][1].view(-1)[-1] = float("inf")
    grads[6][3].zero_()
    together = [[first, torch.stack(rest)] for first, *rest in grads]
    options = dict(r=4, weight_decay=0.1)
    separate, optimizer = make(kind, single, **options), make(kind, stacked, **options)
    take_steps(separate, single, grads)
    take_steps(optimizer, stacked, together[:7])
    # on from a checkpoint, which holds tensors and numbers alone
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    resumed = make(kind, stacked, **options)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    take_steps(resumed, stacked, together[7:])
    assert torch.equal(stacked[0], single[0])
    state = resumed.state[stacked[1]]
    for i, p in enumerate(single[1:]):
        assert torch.equal(stacked[1][i], p)
        for key, value in separate.state[p].items():
            assert state[key][i] == value if isinstance(value, int) else torch.equal(state[key][i], value), key
    assert state["step"].tolist() == [10.0, 10.0, 11.0]


def test_a_stack_with_a_rank_above_its_matrices_shorter_side():
    with pytest.raises(ValueError, match=r"r=5 and parameter 0 of group 0 of shape \(8, 4, 9\): r is at most"):
        make("APOLLO-Mini", parameters([(8, 4, 9)]), 5)
