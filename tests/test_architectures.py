"""Every causal architecture of transformers is saved, resumed, loaded and published bit for bit.

transformers 5 saves some of them under other names than they have in memory.
"""

import itertools
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_runs import METHODS, arguments, dataset, make_trainer, weights
from tiny_tasks import tokenizer, write_tasks
from torch import nn
from toy_models import size, toy_config, toy_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    GPT2Config,
    LlamaConfig,
    Trainer,
    TrainingArguments,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import hf_lowrank as lr
from hf_lowrank.checkpoints import check_resume, export, load_model
from hf_lowrank.cli import main
from hf_lowrank.conversion import convert_when_loading
from hf_lowrank.downstream.model import LowRankLM
from hf_lowrank.hub.push import _write_step
from hf_lowrank.methods.prepare import apply_method

# what transformers makes no model of, with what its error says
NOT_BUILT = {
    "gemma3n": "requires the timm library",
    "gemma4_assistant": "hidden_size_per_layer_input must be 0",
    "gemma4_unified_assistant": "The set of layer types producing a cache is different",
    "musicgen": "'MusicgenConfig' object has no attribute 'dropout'",
    "musicgen_melody": "'MusicgenMelodyConfig' object has no attribute 'dropout'",
}
# transformers' own from_pretrained writes -1 into a buffer of its router
CHANGED_BY_TRANSFORMERS = {"zaya"}
# these run by default: plain, experts one by one, renamed, fused, tied, infinity in config.json, state spaces
COMMON = (
    "llama", "gpt2", "gpt_neox", "mixtral", "qwen3_moe", "deepseek_v3", "falcon_h1", "jamba", "gemma3", "opt", "mamba",
)  # fmt: skip
# saved under other names, like mixtral and gpt_neox
VISION = ("vit", "dinov2", "swin", "beit", "segformer")


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity_warning()


def assert_same(a, b):
    a, b = (x.state_dict() if isinstance(x, nn.Module) else x for x in (a, b))
    assert a.keys() == b.keys()
    assert [k for k in a if a[k].dtype != b[k].dtype or not torch.equal(a[k], b[k])] == []


def check_every_way(model_type, folder, auto_class):
    model = toy_model(model_type, auto_class=auto_class)
    assert size(model) < 1e7
    model.save_pretrained(folder)
    if model_type in CHANGED_BY_TRANSFORMERS:
        with pytest.raises(AssertionError):
            assert_same(type(model).from_pretrained(folder), model)
    else:
        assert_same(type(model).from_pretrained(folder), model)
    # loaded, and published from what was loaded
    loaded = load_model(folder)
    assert_same(loaded, model)
    export(loaded, folder / "publish")
    assert_same(load_model(folder / "publish"), model)
    # what plain transformers finds there is what it has restored above
    assert_same(*(load_file(path / "model.safetensors") for path in (folder, folder / "publish")))
    # Trainer's way to resume and to load the best model
    resumed = toy_model(model_type, seed=1, auto_class=auto_class)
    convert_when_loading(resumed)
    before = {name: p.data_ptr() for name, p in resumed.named_parameters()}
    resumed.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert_same(resumed, model)
    # in place: the optimizer holds the parameters
    assert {name: p.data_ptr() for name, p in resumed.named_parameters()} == before


@pytest.mark.parametrize(
    "model_type",
    [t if t in COMMON else pytest.param(t, marks=pytest.mark.slow) for t in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES],
)
def test_causal(model_type, tmp_path):
    if model_type in NOT_BUILT:
        with pytest.raises(Exception, match=NOT_BUILT[model_type]):
            toy_model(model_type)
    else:
        check_every_way(model_type, tmp_path, AutoModelForCausalLM)


def test_what_runs_by_default_is_there():
    assert set(COMMON) <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.parametrize("model_type", [VISION[0], *(pytest.param(t, marks=pytest.mark.slow) for t in VISION[1:])])
def test_vision(model_type, tmp_path):
    check_every_way(model_type, tmp_path, AutoModelForImageClassification)


# Methods' layers


