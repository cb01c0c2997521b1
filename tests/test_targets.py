"""Which layers are found, under which names, and what their dense weights are."""

import pytest
import torch
from tiny_runs import METHODS, VOCABULARY, gpt2, llama
from torch import nn
from toy_models import toy_model
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from hf_lowrank.methods.prepare import apply_method
from hf_lowrank.methods.targets import dense_weights, find_targets, hidden_size, linear_layers

SMALL = dict(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=4)
CONFIGS = {
    "llama": LlamaConfig(**SMALL, intermediate_size=24, num_key_value_heads=2),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32),
    "gpt_neox": GPTNeoXConfig(**SMALL, intermediate_size=24),
    "opt": OPTConfig(**SMALL, ffn_dim=24, word_embed_proj_dim=16),
    "mixtral": MixtralConfig(**SMALL, intermediate_size=24, num_key_value_heads=2, num_local_experts=2),
}
# kind -> (m, n) of what every one of the two blocks holds
KINDS = {
    "llama": {
        "self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16),
        "self_attn.o_proj": (16, 16), "mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24),
    },
    "gpt2": {
        "attn.c_attn": (48, 16), "attn.c_proj": (16, 16), "mlp.c_fc": (64, 16), "mlp.c_proj": (16, 64),
    },
    "gpt_neox": {
        "attention.query_key_value": (48, 16), "attention.dense": (16, 16), "mlp.dense_h_to_4h": (24, 16),
        "mlp.dense_4h_to_h": (16, 24),
    },
    "opt": {
        "self_attn.k_proj": (16, 16), "self_attn.v_proj": (16, 16), "self_attn.q_proj": (16, 16),
        "self_attn.out_proj": (16, 16), "fc1": (24, 16), "fc2": (16, 24),
    },
    # the experts of a layer are stacks, one parameter each; the router is no target
    "mixtral": {
        "self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16),
        "self_attn.o_proj": (16, 16), "mlp.experts.gate_up_proj": (48, 16), "mlp.experts.down_proj": (16, 24),
    },
}  # fmt: skip


def model_of(architecture):
    return AutoModelForCausalLM.from_config(CONFIGS[architecture])


@pytest.mark.parametrize("architecture", CONFIGS)
def test_default_targets_are_the_linear_layers_of_the_blocks(architecture):
    model = model_of(architecture)
    targets = find_targets(model)
    for layer in (0, 1):
        assert {t.kind: (t.rows, t.cols) for t in targets if t.layer == layer} == KINDS[architecture]
    assert len(targets) == 2 * len(KINDS[architecture])
    for target in targets:
        assert target.module is model.get_submodule(target.weight_name.rpartition(".")[0])
        assert (target.stack is None) == (target.name != target.weight_name)
        assert target.name.endswith(f".{target.layer}.{target.kind}")
        assert target.weight_name in dict(model.named_parameters())
    assert hidden_size(model) == 16


def test_t5_has_targets_in_encoder_and_decoder():
    config = T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=3, num_heads=2
    )
    targets = find_targets(T5ForConditionalGeneration(config))
    sides = {side: [t for t in targets if t.name.startswith(f"{side}.block.")] for side in ("encoder", "decoder")}
    # a block has q, k, v, o and the feed-forward's two; the decoder's has a cross-attention as well
    assert {side: len(found) for side, found in sides.items()} == {"encoder": 2 * 6, "decoder": 3 * 10}
    assert len(targets) == 42
    assert {t.layer for t in sides["decoder"]} == {0, 1, 2}
    assert "layer.1.EncDecAttention.k" in {t.kind for t in sides["decoder"]}
    assert hidden_size(T5ForConditionalGeneration(config)) == 16


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (["q_proj", "down_proj"], ["self_attn.q_proj", "mlp.down_proj"]),
        (("mlp.up_proj",), ["mlp.up_proj"]),
        (r".*\.self_attn\.[qk]_proj", ["self_attn.q_proj", "self_attn.k_proj"]),
    ],
    ids=["names", "suffix", "regex"],
)
def test_listed_names_and_a_regular_expression(wanted, found):
    assert [t.name for t in find_targets(llama(), wanted)] == [
        f"model.layers.{layer}.{kind}" for layer in (0, 1) for kind in found
    ]


