"""Mixtures of experts: prepared, trained, saved, resumed, loaded and measured; what is not covered is said."""

import copy
import json
import logging

import pytest
import torch
from tiny_runs import METHODS, Kill, arguments, llama, make_trainer, weights
from toy_models import toy_config
from transformers import AutoModelForCausalLM, set_seed

import hf_lowrank as lr
from hf_lowrank.checkpoints import load_model
from hf_lowrank.experts import Stack
from hf_lowrank.methods.lora import LoRAExperts
from hf_lowrank.methods.prepare import summary_of
from hf_lowrank.methods.relora import fold, prune
from hf_lowrank.methods.summary import optimizer_state_bytes
from hf_lowrank.methods.targets import dense_weights, find_targets

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


def matrices_of(model):
    """Every expert's dense matrix by its name."""
    return {target.name: weight.clone() for target, weight in dense_weights(model) if target.stack is not None}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# every model with one method of each kind, and every projected method with one model
CASES = [(model_type, ("galore", "fira", "apollo")[i % 3]) for i, model_type in enumerate(MODELS)]
CASES += [(model_type, "lora") for model_type in ("deepseek_v3", "qwen2_moe")] + [("gpt_oss", "galore-full")]
CASES += [("gpt_oss", "relora"), ("mixtral", "sltrain"), ("granitemoe", "lowrank"), ("jamba", "relora")]
CASES += [("olmoe", "cola")]


# these run by default: experts as they are and transposed, projected, with adapters and as factors
COMMON = [("mixtral", "galore"), ("gpt_oss", "relora"), ("mixtral", "sltrain")]


@pytest.mark.parametrize(
    ("model_type", "method"), [c if c in COMMON else pytest.param(*c, marks=pytest.mark.slow) for c in CASES]
)
def test_a_mixture_of_experts_from_prepare_to_a_spectrum(model_type, method, tmp_path):
    args = dict(max_steps=3, save_strategy="steps", save_steps=2, eval_strategy="no")
    trainer = make_trainer(METHODS[method], arguments(tmp_path / "run", **args), model=moe(model_type))
    start = matrices_of(trainer.model)
    lr.attach(trainer, lr.SpectralCallback(every=3))
    trainer.train()
    end = weights(trainer.model)
    stacks = stacks_of(trainer.model)
    assert stacks
    dense = matrices_of(trainer.model)
    assert all(not torch.equal(dense[name], start[name]) for name in dense)
    report = json.loads((tmp_path / "run" / "publish" / "report.json").read_text())
    # predicted before training, and what the optimizer has
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    state = report["run"]["optimizer_state_bytes"]
    assert state["predicted"] == state["measured"] == optimizer_state_bytes(optimizer)
    uncovered = report["run"]["coverage"]["not_covered"]
    assert any("(3-D)" in name for name in uncovered) == (not METHODS[method].takes_stacks or model_type == "jamba")
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
                dense[matrix.name].double().norm().item(), rel=1e-5
            )


def test_what_is_not_covered_is_said(tmp_path, capsys, caplog):
    with caplog.at_level(logging.WARNING, "hf_lowrank"):
        model, _ = lr.prepare(moe("mixtral"), lr.CoLAConfig(r=4), arguments(tmp_path))
    table = " ".join(capsys.readouterr().out.split())
    summary = summary_of(model, lr.CoLAConfig(r=4))
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    counts = {name: count for name, count in summary.not_covered.items() if "experts" in name}
    assert list(counts) == [f"model.layers.*.mlp.experts.{name} (3-D)" for name in ("gate_up_proj", "down_proj")]
    assert sum(counts.values()) == experts
    share = 100 * counts["model.layers.*.mlp.experts.gate_up_proj (3-D)"] / summary.parameters_dense
    wanted = f"not covered: model.layers.*.mlp.experts.gate_up_proj (3-D), {share:.2g} % of the parameters, full-rank"
    assert wanted in table
    assert "model.layers.*.mlp.gate (router)" in table
    assert "CoLA does not cover" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "hf_lowrank"):
        for method in ("galore", "lora", "sltrain"):
            lr.prepare(moe("mixtral"), METHODS[method], arguments(tmp_path))
        lr.prepare(llama(), METHODS["lora"], arguments(tmp_path))
    assert "does not cover" not in caplog.text
    assert summary_of(llama(), METHODS["galore"]).not_covered == {}


