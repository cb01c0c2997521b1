"""`prepare`: ranks, pretrained weights, determinism, what is noted in the config, the optimizer and the table."""

import copy
import json

import pytest
import torch
from tiny_runs import METHODS, arguments, dataset, gpt2, llama, make_trainer, projected, restarted, weights
from torch import nn
from transformers import AutoConfig, Trainer, TrainingArguments
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

import hf_lowrank as lr
from hf_lowrank.methods import SLTrainLinear
from hf_lowrank.methods.prepare import apply_method, method_of, resolve_ranks, structure_hash, summary_of
from hf_lowrank.methods.summary import optimizer_state_bytes
from hf_lowrank.methods.targets import find_targets
from hf_lowrank.optim.plan import Plan

GALORE, SLTRAIN = METHODS["galore"], METHODS["sltrain"]


def sltrain_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, SLTrainLinear)}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def pretrained(tmp_path):
    llama().save_pretrained(tmp_path / "pretrained")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "pretrained")


# What is refused


@pytest.mark.parametrize("config", [lr.FullRankConfig, lr.GaLoreConfig, lr.SLTrainConfig])
def test_no_match_is_an_error_and_changes_nothing(config, tmp_path):
    model = llama()
    before = weights(model)
    with pytest.raises(ValueError, match=r"no layer matches target_modules=\['c_attn'\].*self_attn.q_proj"):
        lr.prepare(model, config(target_modules=["c_attn"]), arguments(tmp_path))
    assert equal(weights(model), before)
    assert not hasattr(model.config, "lowrank")


@pytest.mark.parametrize("config", [lr.GaLoreConfig, lr.SLTrainConfig])
def test_a_rank_above_the_shorter_side_names_the_layer(config, tmp_path):
    message = r"r=9 is above min\(m, n\) = 8 of layer model.layers.0.self_attn.k_proj \(8 x 16\): lower r"
    model = llama()
    with pytest.raises(ValueError, match=message):
        lr.prepare(model, config(r=9), arguments(tmp_path))
    assert not sltrain_layers(model)
    # without the grouped keys and values the same rank fits
    lr.prepare(model, config(r=9, target_modules=["q_proj", "o_proj"]), arguments(tmp_path))


@pytest.mark.parametrize("config", ["galore", {"r": 4}, lr.GaLoreConfig, None])
def test_what_is_no_config_is_refused(config, tmp_path):
    with pytest.raises(ValueError, match=r"is no method config: give one of hf_lowrank's, GaLoreConfig\(r=128\)"):
        lr.prepare(llama(), config, arguments(tmp_path))


# Ranks


def test_the_default_rank_is_a_quarter_of_the_hidden_size_cut_where_a_layer_is_smaller():
    model = llama(num_attention_heads=8, num_key_value_heads=1)
    ranks = resolve_ranks(model, lr.GaLoreConfig(), find_targets(model))
    assert ranks["model.layers.0.self_attn.q_proj"] == 4
    assert ranks["model.layers.1.self_attn.k_proj"] == 2
    assert sorted(set(ranks.values())) == [2, 4]
    assert set(resolve_ranks(gpt2(), lr.SLTrainConfig(), find_targets(gpt2())).values()) == {4}
    assert resolve_ranks(model, lr.FullRankConfig(), find_targets(model)) == {}


def test_the_cut_rank_reaches_layers_and_optimizer(tmp_path):
    model, _ = lr.prepare(llama(num_attention_heads=8, num_key_value_heads=1), lr.SLTrainConfig(), arguments(tmp_path))
    layers = sltrain_layers(model)
    assert layers["model.layers.0.self_attn.k_proj"].A.shape == (2, 16)
    assert layers["model.layers.0.self_attn.q_proj"].A.shape == (4, 16)
    assert layers["model.layers.0.self_attn.k_proj"].scaling == 32 / 2
    trainer = make_trainer(
        lr.GaLoreConfig(), arguments(tmp_path), model=llama(num_attention_heads=8, num_key_value_heads=1)
    )
    groups = [group for group in trainer.create_optimizer().param_groups if "r" in group]
    assert {(g["r"], tuple(p.shape)) for g in groups for p in g["params"] if 2 in p.shape} == {(2, (2, 16))}


def test_a_model_that_tells_no_hidden_size_needs_a_rank(tmp_path):
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    with pytest.raises(ValueError, match=r"GaLoreConfig\(r=None\): the model's config has no hidden_size, so give r"):
        lr.prepare(model, lr.GaLoreConfig(target_modules="all-linear"), arguments(tmp_path))
    lr.prepare(model, lr.SLTrainConfig(r=2, target_modules="all-linear"), arguments(tmp_path))
    assert sorted(sltrain_layers(model)) == ["0", "1"]


