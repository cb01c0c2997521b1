"""Orders of hidden units and heads that are known, found again."""

import numpy as np
import pytest
import torch
from tiny_runs import METHODS, arguments, llama, weights
from torch import nn
from transformers import (
    CohereConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
    set_seed,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

import hf_lowrank as lr
from hf_lowrank.metrics.alignment import align
from hf_lowrank.metrics.interpolation import barrier, loss_path

SIZES = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bos_token_id=0, eos_token_id=0)
WIDE = dict(SIZES, intermediate_size=48, pad_token_id=0)
GROUPED = dict(WIDE, num_key_value_heads=2)
GPT2 = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0)
CONFIGS = {
    "llama": LlamaConfig(**WIDE),
    "llama, grouped queries": LlamaConfig(**GROUPED),
    "llama, biases": LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True),
    "gpt2": GPT2,
    "opt": OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, pad_token_id=0),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen3, norms of one head": Qwen3Config(**GROUPED, head_dim=8),
    "olmo2, norms over all heads": Olmo2Config(**GROUPED),
}
IDS = torch.arange(24).reshape(2, 12) * 7 % 64


def build(config, seed=0, scale=0.3):
    """Weights, biases and norms far enough from their initial values that order matters."""
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model


def logits(model, state):
    model.load_state_dict(state)
    with torch.no_grad():
        return model(input_ids=IDS).logits


def inner(a, b):
    return sum((a[name].double() * b[name].double()).sum().item() for name in a)


def shuffled(model, seed=0):
    """The model's weights with units and heads in another order, and that order, written out by hand for Llama."""
    state, config, orders = weights(model), model.config, {}
    generator = np.random.default_rng(seed)
    groups = config.num_key_value_heads
    size = config.num_attention_heads // groups
    for i in range(config.num_hidden_layers):
        units = torch.from_numpy(generator.permutation(config.intermediate_size))
        groups_order = generator.permutation(groups)
        heads = torch.from_numpy(np.concatenate([g * size + generator.permutation(size) for g in groups_order]))
        for name, order, axis in (
            ("mlp.gate_proj", units, 0),
            ("mlp.up_proj", units, 0),
            ("mlp.down_proj", units, 1),
            ("self_attn.q_proj", heads, 0),
            ("self_attn.k_proj", torch.from_numpy(groups_order), 0),
            ("self_attn.v_proj", torch.from_numpy(groups_order), 0),
            ("self_attn.o_proj", heads, 1),
        ):
            key = f"model.layers.{i}.{name}.weight"
            blocks = state[key].movedim(axis, 0).unflatten(0, (len(order), -1))
            state[key] = blocks[order].flatten(0, 1).movedim(0, axis)
        orders |= {f"model.layers.{i}.mlp": units, f"model.layers.{i}.self_attn": heads}
    return state, orders


@pytest.mark.parametrize("case", ["llama", "llama, grouped queries"])
def test_a_permutation_of_a_model_is_undone_bit_for_bit(case):
    model = build(CONFIGS[case])
    own = weights(model)
    state, orders = shuffled(model)
    torch.testing.assert_close(logits(model, state), logits(model, own), rtol=1e-4, atol=1e-4)
    found = align(model, own, state)
    assert found.permutations.keys() == orders.keys()
    assert all(
        torch.equal(orders[name][order], torch.arange(len(order))) for name, order in found.permutations.items()
    )
    assert all(torch.equal(found.state[name], tensor) for name, tensor in own.items())
    moved = torch.cat([order != torch.arange(len(order)) for order in orders.values()])
    assert found.moved == pytest.approx(moved.double().mean().item())


def test_aligned_states_are_undone_from_their_permutations_as_well():
    model = build(GPT2)
    own = weights(model)
    mixed = align(model, weights(build(GPT2, seed=1)), own)
    assert mixed.moved > 0.5
    found = align(model, own, mixed.state)
    assert all(torch.equal(found.state[name], tensor) for name, tensor in own.items())
    for name, order in found.permutations.items():
        assert torch.equal(mixed.permutations[name][order], torch.arange(len(order)))


@pytest.mark.parametrize("case", CONFIGS)
def test_the_function_stays_and_the_inner_product_grows(case):
    model = build(CONFIGS[case])
    a, b = weights(model), weights(build(CONFIGS[case], seed=1))
    before = {name: tensor.clone() for name, tensor in b.items()}
    found = align(model, a, b)
    assert all(torch.equal(b[name], tensor) for name, tensor in before.items())
    assert all(order.sort().values.equal(torch.arange(len(order))) for order in found.permutations.values())
    assert found.moved > 0.5
    assert {len(order) for order in found.permutations.values()} == {4, 128 if case == "gpt2" else 48}
    assert inner(a, found.state) > inner(a, b)
    torch.testing.assert_close(logits(model, found.state), logits(model, b), rtol=1e-4, atol=1e-4)
    for name in b:
        # what has no axis of hidden units or heads
        if "embed" in name or "layernorm" in name or "ln_" in name:
            assert found.state[name] is b[name], name
    assert found.state.keys() == b.keys()
    assert all(found.state[name].dtype == b[name].dtype for name in b)
    # nothing is left to gain
    again = align(model, a, found.state)
    assert again.moved == 0
    assert all(again.state[name] is tensor for name, tensor in found.state.items())