@pytest.mark.parametrize("method", [lr.SLTrainConfig(r=2, sparsity=0.1), lr.LoRAConfig(r=2), lr.CoLAConfig(r=2)])
@pytest.mark.parametrize(
    "model_type",
    ["gpt_neox", "mixtral", *(pytest.param(t, marks=pytest.mark.slow) for t in ("phimoe", "jamba", "minimax"))],
)
def test_a_methods_layers(model_type, method, tmp_path):
    def made(seed):
        model = toy_model(model_type, seed)
        apply_method(model, method, seed=0)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.rand_like(parameter)
        return model

    model = made(0)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert_same(loaded, model)
    frozen = [{name for name, p in m.named_parameters() if not p.requires_grad} for m in (loaded, model)]
    assert frozen[0] == frozen[1]
    export(model, tmp_path / "publish")
    assert_same(load_model(tmp_path / "publish"), model)
    if method.has_dense_form:
        dense = lr.to_dense(model)
        assert_same(load_model(tmp_path / "publish", dense=True), dense)
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "publish"), dense)
    resumed = made(1)
    convert_when_loading(resumed)
    resumed.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert_same(resumed, model)


# Trainer

RUNS = {
    "gpt_neox": ("attached", "sltrain", "lora"),
    "mixtral": ("attached", "galore", "cola"),
    "falcon_h1": ("attached",),
}
SLOW_RUNS = {
    "gpt_neox": ("fullrank", "galore", "cola", "relora"),
    "mixtral": ("fullrank", "sltrain", "lora", "relora"),
    "llama": ("attached",),
    "gpt2": ("attached",),
}


def each_run():
    for runs, marks in ((RUNS, ()), (SLOW_RUNS, (pytest.mark.slow,))):
        for model_type, methods in runs.items():
            for method in methods:
                yield pytest.param(model_type, method, marks=marks)


def trainer_of(model_type, method, folder, **changes):
    args = arguments(folder, max_steps=4, save_strategy="steps", save_steps=2, **changes)
    # the first evaluation is the best, whatever the loss
    falling = itertools.count(0, -1)
    score = dict(compute_metrics=lambda _: {"score": next(falling)})
    if method != "attached":
        return make_trainer(METHODS[method], args, model=toy_model(model_type), **score)
    data = dict(train_dataset=dataset(), eval_dataset=dataset(8, seed=1), **score)
    # the model that model_init makes is another one than the Trainer has had
    trainer = Trainer(model_init=lambda: toy_model(model_type), args=args, **data)
    lr.attach(trainer)
    return trainer


