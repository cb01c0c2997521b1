"""Mixtures of experts: prepared, trained, saved, resumed, loaded and measured; what is not covered is said."""

import copy
import json
import logging

import pytest
import torch
from tiny_runs import METHODS, Kill, arguments, llama, make_trainer, projected, weights
from toy_models import toy_config
from transformers import AutoModelForCausalLM, set_seed

import hf_lowrank as lr
from hf_lowrank.checkpoints import load_model
from hf_lowrank.methods.prepare import summary_of
from hf_lowrank.methods.summary import optimizer_state_bytes
from hf_lowrank.methods.targets import find_targets

MODELS = ("mixtral", "qwen2_moe", "deepseek_v3", "olmoe", "gpt_oss", "granitemoe", "jamba")
# every query head has keys of its own
CHANGES = {"deepseek_v3": dict(num_key_value_heads=4, qk_head_dim=16)}


def moe(model_type, seed=0):
    set_seed(seed)
    config = toy_config(model_type)
    for name, value in CHANGES.get(model_type, {}).items():
        setattr(config, name, value)
    # like any model's loss in training: with the routers' auxiliary loss where there is one
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = True
    return AutoModelForCausalLM.from_config(config)


def stacks_of(model):
    return [target for target in find_targets(model) if target.stack is not None]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# every model with one method of each kind, and every projected method with one model
CASES = [(model_type, ("galore", "fira", "apollo")[i % 3]) for i, model_type in enumerate(MODELS)]
CASES += [(model_type, "lora") for model_type in ("deepseek_v3", "qwen2_moe")] + [("gpt_oss", "galore-full")]


# these run by default: experts as they are and transposed, projected and left dense
COMMON = [("mixtral", "galore"), ("gpt_oss", "galore-full"), ("deepseek_v3", "lora")]


@pytest.mark.parametrize(
    ("model_type", "method"), [c if c in COMMON else pytest.param(*c, marks=pytest.mark.slow) for c in CASES]
)
def test_a_mixture_of_experts_from_prepare_to_a_spectrum(model_type, method, tmp_path):
    args = dict(max_steps=3, save_strategy="steps", save_steps=2, eval_strategy="no")
    trainer = make_trainer(METHODS[method], arguments(tmp_path / "run", **args), model=moe(model_type))
    start = weights(trainer.model)
    lr.attach(trainer, lr.SpectralCallback(every=3))
    trainer.train()
    end = weights(trainer.model)
    stacks = stacks_of(trainer.model)
    assert stacks
    assert all(not torch.equal(end[t.weight_name], start[t.weight_name]) for t in stacks)
    report = json.loads((tmp_path / "run" / "publish" / "report.json").read_text())
    # predicted before training, and what the optimizer has
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    state = report["run"]["optimizer_state_bytes"]
    assert state["predicted"] == state["measured"] == optimizer_state_bytes(optimizer)
    uncovered = report["run"]["coverage"]["not_covered"]
    assert any("(3-D)" in name for name in uncovered) == (not projected(METHODS[method]) or model_type == "jamba")
    # killed and resumed, bit for bit
    resumed = make_trainer(METHODS[method], arguments(tmp_path / "resumed", **args), model=moe(model_type))
    resumed.add_callback(Kill(2))
    with pytest.raises(KeyboardInterrupt):
        resumed.train()
    resumed = make_trainer(METHODS[method], arguments(tmp_path / "resumed", **args), model=moe(model_type, seed=5))
    resumed.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-2"))
    assert equal(weights(resumed.model), end)
    assert equal(weights(load_model(tmp_path / "run" / "checkpoint-3")), end)
    # one row a matrix
    import pandas

    rows = pandas.read_parquet(next((tmp_path / "run" / "publish" / "metrics").glob("spectral*.parquet")))
    last = rows[rows.step == 3].set_index("name")
    for target in stacks:
        for matrix in target.matrices():
            row = last.loc[matrix.name]
            assert (row.rows, row.cols, row.layer) == (target.rows, target.cols, target.layer)
            assert row["spectral/weight/frobenius_norm"] == pytest.approx(
                end[target.weight_name][matrix.index].double().norm().item(), rel=1e-5
            )


def test_what_is_not_covered_is_said(tmp_path, capsys, caplog):
    with caplog.at_level(logging.WARNING, "hf_lowrank"):
        model, _ = lr.prepare(moe("mixtral"), lr.LoRAConfig(r=4), arguments(tmp_path))
    table = " ".join(capsys.readouterr().out.split())
    summary = summary_of(model, lr.LoRAConfig(r=4))
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    counts = {name: count for name, count in summary.not_covered.items() if "experts" in name}
    assert list(counts) == [f"model.layers.*.mlp.experts.{name} (3-D)" for name in ("gate_up_proj", "down_proj")]
    assert sum(counts.values()) == experts
    share = 100 * counts["model.layers.*.mlp.experts.gate_up_proj (3-D)"] / summary.parameters_dense
    wanted = f"not covered: model.layers.*.mlp.experts.gate_up_proj (3-D), {share:.2g} % of the parameters, full-rank"
    assert wanted in table
    assert "model.layers.*.mlp.gate (router)" in table
    assert "LoRA does not cover" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "hf_lowrank"):
        lr.prepare(moe("mixtral"), METHODS["galore"], arguments(tmp_path))
        lr.prepare(llama(), METHODS["lora"], arguments(tmp_path))
    assert "does not cover" not in caplog.text
    assert summary_of(llama(), METHODS["galore"]).not_covered == {}


REFUSALS = {
    "stacks alone": ("mixtral", lr.SLTrainConfig(r=4, target_modules=["gate_up_proj"]), "gate_up_proj.* as one stack"),
    "rank of a router": (
        "qwen2_moe",
        lr.GaLoreConfig(r=4, target_modules=["shared_expert_gate"]),
        "shared_expert_gate",
    ),
    "rank of a stack": ("gpt_oss", lr.ApolloConfig(r=33, target_modules=["experts.down_proj"]), "experts.down_proj"),
    "no match": ("deepseek_v3", lr.CoLAConfig(r=4, target_modules=["c_attn"]), "no layer matches"),
    "rank of a layer": ("jamba", lr.LoRAConfig(r=9), "r=9 is above"),
    "other_lr_scale": ("mixtral", lr.ReLoRAConfig(r=40, other_lr_scale=2.0), "r=40 is above"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_names_the_parameter_and_leaves_the_model_as_it_was(case, tmp_path):
    model_type, config, message = REFUSALS[case]
    model = moe(model_type)
    before = weights(model), copy.deepcopy(model.config.to_dict()), [type(m) for m in model.modules()]
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        lr.prepare(model, config, arguments(tmp_path))
    after = weights(model), model.config.to_dict(), [type(m) for m in model.modules()]
    assert equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trains


@pytest.mark.parametrize("method", ["lora", "relora"])
@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen2_moe"])
def test_adapters_are_on_the_layers_that_were_asked_for(model_type, method, tmp_path):
    model = moe(model_type)
    if model_type == "qwen2_moe":
        # a dense MLP beside those of experts
        config = model.config
        config.mlp_only_layers = [0]
        model = AutoModelForCausalLM.from_config(config)
    wanted = {t.name for t in find_targets(model) if t.stack is None}
    assert any(name.endswith("0.mlp.gate_proj") for name in wanted)
    lr.prepare(model, METHODS[method], arguments(tmp_path))
    assert {name for name, m in model.named_modules() if hasattr(m, "lora_A")} == wanted
    assert all(p.requires_grad for name, p in model.named_parameters() if ".experts." in name)