# Pretrained weights


def test_a_pretrained_model_keeps_its_weights_or_is_refused(pretrained, tmp_path):
    before = weights(pretrained)
    with pytest.raises(ValueError, match=r"SLTrain replaces the layers of a pretrained model .* reinit=True"):
        lr.prepare(pretrained, SLTRAIN, arguments(tmp_path))
    assert equal(weights(pretrained), before)
    lr.prepare(pretrained, GALORE, arguments(tmp_path))
    assert equal(weights(pretrained), before)
    lr.prepare(pretrained, SLTRAIN, arguments(tmp_path), reinit=True)
    assert len(sltrain_layers(pretrained)) == 14
    # what is no target is kept
    assert torch.equal(pretrained.lm_head.weight, before["lm_head.weight"])


def test_only_the_layers_that_would_be_replaced_count_as_pretrained(pretrained, tmp_path):
    pretrained.model.layers[0].mlp.up_proj = nn.Linear(16, 24, bias=False)
    lr.prepare(pretrained, lr.SLTrainConfig(r=4, target_modules=["layers.0.mlp.up_proj"]), arguments(tmp_path))
    assert list(sltrain_layers(pretrained)) == ["model.layers.0.mlp.up_proj"]


# Determinism


def test_the_same_seed_gives_the_same_tensors_whatever_was_drawn_before(tmp_path):
    first, second = llama(), llama()
    lr.prepare(first, SLTRAIN, arguments(tmp_path))
    torch.manual_seed(99)
    lr.prepare(second, SLTRAIN, arguments(tmp_path))
    assert equal(weights(first), weights(second))
    assert structure_hash(first) == structure_hash(second)


def test_preparing_draws_nothing_from_the_global_generator(tmp_path):
    model = llama()
    state = torch.get_rng_state()
    lr.prepare(model, SLTRAIN, arguments(tmp_path))
    assert torch.equal(torch.get_rng_state(), state)


def test_another_seed_gives_another_support(tmp_path):
    first, second = llama(), llama()
    lr.prepare(first, SLTRAIN, arguments(tmp_path, seed=1))
    lr.prepare(second, SLTRAIN, arguments(tmp_path, seed=2))
    assert structure_hash(first) != structure_hash(second)
    for name, layer in sltrain_layers(first).items():
        other = sltrain_layers(second)[name]
        assert not torch.equal(layer.sparse_support, other.sparse_support), name
        assert not torch.equal(layer.A, other.A), name


def test_a_layers_draw_depends_on_its_name_alone():
    whole, part = llama(), llama()
    apply_method(whole, SLTRAIN, seed=1)
    apply_method(part, lr.SLTrainConfig(r=4, sparsity=0.1, target_modules=["layers.1.mlp.down_proj"]), seed=1)
    (name,) = sltrain_layers(part)
    assert equal(weights(part.get_submodule(name)), weights(whole.get_submodule(name)))
    supports = [layer.sparse_support for n, layer in sltrain_layers(whole).items() if n.endswith("q_proj")]
    assert not torch.equal(*supports)


# What is noted


@pytest.mark.parametrize("method", ["fullrank", "galore", "sltrain"])
def test_config_json_carries_the_method(method, tmp_path):
    model, _ = lr.prepare(llama(), METHODS[method], arguments(tmp_path))
    model.save_pretrained(tmp_path / "saved")
    noted = json.loads((tmp_path / "saved" / "config.json").read_text())["lowrank"]
    assert noted == {**METHODS[method].to_dict(), "form": "native", "structure": structure_hash(model)}
    assert (noted["structure"] is not None) == (method == "sltrain")
    assert method_of(model) == METHODS[method]
    model.config = AutoConfig.from_pretrained(tmp_path / "saved")
    assert method_of(model) == METHODS[method]


def test_preparing_twice_changes_nothing_and_another_method_is_refused(tmp_path):
    model, _ = lr.prepare(llama(), SLTRAIN, arguments(tmp_path))
    nn.init.normal_(model.model.layers[0].mlp.up_proj.B)
    before = weights(model)
    again, trainer_kwargs = lr.prepare(model, copy.deepcopy(SLTRAIN), arguments(tmp_path, seed=5))
    assert again is model
    assert equal(weights(model), before)
    Trainer(model=model, args=arguments(tmp_path, max_steps=1), train_dataset=dataset(4), **trainer_kwargs).train()
    for other in (lr.SLTrainConfig(r=3, sparsity=0.1), GALORE, lr.FullRankConfig()):
        with pytest.raises(ValueError, match="layers are SLTrainLinear already, so .* cannot be put on it"):
            lr.prepare(model, other, arguments(tmp_path))
    assert method_of(model) == SLTRAIN