@pytest.mark.parametrize(("model_type", "method"), list(each_run()))
def test_trainer_resumes_and_loads_the_best_model(model_type, method, tmp_path):
    best = trainer_of(
        model_type, method, tmp_path / "run", load_best_model_at_end=True, eval_strategy="steps", eval_steps=2,
        metric_for_best_model="score", greater_is_better=True,
    )  # fmt: skip
    best.train()
    assert best.state.best_global_step == 2
    first, last = (weights(load_model(tmp_path / "run" / f"checkpoint-{step}")) for step in (2, 4))
    assert_same(best.model, first)
    resumed = trainer_of(model_type, method, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_same(resumed.model, last)
    with pytest.raises(AssertionError):
        assert_same(first, last)


@pytest.mark.slow
def test_measure_reads_a_runs_checkpoints(tmp_path, monkeypatch):
    for name, seed in (("run", 0), ("baseline", 1)):
        args = arguments(tmp_path / name, max_steps=4, save_strategy="steps", save_steps=2)
        trainer = make_trainer(METHODS["sltrain"], args, model=toy_model("mixtral", seed=seed))
        lr.attach(trainer)
        trainer.train()
    command = ["hf-lowrank", "measure", str(tmp_path / "run"), "--baseline", str(tmp_path / "baseline")]
    families = "landscape,spectral,interpolation,activation"
    monkeypatch.setattr("sys.argv", [*command, "--preset", "quick", "--sequences", "2", "--only", families])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    metrics = lr.load_report(tmp_path / "run")["metrics"]
    measured = {m["name"].rpartition("/")[0] for m in metrics if m["value"] is not None}
    for name in ("landscape/trajectory_1", "spectral/update", "interpolation/consecutive", "activation"):
        assert name in measured
    unmeasured = {m["name"] for m in metrics if m["value"] is None}
    # permutations of experts are not known
    assert unmeasured <= {"interpolation/cross_seed_aligned/barrier"}


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "method"), [("gpt_neox", "galore"), ("mixtral", "sltrain")])
def test_evaluate_and_push_read_a_runs_checkpoints(model_type, method, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_lowrank.run.report.draw_figures", lambda publish: [])
    monkeypatch.setattr("hf_lowrank.hub.push.draw_figures", lambda publish: [])
    tasks, run = write_tasks(tmp_path / "tasks"), tmp_path / "run"
    args = arguments(run, max_steps=4, save_strategy="steps", save_steps=2)
    trainer = make_trainer(METHODS[method], args, model=toy_model(model_type), processing_class=tokenizer())
    lr.attach(trainer)
    trainer.train()
    for form in ("native", "dense"):
        command = ["hf-lowrank", "evaluate", str(run), "--tasks", "pairs", "--include-path", str(tasks)]
        monkeypatch.setattr("sys.argv", [*command, "--checkpoints", "all", "--form", form, "--device", "cpu"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
    results = {(e.step, e.about["form"]) for e in lr.load_report(run).evaluations if e.value is not None}
    assert {step for step, _ in results} == {2, 4}
    assert_same(LowRankLM(str(run)).model, load_model(run / "checkpoint-4"))
    (tmp_path / "step").mkdir()
    _write_step(run / "publish", run / "checkpoint-2", tmp_path / "step")
    expected = load_model(run / "checkpoint-2")
    assert_same(lr.from_pretrained(tmp_path / "step"), expected)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "step"), lr.to_dense(expected))


class Pixels(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        return {"pixel_values": torch.full((3, 32, 32), i / 16), "labels": i % 2}


def test_trainer_resumes_a_vision_model(tmp_path):
    def run(name, **kwargs):
        args = arguments(tmp_path / name, max_steps=4, save_strategy="steps", save_steps=2)
        model, trainer_kwargs = lr.prepare(
            toy_model("vit", auto_class=AutoModelForImageClassification), METHODS["sltrain"], args
        )
        trainer = Trainer(model=model, args=args, train_dataset=Pixels(), **trainer_kwargs)
        trainer.train(**kwargs)
        return trainer.model

    expected = run("whole")
    assert_same(run("resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2")), expected)
    assert_same(load_model(tmp_path / "whole" / "checkpoint-4"), expected)


def test_check_resume_makes_a_plain_trainer_exact(tmp_path, capfd):
    toy_model("mixtral").save_pretrained(tmp_path)
    trainer = Trainer(model=toy_model("mixtral", seed=1), args=TrainingArguments(str(tmp_path), report_to="none"))
    check_resume(tmp_path, trainer.model)
    trainer._load_from_checkpoint(str(tmp_path))
    assert_same(trainer.model, toy_model("mixtral"))
    assert "TP rules" not in capfd.readouterr().err


# What is refused


def without(folder, *parts):
    """A folder of weights whose tensors lack those whose names end so."""
    path = folder / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if not name.endswith(parts)}
    save_file(kept, path, metadata={"format": "pt"})


MISSING = {
    "gpt_neox": ("embed_out.weight", r"lacks lm_head\.weight \(1 in all\)"),
    "mixtral": (
        "0.block_sparse_moe.experts.3.w2.weight",
        r"has another shape for model\.layers\.0\.mlp\.experts\.down",
    ),
}


@pytest.mark.parametrize("model_type", MISSING)
def test_what_is_missing_is_named_and_nothing_is_loaded(model_type, tmp_path):
    name, message = MISSING[model_type]
    toy_model(model_type).save_pretrained(tmp_path)
    without(tmp_path, name)
    with pytest.raises(lr.CheckpointError, match=message):
        load_model(tmp_path)
    model = toy_model(model_type, seed=1)
    before = weights(model)
    convert_when_loading(model)
    if model_type == "mixtral":
        with pytest.raises(lr.CheckpointError, match=message):
            model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
        assert_same(model, before)


LACKING = {"gpt_neox": ("embed_out.weight", r"lm_head\.weight"), "llama": ("norm.weight", r".*norm\.weight")}