def test_a_full_name_matches_one_layer_and_part_of_a_name_none():
    (target,) = find_targets(llama(), ["model.layers.1.mlp.up_proj"])
    assert (target.layer, target.kind, target.rows, target.cols) == (1, "mlp.up_proj", 24, 16)
    with pytest.raises(ValueError, match=r"\['up'\]"):
        find_targets(llama(), ["up"])
    with pytest.raises(ValueError, match="no layer matches"):
        find_targets(llama(), "up_proj")


def test_the_head_is_a_target_only_by_name():
    model = llama()
    everything = {t.name for t in find_targets(model, "all-linear")}
    assert everything == {t.name for t in find_targets(model)}
    (head,) = find_targets(model, ["lm_head"])
    assert (head.layer, head.kind, head.rows, head.cols) == (None, "lm_head", VOCABULARY, 16)
    classifier = GPT2ForSequenceClassification(CONFIGS["gpt2"])
    assert {t.name for t in find_targets(classifier, "all-linear")} == {t.name for t in find_targets(classifier)}
    assert [t.name for t in find_targets(classifier, ["score"])] == ["score"]


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        (["q_proj", "qproj"], r"target_modules=\['qproj'\]"),
        (["c_attn"], r"target_modules=\['c_attn'\]"),
        ([], r"target_modules=\[\]"),
        ("encoder[.]x", r"target_modules='encoder\[.\]x'"),
    ],
)
def test_what_matches_nothing_is_named_and_the_layers_are_listed(wanted, named):
    listed = "self_attn.q_proj, self_attn.k_proj, .*, mlp.down_proj, lm_head"
    with pytest.raises(ValueError, match=f"no layer matches {named}; the model's linear layers are: {listed}$"):
        find_targets(llama(), wanted)


def test_an_expression_that_is_none():
    with pytest.raises(ValueError, match=r"target_modules='\*proj' is no regular expression: nothing to repeat"):
        find_targets(llama(), "*proj")


def test_a_model_without_repeated_blocks():
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    with pytest.raises(ValueError, match="no layer matches the repeated blocks; the model's linear layers are: 0, 2"):
        find_targets(model)
    assert [(t.name, t.layer, t.kind) for t in find_targets(model, "all-linear")] == [
        ("0", None, "0"),
        ("2", None, "2"),
    ]
    assert hidden_size(model) is None
    with pytest.raises(ValueError, match="linear layers are: none"):
        find_targets(nn.Sequential(nn.ReLU()), "all-linear")


def test_blocks_are_the_outermost_lists_and_may_hold_bare_layers():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 6) for _ in range(2))

    model = nn.Module()
    model.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(2))
    model.blocks = nn.ModuleList(Experts() for _ in range(3))
    model.adapters = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    found = [(t.name, t.layer, t.kind) for t in find_targets(model)]
    assert found == [(f"blocks.{i}.experts.{j}", i, f"experts.{j}") for i in range(3) for j in range(2)] + [
        (f"adapters.{i}", i, "Linear") for i in range(2)
    ]


def test_dense_weights_of_conv1d_are_transposed():
    model = gpt2()
    for target, weight in dense_weights(model):
        stored = model.get_parameter(target.weight_name)
        assert weight.shape == (target.rows, target.cols)
        assert torch.equal(weight, stored.T)
        assert not weight.requires_grad
        # y = x Wᵀ + b, whatever way the layer keeps W
        x = torch.randn(3, target.cols)
        assert torch.allclose(target.module(x), x @ weight.T + target.module.bias, atol=1e-5)
    for target, weight in dense_weights(llama()):
        assert weight.shape == (target.rows, target.cols) == tuple(target.module.weight.shape)