def test_a_method_that_keeps_the_layers_can_be_changed(tmp_path):
    model, _ = lr.prepare(llama(), lr.FullRankConfig(), arguments(tmp_path))
    before = weights(model)
    lr.prepare(model, GALORE, arguments(tmp_path))
    assert equal(weights(model), before)
    assert method_of(model) == GALORE


# The optimizer


@pytest.mark.parametrize("method", ["fullrank", "sltrain"])
@pytest.mark.parametrize(("optim", "name"), [("adafactor", "Adafactor"), ("sgd", "SGD")])
def test_the_optimizer_of_the_arguments_is_used(method, optim, name, tmp_path):
    trainer = make_trainer(METHODS[method], arguments(tmp_path, optim=optim, max_steps=2))
    before = weights(trainer.model)
    trainer.train()
    assert type(trainer.optimizer.optimizer).__name__ == name
    plain = Trainer(model=llama(), args=arguments(tmp_path, optim=optim), train_dataset=dataset()).create_optimizer()
    assert isinstance(trainer.optimizer.optimizer, type(plain))
    assert not equal(weights(trainer.model), before)


def test_the_arguments_settings_reach_the_optimizer(tmp_path):
    args = arguments(tmp_path, learning_rate=0.02, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-5)
    for method in ("fullrank", "sltrain", "galore"):
        optimizer = make_trainer(METHODS[method], args).create_optimizer()
        for group in optimizer.param_groups:
            assert (group["lr"], tuple(group["betas"])) == (0.02, (0.8, 0.95)), method
            # GaLore's eps is the method's own, outside of the bias correction
            assert group["eps"] == (1e-6 if method == "galore" else 1e-5)
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}


def test_galore_marks_its_targets_and_nothing_else(tmp_path):
    model = llama()
    config = lr.GaLoreConfig(r=4, scale=0.5, proj_type="right", target_modules=["mlp.up_proj"])
    optimizer = make_trainer(config, arguments(tmp_path), model=model).create_optimizer()
    (group,) = [group for group in optimizer.param_groups if "r" in group]
    assert [id(p) for p in group["params"]] == [id(layer.mlp.up_proj.weight) for layer in model.model.layers]
    assert (group["r"], group["scale"], group["proj_type"], group["weight_decay"]) == (4, 0.5, "right", 0.1)


@pytest.mark.parametrize("method", ["fullrank", "sltrain"])
def test_an_optimizer_with_groups_of_its_own_is_refused(method, tmp_path, monkeypatch):
    args = arguments(tmp_path, optim="galore_adamw", optim_target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"(?i)galore_adamw"):
        lr.prepare(llama(), METHODS[method], args)
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(lambda args: (lambda: None, {})))
    with pytest.raises(ValueError, match="optim='.*' makes its own parameter groups: use .* adamw_torch"):
        lr.prepare(llama(), METHODS[method], arguments(tmp_path))


# The numbers


# (parameters, of which trained, of the dense model, state bytes, AdamW's), each added up by hand. Moments are fp32,
# and every tensor has a step of 4 bytes.
# Llama: 2128 numbers in 7 tensors outside of the 14 targets, whose layers hold 1920 each; of a layer GaLore keeps
# 2 r max(m, n) + r min(m, n) a target, 2 * 192 + 2 * 160 + 3 * 256, and SLTrain has r (m + n) + int(0.1 m n),
# 2 * 153 + 2 * 108 + 3 * 198.
# GPT-2: 1984 numbers in 20 tensors outside of the 8 targets' weights, biases among them and the tied embedding once;
# 3072 a layer; GaLore 448 + 192 + 2 * 576, SLTrain 332 + 153 + 2 * 422.
BY_HAND = {
    ("llama", "fullrank"): (5968, 5968, 5968, 8 * 5968 + 4 * 21, 8 * 5968 + 4 * 21),
    ("llama", "galore"): (5968, 5968, 5968, 4 * (2 * 2128 + 2 * 1472) + 4 * 21, 8 * 5968 + 4 * 21),
    ("llama", "sltrain"): (4360, 4360, 5968, 8 * (2128 + 2 * 1116) + 4 * 49, 8 * 5968 + 4 * 21),
    ("gpt2", "galore"): (8128, 8128, 8128, 4 * (2 * 1984 + 2 * 1792) + 4 * 28, 8 * 8128 + 4 * 28),
    ("gpt2", "sltrain"): (4642, 4642, 8128, 8 * (1984 + 2 * 1329) + 4 * 44, 8 * 8128 + 4 * 28),
}