@pytest.mark.parametrize("load", ["_load_from_checkpoint", "_load_best_model", "in several files"])
@pytest.mark.parametrize(("model_type", "method"), [("gpt_neox", "attached"), ("llama", "lora")])
def test_a_trainer_refuses_a_checkpoint_that_lacks_a_weight(model_type, method, load, tmp_path):
    """Attached, or with a model that was prepared."""
    part, name = LACKING[model_type]
    trainer = trainer_of(model_type, method, tmp_path / "run")
    trainer.model.save_pretrained(tmp_path)
    without(tmp_path, part)
    if load == "in several files":
        (tmp_path / "model.safetensors").rename(tmp_path / "model-1.safetensors")
        index = {"weight_map": dict.fromkeys(load_file(tmp_path / "model-1.safetensors"), "model-1.safetensors")}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    trainer.state.best_model_checkpoint = str(tmp_path)
    given = () if load == "_load_best_model" else (str(tmp_path),)
    with pytest.raises(lr.CheckpointError, match=rf"the checkpoint that Trainer loads lacks {name}"):
        getattr(trainer, load if load.startswith("_") else "_load_from_checkpoint")(*given)


def test_a_state_dict_that_a_user_loads_may_lack_a_weight(tmp_path):
    trainer = trainer_of("llama", "lora", tmp_path)
    trainer.model.load_state_dict({"lm_head.weight": trainer.model.lm_head.weight}, strict=False)


def test_experts_in_several_files(tmp_path):
    model = toy_model("mixtral")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert_same(load_model(tmp_path), model)
    trainer = Trainer(model=toy_model("mixtral", seed=1), args=TrainingArguments(str(tmp_path), report_to="none"))
    convert_when_loading(trainer.model)
    with pytest.raises(lr.CheckpointError, match="join them: hf_lowrank.from_pretrained"):
        trainer._load_from_checkpoint(str(tmp_path))
    lr.from_pretrained(tmp_path).save_pretrained(tmp_path, max_shard_size="10TB")
    trainer._load_from_checkpoint(str(tmp_path))
    assert_same(trainer.model, model)


def test_a_pickled_checkpoint_is_refused_by_name(tmp_path):
    model = toy_model("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(lr.CheckpointError, match=r"holds pytorch_model\.bin and no safetensors.*save_pretrained"):
        lr.from_pretrained(tmp_path)


# Layouts of old


def test_the_layout_of_the_official_gpt2(tmp_path):
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    state = {
        name.removeprefix("transformer."): t for name, t in model.state_dict().items() if name != "lm_head.weight"
    }
    for i in range(2):
        state[f"h.{i}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
    model.save_pretrained(tmp_path)
    save_file({name: t.contiguous() for name, t in state.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    assert_same(load_model(tmp_path), model)


def test_the_buffers_of_an_old_llama(tmp_path):
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    )
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    assert_same(load_model(tmp_path), model)


def test_infinity_in_config_json(tmp_path):
    model = toy_model("falcon_h1")
    assert float("inf") in model.config.time_step_limit
    model.save_pretrained(tmp_path)
    assert "__float__" in (tmp_path / "config.json").read_text()
    assert load_model(tmp_path).config.time_step_limit == model.config.time_step_limit
    assert lr.to_dense(model).config.time_step_limit == model.config.time_step_limit


def test_two_precisions_are_kept(tmp_path):
    model = toy_model("mixtral").to(torch.bfloat16)
    model.lm_head.float()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert_same(load_model(tmp_path), model)


def test_what_training_draws_does_not_depend_on_a_load(tmp_path):
    toy_model("mixtral").save_pretrained(tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    load_model(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_the_trajectory_of_a_run(tmp_path):
    """Principal components are read from files, and point along the model's parameters."""
    from hf_lowrank.conversion import own_names, stored_names
    from hf_lowrank.metrics.trajectory import trajectory_pca

    states = []
    for t in range(3):
        model = toy_model("mixtral", seed=t)
        model.save_pretrained(tmp_path / str(t))
        states.append(model.state_dict())
    names = stored_names(model, [tmp_path / "2" / "model.safetensors"])
    parameters = [name for name, _ in model.named_parameters()]
    found = trajectory_pca([tmp_path / str(t) for t in range(3)], 2, names)
    expected = trajectory_pca(states, 2, parameters)
    assert found.coordinates == pytest.approx(expected.coordinates, rel=1e-9, abs=1e-9)
    direction = own_names(model, found.direction(1))
    assert direction.keys() == set(parameters)
    for name, along in expected.direction(1).items():
        assert torch.allclose(direction[name], along, atol=1e-7)


def test_configs_are_toys():
    assert toy_config("llama").hidden_size == 32