@pytest.mark.parametrize("make", [llama, gpt2], ids=["Linear", "Conv1D"])
def test_the_same_targets_with_their_dense_weights_after_sltrain(make):
    model = make()
    before = [(t.name, t.rows, t.cols, t.layer, t.kind) for t in linear_layers(model)]
    apply_method(model, METHODS["sltrain"], seed=1)
    assert [(t.name, t.rows, t.cols, t.layer, t.kind) for t in linear_layers(model)] == before
    for target, weight in dense_weights(model):
        layer = target.module
        torch.nn.init.normal_(layer.B)
        S = torch.zeros(target.rows * target.cols)
        S[layer.sparse_support.long()] = layer.sparse_values.detach()
        expected = 32 / 4 * layer.B.detach() @ layer.A.detach() + S.view(target.rows, target.cols)
        assert torch.allclose(target.dense_weight(), expected, atol=1e-6)
        assert weight.shape == expected.shape


# Experts


STACKS = {
    # (stored as, rows, cols, transposed), for the toys' hidden size 32 and experts of size 48
    "mixtral": {"mlp.experts.gate_up_proj": ((4, 96, 32), 96, 32), "mlp.experts.down_proj": ((4, 32, 48), 32, 48)},
    "gpt_oss": {"mlp.experts.gate_up_proj": ((4, 32, 96), 96, 32), "mlp.experts.down_proj": ((4, 48, 32), 32, 48)},
    # these do not say that they are transposed
    "llama4_text": {
        "feed_forward.experts.gate_up_proj": ((4, 32, 96), 96, 32),
        "feed_forward.experts.down_proj": ((4, 48, 32), 32, 48),
    },
    # a module for each stack
    "jetmoe": {
        "mlp.input_linear": ((4, 96, 32), 96, 32), "mlp.output_linear": ((4, 32, 48), 32, 48),
        "self_attention.experts.input_linear": ((4, 16, 32), 16, 32),
        "self_attention.experts.output_linear": ((4, 32, 16), 32, 16),
    },
    # convolutions, and matrices of one block-diagonal gate, are none
    "recurrent_gemma": {}, "mamba": {}, "xlnet": {},
}  # fmt: skip


@pytest.mark.parametrize("model_type", STACKS)
def test_experts_are_stacks_of_matrices(model_type):
    model = toy_model(model_type)
    stacks = {t.kind: t for t in find_targets(model) if t.stack is not None and t.layer == 1}
    assert stacks.keys() == STACKS[model_type].keys()
    weights = {target.name: (target, weight) for target, weight in dense_weights(model)}
    for kind, (stored, rows, cols) in STACKS[model_type].items():
        target = stacks[kind]
        parameter = model.get_parameter(target.weight_name)
        assert (tuple(parameter.shape), target.rows, target.cols, target.stack.count) == (stored, rows, cols, 4)
        assert target.stored_shape == stored[1:]
        for i in range(4):
            matrix, weight = weights[f"{target.name}[{i}]"]
            assert (matrix.kind, matrix.layer, weight.shape) == (f"{kind}[{i}]", 1, (rows, cols))
            assert torch.equal(weight, parameter[i].T if target.stack.transposed else parameter[i])


@pytest.mark.parametrize(
    "wanted", ["all-linear", ["gate_up_proj", "experts.down_proj"], r".*\.experts\.(gate_up|down)_proj"], ids=str
)
def test_experts_by_name(wanted):
    model = model_of("mixtral")
    found = {t.kind for t in find_targets(model, wanted)}
    assert found >= {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert ("self_attn.q_proj" in found) == (wanted == "all-linear")


@pytest.mark.parametrize(
    ("model_type", "router"),
    [("qwen2_moe", "mlp.shared_expert_gate"), ("afmoe", "mlp.router.gate"), ("jetmoe", "mlp.router.layer")],
)
def test_routers_are_targets_only_by_name(model_type, router):
    model = toy_model(model_type)
    for default in (None, "all-linear"):
        assert router not in {t.kind for t in find_targets(model, default)}
    assert {t.kind for t in find_targets(model, [router])} == {router}