REFUSALS = {
    "stacks alone": ("mixtral", lr.CoLAConfig(r=4, target_modules=["gate_up_proj"]), "gate_up_proj.* as one stack"),
    "dropout": ("mixtral", lr.LoRAConfig(r=4, dropout=0.1), "dropout=0.1: the experts of .*set dropout=0"),
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
    trains = {name: p.requires_grad for name, p in model.named_parameters() if ".experts.lowrank_" in name}
    assert len(trains) == 3 * len([t for t in find_targets(model) if t.stack is not None])
    assert all(train == (not name.endswith(".base_weight")) for name, train in trains.items())


@pytest.mark.parametrize("transposed", [False, True])
def test_adapters_of_a_stack_are_those_of_separate_layers(transposed):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    stack, r, x = Stack(3, 5, 4, transposed), 2, torch.randn(7, 4, dtype=torch.float64)
    weight = torch.nn.Parameter(W.mT.contiguous() if transposed else W.clone())
    layer = LoRAExperts(weight, stack, "down_proj", r, alpha=6.0)
    layer.draw(generator)
    assert layer.A.shape == (3, 2, 4)
    assert layer.B.shape == (3, 5, 2)
    assert layer.A.abs().max() <= 1 / 2
    assert not layer.B.any()
    assert torch.equal(layer.weight, weight)
    with torch.no_grad():
        layer.B.normal_(generator=generator)
    y = [x @ (matrix if transposed else matrix.T) for matrix in layer.weight]
    expected = [x @ W[e].T + 3.0 * x @ layer.A[e].T @ layer.B[e].T for e in range(3)]
    torch.testing.assert_close(torch.stack(y), torch.stack(expected))
    factors = layer.A, layer.B
    got, wanted = (torch.autograd.grad(sum(t.sin().sum() for t in ys), factors) for ys in (y, expected))
    torch.testing.assert_close(got, wanted)
    before, A, B = layer.dense_weight(), layer.A.detach().clone(), layer.B.detach().clone()
    squared = fold(layer, generator)
    torch.testing.assert_close(layer.dense_weight(), before)
    torch.testing.assert_close(squared, (3.0 * B @ A).square().sum())
    assert not layer.B.any()
    assert not torch.equal(layer.A, A)


@pytest.mark.parametrize(("kind", "ratio", "zeroed"), [("random", 0.75, 6), ("magnitude", 0.75, 6), ("reset", 0.5, 8)])
def test_every_matrix_of_a_stack_loses_as_many_moments(kind, ratio, zeroed):
    first = torch.arange(1.0, 25.0).view(3, 2, 4)
    state = {"exp_avg": first.clone(), "exp_avg_sq": first.square()}
    assert prune(state, kind, ratio, torch.Generator().manual_seed(0)) == 3 * zeroed
    assert torch.equal(state["exp_avg"] == 0, state["exp_avg_sq"] == 0)
    assert (state["exp_avg"] == 0).sum((1, 2)).tolist() == [zeroed] * 3
    if kind == "magnitude":
        assert torch.equal(state["exp_avg"][:, 1, 2:], first[:, 1, 2:])


def test_experts_of_a_model_in_half_precision_have_adapters_in_float32(tmp_path):
    model, _ = lr.prepare(moe("mixtral").to(torch.bfloat16), lr.LoRAConfig(r=4), arguments(tmp_path))
    dtypes = {name.rpartition(".")[2]: p.dtype for name, p in model.named_parameters() if ".lowrank_" in name}
    assert dtypes == {"base_weight": torch.bfloat16, "A": torch.float32, "B": torch.float32}
    assert {m.weight.dtype for m in model.modules() if isinstance(m, LoRAExperts)} == {torch.bfloat16}
