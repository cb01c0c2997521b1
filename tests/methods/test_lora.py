"""LoRA's layers against plain formulas, what they train, and what injecting them leaves alone."""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from peft.tuners.lora import Linear as PeftLinear
from tiny_runs import METHODS, arguments, gpt2, llama, make_trainer, weights
from torch import nn
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import hf_lowrank as lr
from hf_lowrank.methods import LoRALinear
from hf_lowrank.methods.prepare import apply_method, summary_of

LORA = METHODS["lora"]
KINDS = {"linear": lambda: nn.Linear(12, 20), "conv1d": lambda: Conv1D(20, 12)}


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def layer(kind="linear", r=3, alpha=8, dropout=0.0, dtype=torch.float64):
    """A layer (20, 12) with random W, b, A and B."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"only": KINDS[kind]().to(dtype)})
    nn.init.normal_(model["only"].bias)
    apply_method(model, lr.LoRAConfig(r=r, alpha=alpha, dropout=dropout, target_modules=["only"]), seed=1)
    nn.init.normal_(model["only"].B)
    return model["only"]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# The layer


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_all_gradients_equal_the_formulas(kind):
    made, x = layer(kind), torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 5, 20, dtype=torch.float64)
    W = made.base_weight.T if kind == "conv1d" else made.base_weight
    assert (W.shape, made.A.shape, made.B.shape) == ((20, 12), (3, 12), (20, 3))
    parameters = [x, made.A, made.B, made.bias]
    mine = torch.autograd.grad((made(x) * upstream).sum(), parameters)
    plain = F.linear(x, W + 8 / 3 * made.B @ made.A, made.bias)
    theirs = torch.autograd.grad((plain * upstream).sum(), parameters)
    torch.testing.assert_close(made(x), plain, rtol=1e-12, atol=1e-12)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_form_is_the_layer_it_replaced_with_the_product_in_it(kind):
    made, x = layer(kind, dropout=0.5), torch.randn(5, 12, dtype=torch.float64)
    assert (made.in_features, made.out_features, made.factor) == (12, 20, 8 / 3)
    W = made.base_weight.T if kind == "conv1d" else made.base_weight
    torch.testing.assert_close(made.dense_weight(), W + 8 / 3 * made.B @ made.A, rtol=1e-12, atol=1e-12)
    assert not made.dense_weight().requires_grad
    plain = KINDS[kind]().double()
    plain.load_state_dict(made.dense_state())
    torch.testing.assert_close(plain(x), made.eval()(x), rtol=1e-10, atol=1e-10)


def test_dropout_is_on_the_adapters_input_while_training_alone():
    made, x = layer(dropout=0.5), torch.ones(4000, 12, dtype=torch.float64)
    base = F.linear(x, made.base_weight, made.bias)
    torch.manual_seed(0)
    added = made.train()(x) - base
    torch.manual_seed(0)
    expected = F.dropout(x, 0.5) @ made.A.T @ made.B.T * 8 / 3
    torch.testing.assert_close(added, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(made.eval()(x)[0], made(x)[1])


def test_a_dense_form_in_bf16_is_rounded_once():
    made = layer(dtype=torch.bfloat16)
    assert made.A.dtype == made.B.dtype == torch.float32
    exact = made.base_weight.double() + 8 / 3 * made.B.double() @ made.A.double()
    # half a unit in the last of 8 bits
    torch.testing.assert_close(made.dense_weight().double(), exact, rtol=1.001 * 2**-8, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(made.dense_weight().double(), exact, rtol=1.001 * 2**-8, atol=0)


# Injection


def test_the_layers_are_pefts_and_nothing_else_of_peft_stays(tmp_path):
    model, _ = lr.prepare(llama(), LORA, arguments(tmp_path))
    assert len(layers(model)) == 14
    assert all(isinstance(module, peft.tuners.lora.Linear) for module in layers(model).values())
    assert not isinstance(model, peft.PeftModel)
    assert not hasattr(model, "peft_config")
    assert set(model.model.layers[0].mlp.up_proj.state_dict()) == {
        "base_layer.weight", "lora_A.default.weight", "lora_B.default.weight",
    }  # fmt: skip


@pytest.mark.parametrize("make", [llama, gpt2])
def test_all_but_the_targets_weights_trains(make, tmp_path):
    model, _ = lr.prepare(make(), LORA, arguments(tmp_path))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {f"{name}.base_layer.weight" for name in layers(model)}
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == frozen


def test_what_was_frozen_stays_frozen(tmp_path):
    model = gpt2().requires_grad_(False)
    model.transformer.ln_f.requires_grad_(True)
    lr.prepare(model, LORA, arguments(tmp_path))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"transformer.ln_f.weight", "transformer.ln_f.bias"} | {
        f"{name}.lora_{side}.default.weight" for name in layers(model) for side in "AB"
    }


@pytest.mark.parametrize("config", [lr.LoRAConfig(r=4, dropout=0.1), lr.ReLoRAConfig(r=4, dropout=0.1)])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_pretrained_model_keeps_its_weights_and_its_function(make, config, tmp_path):
    make().save_pretrained(tmp_path / "pretrained")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pretrained")
    before, logits = weights(model), model(torch.arange(8)[None]).logits
    lr.prepare(model, config, arguments(tmp_path))
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(torch.arange(8)[None]).logits, logits)
    after = {key.replace("base_layer.", ""): tensor for key, tensor in weights(model).items() if "lora_" not in key}
    assert equal(after, before)


def test_the_initial_values(tmp_path):
    model, _ = lr.prepare(llama(hidden_size=64, intermediate_size=96), lr.LoRAConfig(r=16), arguments(tmp_path))
    for made in layers(model).values():
        bound = made.in_features**-0.5
        assert made.B.abs().max() == 0
        assert made.A.abs().max() <= bound
        # the standard deviation of a uniform law
        assert made.A.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_values_depend_on_seed_and_name_alone_and_leave_the_global_generator(tmp_path):
    first, second, other, part = llama(), llama(), llama(), llama()
    state = torch.get_rng_state()
    lr.prepare(first, LORA, arguments(tmp_path))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    lr.prepare(second, LORA, arguments(tmp_path))
    assert equal(weights(first), weights(second))
    lr.prepare(other, LORA, arguments(tmp_path, seed=2))
    apply_method(part, lr.LoRAConfig(r=4, target_modules=["layers.1.mlp.down_proj"]), seed=1)
    ((name, alone),) = layers(part).items()
    assert torch.equal(alone.A, layers(first)[name].A)
    for name, made in layers(first).items():
        assert not torch.equal(made.A, layers(other)[name].A), name
    assert not torch.equal(first.model.layers[0].mlp.up_proj.A, first.model.layers[1].mlp.up_proj.A)


def test_a_rank_that_is_cut_for_one_layer_reaches_it(tmp_path):
    model = llama(num_attention_heads=8, num_key_value_heads=1)
    lr.prepare(model, lr.LoRAConfig(), arguments(tmp_path))
    found = {name.rpartition(".")[2]: made.A.shape[0] for name, made in layers(model).items()}
    assert found == {
        "q_proj": 4, "k_proj": 2, "v_proj": 2, "o_proj": 4, "gate_proj": 4, "up_proj": 4, "down_proj": 4,
    }  # fmt: skip
    assert layers(model)["model.layers.0.self_attn.k_proj"].factor == 32 / 2


def test_names_are_whole_names():
    # '0' is the end of '1.0' as well, and '.' matches any character in a pattern
    model = nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 4)))
    apply_method(model, lr.LoRAConfig(r=2, target_modules="0|1\\.1"), seed=0)
    assert list(layers(model)) == ["0", "1.1"]
    assert type(model[1][0]) is nn.Linear


def test_a_shared_or_quantised_weight_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"lm_head shares its weight with transformer.wte"):
        lr.prepare(gpt2(), lr.LoRAConfig(r=4, target_modules=["lm_head"]), arguments(tmp_path))
    model = llama()
    up = model.model.layers[0].mlp.up_proj
    up.weight = nn.Parameter(up.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj is torch.int8: load the model without quantisation"):
        lr.prepare(model, LORA, arguments(tmp_path))
    assert not layers(model)


# Training


def test_adapters_learn_from_the_first_step(tmp_path):
    trainer = make_trainer(LORA, arguments(tmp_path, max_steps=2, warmup_steps=0))
    before = weights(trainer.model)
    trainer.train()
    for key, tensor in weights(trainer.model).items():
        assert torch.equal(tensor, before[key]) == ("base_layer" in key), key


def test_published_and_loaded_again_as_trained(tmp_path):
    model, _ = lr.prepare(gpt2(), lr.LoRAConfig(r=4, dropout=0.2), arguments(tmp_path))
    for made in layers(model).values():
        nn.init.normal_(made.B)
    model.save_pretrained(tmp_path / "native")
    again = lr.from_pretrained(tmp_path / "native")
    assert equal(weights(again), weights(model))
    assert {made.lora_dropout["default"].p for made in layers(again).values()} == {0.2}
    dense, x = lr.to_dense(model), torch.arange(8)[None]
    assert not layers(dense)
    torch.testing.assert_close(dense.eval()(x).logits, model.eval()(x).logits, rtol=1e-5, atol=1e-5)


def test_preparing_twice_changes_nothing(tmp_path):
    model, _ = lr.prepare(llama(), LORA, arguments(tmp_path))
    before = weights(model)
    lr.prepare(model, copy.deepcopy(LORA), arguments(tmp_path, seed=5))
    assert equal(weights(model), before)
    with pytest.raises(ValueError, match="layers are LoRALinear already"):
        lr.prepare(model, lr.LoRAConfig(r=3), arguments(tmp_path))


def test_the_summary_by_hand(tmp_path):
    # 2128 numbers in 7 tensors outside of the 14 targets; a layer's targets hold 1920, their adapters of rank 4
    # 4 * (2 * 32 + 2 * 24 + 3 * 40)
    model, _ = lr.prepare(llama(), LORA, arguments(tmp_path))
    summary = summary_of(model, LORA)
    adapters = 2 * 4 * (2 * 32 + 2 * 24 + 3 * 40)
    assert (summary.parameters, summary.parameters_trained) == (5968 + adapters, 2128 + adapters)
    assert summary.parameters_dense == 5968
    assert summary.state_bytes == 8 * (2128 + adapters) + 4 * (7 + 28)
    assert summary.adamw_state_bytes == 8 * 5968 + 4 * 21
    assert lr.LoRAConfig(r=4).state_elements(16, 8, 4) == 2 * 4 * 24


@pytest.mark.parametrize(
    ("fields", "word"), [({"alpha": 0}, "alpha"), ({"dropout": 1.0}, "dropout"), ({"dropout": -0.1}, "dropout")]
)
def test_values_out_of_range_are_named(fields, word):
    for config_cls in (lr.LoRAConfig, lr.ReLoRAConfig):
        with pytest.raises(ValueError, match=f"{word}="):
            config_cls(**fields)


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("autocast", [False, True])
def test_forward_and_gradients_are_pefts_to_the_bit(dropout, autocast):
    made, results = layer(dropout=dropout, dtype=torch.float32).train(), []
    for forward in (LoRALinear.forward, PeftLinear.forward):
        torch.manual_seed(0)
        x = torch.randn(4, 5, 12, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = forward(made, x)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), [x, made.A, made.B])])
    for ours, reference in zip(*results, strict=True):
        assert ours.dtype == reference.dtype
        assert torch.equal(ours, reference)


def test_dropout_has_a_double_backward():
    made = layer(dropout=0.3).train()

    def run(x, A, B):
        torch.manual_seed(0)
        return torch.func.functional_call(made, {"lora_A.default.weight": A, "lora_B.default.weight": B}, (x,))

    inputs = (torch.randn(3, 12, dtype=torch.float64, requires_grad=True), made.A, made.B)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_dropout_keeps_a_byte_an_entry_for_the_backward_pass():
    made, kept = layer(dropout=0.3, dtype=torch.float32).train(), {}
    x = torch.randn(64, 12, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t
    ):
        y = made(x)
    owned = {p.untyped_storage().data_ptr() for p in (x, *made.parameters())}
    # the noise, and A x: (64, 3) in fp32
    assert sum(size for pointer, size in kept.items() if pointer not in owned) == 64 * 12 + 4 * 64 * 3
    assert y.requires_grad
