"""Models in half precision, and in two precisions: what is trained, saved, loaded and published in which."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_runs import METHODS, arguments, gpt2, llama, make_trainer, weights
from toy_models import toy_model
from transformers import AutoModelForSeq2SeqLM

import hf_lowrank as lr
from hf_lowrank.checkpoints import export, load_model
from hf_lowrank.methods.lora import add_product
from hf_lowrank.methods.prepare import summary_of
from hf_lowrank.methods.relora import adapters
from hf_lowrank.methods.summary import optimizer_state_bytes

ADAPTED = [name for name, config in METHODS.items() if config.keeps_weights]
REPLACING = ["lora", "relora", "sltrain", "cola"]


def dtypes(model):
    state = model if isinstance(model, dict) else model.state_dict()
    return {key: str(tensor.dtype).removeprefix("torch.") for key, tensor in state.items()}


def same(a, b):
    return dtypes(a) == dtypes(b) and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ADAPTED)
def test_adapters_are_in_fp32_beside_a_half_precision_weight_as_pefts_are(method, dtype, tmp_path):
    pefts = get_peft_model(llama().to(dtype), LoraConfig(r=4, target_modules="all-linear"))
    expected = {key.removeprefix("base_model.model."): value for key, value in dtypes(pefts).items()}
    model, _ = lr.prepare(llama().to(dtype), METHODS[method], arguments(tmp_path))
    assert dtypes(model) == expected
    assert {expected[key] for key in expected if "lora_" in key} == {"float32"}
    assert model.dtype == dtype


@pytest.mark.parametrize("method", ADAPTED)
def test_a_small_rate_moves_every_entry_of_a(method, tmp_path):
    args = arguments(tmp_path, max_steps=2, learning_rate=1e-5, warmup_steps=0, lr_scheduler_type="constant")
    trainer = make_trainer(METHODS[method], args, model=llama().bfloat16())
    for layer in adapters(trainer.model):
        torch.nn.init.normal_(layer.B, std=0.1)
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    for layer in adapters(trainer.model):
        for key in (f"{layer.name}.lora_A.default.weight", f"{layer.name}.lora_B.default.weight"):
            assert (before[key] != after[key]).float().mean() > 0.99, key
    # in bf16 hardly any of them would move
    key = "model.layers.0.mlp.up_proj.lora_A.default.weight"
    assert (before[key].bfloat16() != after[key].bfloat16()).float().mean() < 0.5


@pytest.mark.parametrize("make", [llama, gpt2], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("method", [*REPLACING, "galore"])
def test_a_bf16_run_resumes_bit_for_bit_and_is_published_as_it_is(method, make, tmp_path):
    config = METHODS[method]

    def run(folder, steps, resume=None):
        args = arguments(folder, max_steps=steps, save_strategy="steps", save_steps=2, lr_scheduler_type="constant")
        trainer = make_trainer(config, args, model=make().bfloat16())
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole", 4)
    resumed = run(tmp_path / "resumed", 2)
    resumed = run(tmp_path / "resumed", 4, lr.last_checkpoint(tmp_path / "resumed"))
    trained = weights(whole.model)
    assert same(weights(resumed.model), trained)
    optimizer = whole.optimizer.optimizer
    assert optimizer_state_bytes(optimizer) == summary_of(whole.model, config).state_bytes
    # adapters in fp32, all other parameters as the model was
    expected = {"bfloat16", "float32"} if config.keeps_weights else {"bfloat16"}
    assert {str(p.dtype).removeprefix("torch.") for p in whole.model.parameters()} == expected
    loaded = load_model(tmp_path / "whole" / "checkpoint-4")
    assert same(weights(loaded), trained)
    export(loaded, tmp_path / "publish")
    assert same(weights(load_model(tmp_path / "publish")), trained)
    if config.has_dense_form:
        dense = load_model(tmp_path / "publish", dense=True)
        assert set(dtypes(dense).values()) == {"bfloat16"}


def test_a_merge_adds_in_fp32_and_rounds_once(tmp_path):
    model, _ = lr.prepare(llama().bfloat16(), METHODS["relora"], arguments(tmp_path))
    layer = adapters(model)[0]
    torch.nn.init.normal_(layer.B)
    exact = layer.base_weight.double() + layer.factor * layer.B.double() @ layer.A.double()
    merged = add_product(layer.base_weight, layer.B, layer.A, layer.factor)
    assert merged.dtype == torch.bfloat16
    assert (merged != exact.bfloat16()).float().mean() < 0.01


@pytest.mark.parametrize("method", [*REPLACING, "galore", "fullrank"])
def test_a_model_of_two_precisions_stays_so(method, tmp_path):
    toy_model("t5", auto_class=AutoModelForSeq2SeqLM).save_pretrained(tmp_path / "fp32")
    # transformers keeps T5's wo in fp32
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "fp32", dtype=torch.float16)
    plain = dtypes(model)
    assert {plain[key] for key in plain if ".wo." in key} == {"float32"}
    assert {plain[key] for key in plain if ".wi." in key} == {"float16"}
    config = METHODS[method]
    model, _ = lr.prepare(model, config, arguments(tmp_path), reinit=True)
    prepared = dtypes(model)
    for key, dtype in prepared.items():
        if "support" not in key:
            assert dtype == ("float32" if ".wo." in key or "lora_" in key else "float16"), key
    model.save_pretrained(tmp_path / "saved")
    loaded = lr.from_pretrained(tmp_path / "saved")
    assert same(weights(loaded), weights(model))
    if config.has_dense_form:
        assert dtypes(lr.to_dense(model)) == plain
        export(loaded, tmp_path / "publish")
        assert dtypes(lr.from_pretrained(tmp_path / "publish", dense=True)) == plain
        assert dtypes(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "publish", dtype=torch.float16)) == plain


@pytest.mark.parametrize("how", ["arguments", "accelerate launch"])
def test_fsdp_with_parameters_of_two_precisions_is_refused(how, tmp_path, monkeypatch):
    args = arguments(tmp_path)
    if how == "arguments":
        args.fsdp = ["full_shard"]
    else:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    message = "FSDP shards parameters of one dtype, and here bfloat16 and float32 train.*set bf16=True"
    model = llama().bfloat16()
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        lr.prepare(model, METHODS["lora"], args)
    assert same(weights(model), before)
    args.bf16 = True
    lr.prepare(model, METHODS["lora"], args)