@pytest.mark.parametrize("case", CONFIGS)
def test_a_noisy_permutation_is_undone(case):
    model = build(CONFIGS[case])
    own = weights(model)
    mixed = align(model, weights(build(CONFIGS[case], seed=1)), own)
    noise = torch.Generator().manual_seed(0)
    noisy = {k: v + 0.02 * torch.randn(v.shape, generator=noise) for k, v in mixed.state.items()}
    found = align(model, own, noisy)
    for name, order in found.permutations.items():
        assert torch.equal(mixed.permutations[name][order], torch.arange(len(order)))
    torch.testing.assert_close(logits(model, found.state), logits(model, noisy), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_of_all_orders_of_grouped_heads_the_best_is_found(seed):
    model = build(CONFIGS["llama, grouped queries"])
    a, b = weights(model), weights(build(CONFIGS["llama, grouped queries"], seed=seed + 1))
    orders = [[*first, *second] for first in ([0, 1], [1, 0]) for second in ([2, 3], [3, 2])]
    orders += [[*order[2:], *order[:2]] for order in orders]
    for name, found in align(model, a, b).permutations.items():
        if name.endswith("self_attn"):
            values = [attention_inner(a, b, name, torch.tensor(order)) for order in orders]
            assert found.tolist() == orders[int(np.argmax(values))]


def attention_inner(a, b, name, order):
    """Inner product of an attention of A with that of B in another order: 4 heads, 2 key/value heads."""
    q, k, v, o = (f"{name}.{layer}_proj.weight" for layer in "qkvo")
    pairs = [(a[q].unflatten(0, (4, -1)), b[q].unflatten(0, (4, -1))[order])]
    pairs += [(a[o].T.unflatten(0, (4, -1)), b[o].T.unflatten(0, (4, -1))[order])]
    pairs += [(a[key].unflatten(0, (2, -1)), b[key].unflatten(0, (2, -1))[order[::2] // 2]) for key in (k, v)]
    return sum((x.double() * y.double()).sum().item() for x, y in pairs)


def test_the_barrier_to_an_own_permutation_is_gone_after_alignment():
    model = build(CONFIGS["llama, grouped queries"])
    own, (state, _), grid = weights(model), shuffled(model), np.linspace(0, 1, 5)
    with torch.no_grad():
        # no weights are better at these targets than the model's own, so what lies between is worse
        targets = model(input_ids=IDS).logits.softmax(-1)

    def loss(m):
        return -(targets * m(input_ids=IDS).logits.log_softmax(-1)).sum(-1).mean().item()

    assert barrier(grid, loss_path(model, own, state, loss, grid)).value > 0.1
    aligned = align(model, own, state).state
    assert abs(barrier(grid, loss_path(model, own, aligned, loss, grid)).value) <= 1e-6


def test_half_precision_and_mixed_dtypes():
    model = build(CONFIGS["llama"])
    own, (state, _) = weights(model), shuffled(model)
    found = align(model, own, {name: tensor.bfloat16() for name, tensor in state.items()})
    assert all(torch.equal(tensor, own[name].bfloat16()) for name, tensor in found.state.items())


def test_states_of_other_models_and_broken_ones_are_named():
    model = llama()
    with pytest.raises(ValueError, match="state_b has another shape for"):
        align(model, weights(model), weights(llama(hidden_size=32)))
    with pytest.raises(ValueError, match=r"state_a lacks model\.layers\.1\."):
        align(model, weights(llama(num_hidden_layers=1)), weights(model))
    broken = weights(model)
    broken["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"state_b holds NaN or infinity in model\.layers\.1\.mlp\.up_proj\.weight"):
        align(model, weights(model), broken)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (MixtralConfig(**GROUPED, num_local_experts=2), r"model\.layers\.0\.mlp\.experts\.gate_up_proj of shape"),
        (CohereConfig(**GROUPED, use_qk_norm=True), r"model\.layers\.0\.self_attn\.q_norm\.weight of shape \(4, 8\)"),
    ],
)
def test_other_blocks_are_refused(config, named):
    model = build(config)
    with pytest.raises(ValueError, match=f"{named}.* it takes layers of an attention .* compare others"):
        align(model, weights(model), weights(model))


@pytest.mark.parametrize("method", ["sltrain", "cola", "lora"])
def test_reparameterised_layers_are_refused(tmp_path, method):
    model = lr.prepare(llama(), METHODS[method], arguments(tmp_path))[0]
    with pytest.raises(ValueError, match=r"layers\.0\..* is a \w+, which .*: it takes .*hf_lowrank\.to_dense"):
        align(model, weights(model), weights(model))


def refused(change):
    model = build(CONFIGS["llama, grouped queries"])
    change(model.model.layers[1])
    with pytest.raises(ValueError, match=r"model\.layers\.[01]\.") as refusal:
        align(model, weights(model), weights(model))
    return str(refusal.value)


def test_what_would_change_the_function_is_refused():
    def norm_inside(layer):
        layer.mlp.norm = nn.LayerNorm(48)

    def norm_of_other_width(layer):
        layer.other_norm = nn.LayerNorm(48)

    def sinks(layer):
        layer.self_attn.sinks = nn.Parameter(torch.zeros(4))

    def third_writer(layer):
        layer.mlp.gate_proj = nn.Linear(32, 40)

    def other_heads(layer):
        layer.self_attn.head_dim = 5

    assert "model.layers.1.mlp.norm.weight of shape (48,)" in refused(norm_inside)
    assert "model.layers.1.other_norm.weight of shape (48,)" in refused(norm_of_other_width)
    assert "model.layers.1.self_attn.sinks of shape (4,)" in refused(sinks)
    assert "model.layers.1.mlp has layers that do not write the 48 units" in refused(third_writer)
    assert "model.layers.1.self_attn with head_dim 5 has layers of" in refused(other_heads)
    model = build(CONFIGS["llama"])
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj\.weight is tied to another parameter"):
        align(model, weights(model), weights(model))
    with pytest.raises(ValueError, match=r"Linear has no layers in an nn\.ModuleList"):
        align(nn.Linear(2, 2), nn.Linear(2, 2).state_dict(), nn.Linear(2, 2).state_dict())