@pytest.mark.parametrize("case", BY_HAND, ids="-".join)
def test_the_summary_by_hand(case, tmp_path):
    model, _ = lr.prepare({"llama": llama, "gpt2": gpt2}[case[0]](), METHODS[case[1]], arguments(tmp_path))
    summary = summary_of(model, METHODS[case[1]])
    assert (
        summary.parameters, summary.parameters_trained, summary.parameters_dense, summary.state_bytes,
        summary.adamw_state_bytes,
    ) == BY_HAND[case]  # fmt: skip
    rank = None if case[1] == "fullrank" else 4
    if case[0] == "llama":
        assert summary.modules["self_attn.k_proj"] == (2, 8, 16, rank)
        assert len(summary.modules) == 7
    else:
        assert summary.modules["attn.c_attn"] == (2, 48, 16, rank)
        assert len(summary.modules) == 4


def test_what_is_frozen_has_no_state(tmp_path):
    model = gpt2().to(torch.bfloat16)
    model.transformer.wpe.requires_grad_(False)
    model.transformer.h[0].requires_grad_(False)
    model.transformer.h[1].mlp.c_fc.bias.requires_grad_(False)
    trainer = make_trainer(lr.FullRankConfig(), arguments(tmp_path, max_steps=1), model=model)
    summary = summary_of(model, lr.FullRankConfig())
    # positions, the first block, one bias
    trained = 8128 - 512 - 3280 - 64
    assert (summary.parameters, summary.parameters_trained, summary.parameters_dense) == (8128, trained, 8128)
    assert summary.state_bytes == summary.adamw_state_bytes == 4 * trained + 4 * (28 - 1 - 12 - 1)
    trainer.train()
    assert optimizer_state_bytes(trainer.optimizer.optimizer) == summary.state_bytes


def test_the_table_is_printed_by_the_main_process_alone(tmp_path, capsys, monkeypatch):
    lr.prepare(llama(), GALORE, arguments(tmp_path))
    shown = capsys.readouterr().out
    for text in ("GaLore: target layers", "self_attn.k_proj", "8 x 16", "5,968", "28.21 KiB", "46.71 KiB", "(60%)"):
        assert text in shown, text
    monkeypatch.setattr(TrainingArguments, "should_log", property(lambda self: False))
    lr.prepare(llama(), GALORE, arguments(tmp_path))
    assert capsys.readouterr().out == ""


# What cannot be trained


@pytest.mark.parametrize("method", [name for name, c in METHODS.items() if projected(c) or restarted(c)])
def test_deepspeed_is_refused_however_it_was_asked_for(method, tmp_path):
    args = arguments(tmp_path)
    # what accelerate launch leaves there; args.deepspeed stays empty
    args.deepspeed_plugin = object()
    with pytest.raises(ValueError, match=r"DeepSpeed's ZeRO .*recipes/accelerate/ddp.yaml.*fsdp2.yaml"):
        lr.prepare(llama(), METHODS[method], args)


@pytest.mark.parametrize("method", [name for name, config in METHODS.items() if hasattr(config, "r")])
def test_a_target_that_shares_its_weight_is_named(method, tmp_path):
    model = llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    before = weights(model)
    name = r"model\.layers\.0\.mlp\.up_proj shares its weight with model\.layers\.1\.mlp\.up_proj"
    with pytest.raises(ValueError, match=name):
        lr.prepare(model, METHODS[method], arguments(tmp_path))
    assert equal(weights(model), before)


@pytest.mark.parametrize("proj_type", ["left", "right", "std", "full"])
def test_state_is_predicted_for_weights_that_are_stored_transposed(proj_type, tmp_path):
    sided = {type(config) for config in METHODS.values() if projected(config) and hasattr(config, "proj_type")}
    for config in [config_cls(r=4, proj_type=proj_type) for config_cls in sided]:
        trainer = make_trainer(config, arguments(tmp_path, max_steps=1), model=gpt2())
        trainer.train()
        predicted = summary_of(trainer.model, config).state_bytes
        assert optimizer_state_bytes(trainer.optimizer.optimizer) == predicted


def test_fsdp_1_is_refused_where_it_flattens_what_is_projected():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self._fsdp_wrapped_module = nn.Linear(4, 4)

    model = Wrapped()
    assert Plan(model, {}, {"method": "fullrank"}).regroup(list(model.parameters()))
    with pytest.raises(ValueError, match="FSDP 1 flattens the weights that are projected: use FSDP 2"):
        Plan(model, {"layer.weight": {"r": 2}}, {"method": "galore"}).regroup(list(model.parameters()))
