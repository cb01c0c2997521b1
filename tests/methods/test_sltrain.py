"""SLTrain's layer against a plain dense one, and what it keeps in memory."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lowrank import SLTrainConfig
from hf_lowrank.methods import SLTrainLinear


def layer(n=12, m=20, r=3, alpha=8, sparsity=0.1, bias=True, dtype=torch.float64, seed=0):
    made = SLTrainLinear(n, m, r, alpha, sparsity, bias, generator=torch.Generator().manual_seed(seed)).to(dtype)
    with torch.no_grad():
        made.B.normal_(generator=torch.Generator().manual_seed(seed + 1))
    return made


def plain_weight(made):
    """W by the definition, entry by entry of S."""
    S = torch.zeros(made.out_features * made.in_features, dtype=made.A.dtype)
    S = S.scatter(0, made.sparse_support.long(), made.sparse_values)
    return made.scaling * made.B @ made.A + S.view(made.out_features, made.in_features)


def test_forward_and_all_gradients_equal_a_dense_layers():
    made, x = layer(), torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 5, 20, dtype=torch.float64)
    parameters = [x, *made.parameters()]
    mine = torch.autograd.grad((made(x) * upstream).sum(), parameters)
    plain = F.linear(x, plain_weight(made), made.bias)
    theirs = torch.autograd.grad((plain * upstream).sum(), parameters)
    torch.testing.assert_close(made(x), plain, rtol=1e-12, atol=1e-12)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_gradcheck_and_gradgradcheck():
    made = layer(n=4, m=5, r=2, sparsity=0.3)
    inputs = (
        torch.randn(3, 4, dtype=torch.float64, requires_grad=True),
        made.A,
        made.B,
        made.sparse_values,
        made.bias,
    )

    def run(x, A, B, values, bias):
        return torch.func.functional_call(made, {"A": A, "B": B, "sparse_values": values, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_no_dense_weight_is_kept_for_backward():
    made, x = layer(n=64, m=96, dtype=torch.float32, bias=False), torch.randn(4, 64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        made(x)
    assert (96, 64) not in saved
    assert max(torch.Size(shape).numel() for shape in saved) < 96 * 64


def test_initial_values_and_support():
    made = SLTrainLinear(100, 80, 10, 32, 0.03, generator=torch.Generator().manual_seed(0))
    support = made.sparse_support
    assert support.dtype == torch.int32
    assert len(support) == len(made.sparse_values) == int(0.03 * 8000) == len(support.unique())
    assert support.min() >= 0
    assert support.max() < 8000
    assert made.B.abs().max() == 0
    for tensor in (made.A, made.sparse_values):
        assert tensor.abs().max() <= 0.1
        # the standard deviation of a uniform law in (-0.1, 0.1)
        assert tensor.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.15)


def test_the_support_is_spread_evenly():
    counts = torch.zeros(40 * 50)
    for seed in range(200):
        made = SLTrainLinear(50, 40, 2, 8, 0.1, generator=torch.Generator().manual_seed(seed))
        counts[made.sparse_support.long()] += 1
    # each position is drawn with probability 0.1: mean 20 in 200 draws, standard deviation 4.2
    assert counts.mean().item() == pytest.approx(20)
    assert counts.std().item() == pytest.approx(18**0.5, rel=0.1)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_replaces_either_kind_of_linear_layer_and_gives_it_back(kind):
    linear = nn.Linear(12, 20) if kind is nn.Linear else Conv1D(20, 12)
    nn.init.normal_(linear.bias)
    made = SLTrainConfig(r=3).replace_layer(linear, 3, torch.Generator().manual_seed(0))
    assert (made.in_features, made.out_features) == (12, 20)
    assert torch.equal(made.bias, linear.bias)
    linear.load_state_dict(made.dense_state())
    x = torch.randn(5, 12)
    torch.testing.assert_close(linear(x), made(x), rtol=1e-5, atol=1e-6)


def test_autocast_computes_in_bf16_and_keeps_fp32_gradients():
    made, x = layer(dtype=torch.float32), torch.randn(4, 12)
    with torch.autocast("cpu", torch.bfloat16):
        y = made(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in made.parameters())
    torch.testing.assert_close(y.float(), F.linear(x, plain_weight(made), made.bias), rtol=0.05, atol=0.1)


def test_compiles():
    made, x = layer(dtype=torch.float32), torch.randn(4, 12)
    compiled = torch.compile(made, backend="aot_eager")
    torch.testing.assert_close(compiled(x), made(x))


@pytest.mark.parametrize(
    ("fields", "word"), [({"sparsity": 1.0}, "sparsity"), ({"sparsity": -0.1}, "sparsity"), ({"alpha": 0}, "alpha")]
)
def test_values_out_of_range_are_named(fields, word):
    with pytest.raises(ValueError, match=word):
        SLTrainConfig(**fields)
