"""Models that other libraries have changed are measured as the matrices they multiply with, or refused by name."""

import logging

import peft
import pytest
import torch
from tiny_runs import METHODS, arguments, dataset, gpt2, llama, weights
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, T5Config, T5ForConditionalGeneration, Trainer

import hf_lowrank as lr
from hf_lowrank.checkpoints import CheckpointError, load_model
from hf_lowrank.families.spaces import in_space, spaces_of
from hf_lowrank.methods.prepare import summary_of
from hf_lowrank.methods.targets import dense_weights, linear_layers, native_weights
from hf_lowrank.metrics.interpolation import loss_path
from hf_lowrank.metrics.landscape import loss_curve, random_direction
from hf_lowrank.metrics.sequences import EvaluationSet
from hf_lowrank.metrics.spectra import spectral_metrics
from hf_lowrank.metrics.trajectory import trajectory_pca

TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"]}
ADAPTERS = {
    "LoRA": ("llama", lambda t: peft.LoraConfig(r=3, lora_alpha=7, target_modules=t)),
    "rsLoRA": ("llama", lambda t: peft.LoraConfig(r=3, use_rslora=True, target_modules=t, lora_bias=True)),
    "DoRA": ("llama", lambda t: peft.LoraConfig(r=3, use_dora=True, target_modules=t)),
    "LoHa": ("llama", lambda t: peft.LoHaConfig(r=3, target_modules=t)),
    "IA3": ("llama", lambda t: peft.IA3Config(target_modules=t, feedforward_modules=["down_proj"])),
    "Conv1D": ("gpt2", lambda t: peft.LoraConfig(r=3, target_modules=t, fan_in_fan_out=True)),
    "saved whole": ("llama", lambda t: peft.LoraConfig(r=3, target_modules=t, modules_to_save=["o_proj"])),
}


def adapted(kind, dtype=torch.float32):
    """A model with adapters that do something, and its targets' short names."""
    name, config = ADAPTERS[kind]
    model = peft.get_peft_model({"llama": llama, "gpt2": gpt2}[name]().to(dtype), config(TARGETS[name]))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_dense_matrices_are_the_merged_ones(kind, dtype):
    model = adapted(kind, dtype)
    before = weights(model)
    measured = {target.name.removeprefix("base_model.model."): weight for target, weight in dense_weights(model)}
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(model).items())
    for module in model.float().modules():
        # PEFT merges no bias into a layer that has none
        if kind == "rsLoRA" and isinstance(module, peft.tuners.lora.LoraLayer):
            module.lora_bias["default"] = False
    merged = model.merge_and_unload()
    wanted = {target.name: weight for target, weight in dense_weights(merged)}
    assert {name.removesuffix(".modules_to_save.default") for name in measured} == wanted.keys()
    for name, weight in measured.items():
        expected = wanted[name.removesuffix(".modules_to_save.default")]
        torch.testing.assert_close(weight.float(), expected, rtol=1e-5, atol=1e-6)


def test_native_matrices_are_the_factors_and_what_has_none():
    model = adapted("LoRA")
    kinds = {target.kind: tuple(weight.shape) for target, weight in native_weights(model)}
    assert kinds["self_attn.q_proj.lora_A.default.weight"] == (3, 16)
    assert kinds["mlp.down_proj.lora_B.default.weight"] == (16, 3)
    assert kinds["self_attn.k_proj"] == (8, 16)
    assert not any("base_layer" in kind for kind in kinds)


def test_adapters_that_are_off_or_merged_count_as_the_model_computes():
    model = adapted("LoRA")
    on = {target.name: weight for target, weight in dense_weights(model)}
    with model.disable_adapter():
        off = {target.name: weight.clone() for target, weight in dense_weights(model)}
    model.merge_adapter()
    assert all(torch.allclose(weight, on[target.name], atol=1e-6) for target, weight in dense_weights(model))
    plain = {f"base_model.model.{target.name}": weight for target, weight in dense_weights(llama())}
    assert all(torch.equal(weight, plain[name]) for name, weight in off.items())
    assert not torch.allclose(on["base_model.model.model.layers.0.self_attn.q_proj"],
                              off["base_model.model.model.layers.0.self_attn.q_proj"])  # fmt: skip


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "Conv1D"])
def test_the_dense_space_computes_the_same(kind):
    model, rows = adapted(kind), EvaluationSet.from_dataset(dataset(4))
    assert spaces_of(model, "both") == ("native", "dense")
    dense, space = in_space(model, "dense")
    assert space == "dense"
    assert rows(dense) == pytest.approx(rows(model), rel=1e-5)
    assert not any("lora" in name for name, _ in dense.named_parameters())


def test_a_run_with_adapters_reports_merged_spectra(tmp_path):
    model = adapted("LoRA")
    trainer = Trainer(model, arguments(tmp_path, max_steps=1), train_dataset=dataset(8))
    callback = lr.SpectralCallback(every=1, space="both")
    lr.attach(trainer, callback)
    trainer.train()
    (found,) = [
        r for r in callback.records if (r.name, r.step, r.space) == ("spectral/weight/stable_rank", 1, "dense")
    ]
    merged = trainer.model.merge_and_unload()
    ranks = [spectral_metrics(weight).stable_rank for _, weight in dense_weights(merged)]
    assert found.value == pytest.approx(sum(ranks) / len(ranks), rel=1e-5)
    assert found.about["total"] == len(ranks) == 14


def test_a_method_on_adapters_of_pefts_is_refused_and_nothing_is_changed(tmp_path):
    for name in ("lora", "galore", "sltrain"):
        model = adapted("LoRA")
        before = weights(model)
        with pytest.raises(
            ValueError, match=r"q_proj has adapters of PEFT's \(4 such layers in all\).*merge them first"
        ):
            lr.prepare(model, METHODS[name], arguments(tmp_path))
        assert all(torch.equal(before[key], tensor) for key, tensor in weights(model).items())


# Quantised weights


def bitsandbytes(folder, **options):
    pytest.importorskip("bitsandbytes")
    plain = llama(hidden_size=64, intermediate_size=128)
    plain.save_pretrained(folder)
    config = BitsAndBytesConfig(**options)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu").eval(), plain


@pytest.mark.parametrize(("options", "error"), [({"load_in_4bit": True}, 0.2), ({"load_in_8bit": True}, 0.02)])
@pytest.mark.parametrize("adapters", [False, True])
def test_bitsandbytes_is_dequantised(options, error, adapters, tmp_path):
    model, plain = bitsandbytes(tmp_path / "model", **options)
    original = {target.name: weight for target, weight in dense_weights(plain)}
    if adapters:
        model = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
        (one, _) = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
        name = "model.layers.0.self_attn.q_proj"
        original[name] = original[name] + one.get_delta_weight("default")
        name = "model.layers.1.self_attn.q_proj"
        original[name] = original[name] + _.get_delta_weight("default")
    for target, weight in dense_weights(model):
        expected = original[target.name.removeprefix("base_model.model.")]
        assert weight.shape == (target.rows, target.cols)
        assert (weight.float() - expected).norm() < error * expected.norm()
    rows = EvaluationSet.from_dataset(dataset(4))
    before = weights(model)
    with pytest.raises(ValueError, match=r"q_proj.*weight holds quantised numbers .*measure space='dense'"):
        random_direction(model, 0)
    with pytest.raises(ValueError, match="holds quantised numbers"):
        loss_path(model, before, before, rows, [0.5])
    dense, _ = in_space(model, "dense")
    assert rows(dense) == pytest.approx(rows(model), rel=1e-2)
    assert loss_curve(dense, rows, random_direction(dense, 0), [-1e-3, 0.0, 1e-3]).center_loss == rows(dense)


def test_a_quantised_checkpoint_is_refused_by_name(tmp_path):
    model, _ = bitsandbytes(tmp_path / "model", load_in_4bit=True)
    model.save_pretrained(tmp_path / "checkpoint-1")
    with pytest.raises(CheckpointError, match="holds quantised weights, which are not read here.*save it dequantised"):
        load_model(tmp_path / "checkpoint-1")


class FP8Linear(nn.Linear):
    """As transformers' and others' are: codes, and a scale for all, for each row, or for each block."""

    def __init__(self, plain, scale, block_size=None, key="weight_scale_inv"):
        super().__init__(plain.in_features, plain.out_features, bias=False)
        self.block_size = block_size
        rows, cols = block_size or (1, 1)
        spread = scale.repeat_interleave(rows, 0).repeat_interleave(cols, 1) if scale.ndim == 2 else scale
        spread = spread[: plain.out_features, : plain.in_features] if scale.ndim == 2 else spread
        spread = spread[:, None] if scale.ndim == 1 else spread
        codes = (plain.weight.detach() / spread).to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(codes, requires_grad=False)
        setattr(self, key, nn.Parameter(scale, requires_grad=False))

    def forward(self, x):
        return x


FP8 = {
    "one scale": (torch.tensor(3e-4), None),
    "a scale a row": (torch.linspace(3e-4, 1e-3, 16), None),
    "rows, in two dimensions": (torch.linspace(3e-4, 1e-3, 16)[:, None], None),
    "blocks": (torch.tensor([[3e-4, 5e-4], [4e-4, 2e-3]]), (8, 8)),
    "blocks that do not divide": (torch.tensor([[3e-4, 5e-4], [4e-4, 2e-3]]), (12, 12)),
}


@pytest.mark.parametrize("key", ["weight_scale_inv", "weight_scale"])
@pytest.mark.parametrize("how", FP8)
def test_fp8_is_multiplied_by_its_scales(how, key):
    model, (scale, block) = llama(), FP8[how]
    plain = model.model.layers[0].self_attn.q_proj
    model.model.layers[0].self_attn.q_proj = FP8Linear(plain, scale, block, key)
    weight = next(w for target, w in dense_weights(model) if target.name.endswith("layers.0.self_attn.q_proj"))
    assert (weight - plain.weight).norm() < 0.05 * plain.weight.norm()
    with pytest.raises(
        ValueError, match=r"q_proj.weight holds quantised numbers \(Parameter of torch.float8_e4m3fn\)"
    ):
        random_direction(model, 0)


def test_what_cannot_be_dequantised_is_named():
    class Codes(nn.Linear):
        def __init__(self):
            super().__init__(16, 16, bias=False)
            self.weight = nn.Parameter(torch.zeros(16, 8, dtype=torch.uint8), requires_grad=False)

    class GPTQ(nn.Module):
        qweight = torch.zeros(2, 16)

    unknown = FP8Linear(llama().model.layers[0].self_attn.q_proj, torch.tensor(1.0))
    unknown.register_buffer("codebook", torch.ones(4))
    for layer in (Codes(), unknown, GPTQ()):
        model = llama()
        model.model.layers[1].self_attn.q_proj = layer
        for weights_of in (dense_weights, native_weights):
            with pytest.raises(
                ValueError, match=r"layers.1.self_attn.q_proj is quantised \(.*\) in a way that cannot"
            ):
                list(weights_of(model))


def test_codes_without_their_layer():
    W = torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    codes = W.to(torch.float8_e4m3fn)
    assert spectral_metrics(codes) == spectral_metrics(codes.float())
    with pytest.raises(ValueError, match="torch.uint8, the codes of quantised numbers perhaps"):
        spectral_metrics(W.to(torch.uint8))
    with pytest.raises(ValueError, match="w is torch.float8_e4m3fn in checkpoint 0"):
        trajectory_pca([{"w": codes}, {"w": codes}], 1)


def test_a_landscape_of_a_quantised_model_in_training_is_named_and_left_out(tmp_path, caplog):
    model, _ = bitsandbytes(tmp_path / "model", load_in_4bit=True)
    model = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["q_proj"]))
    trainer = Trainer(model, arguments(tmp_path, max_steps=1), train_dataset=dataset(8))
    small = dict(directions=1, points=3, svd_k=(), sequences=2)
    native, spectral = lr.LandscapeCallback(dataset(4), **small), lr.SpectralCallback()
    lr.attach(trainer, native, spectral)
    with caplog.at_level(logging.WARNING, logger="hf_lowrank"):
        trainer.train()
    assert "holds quantised numbers" in native.failed
    assert "measure space='dense'" in caplog.text
    assert {r.space for r in spectral.records} == {"dense"}


# Sizes


def test_a_kind_of_several_shapes_has_a_row_for_each():
    sizes = dict(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    wide = T5ForConditionalGeneration(T5Config(**{**sizes, "d_model": 32}, decoder_start_token_id=0))
    model.decoder = wide.decoder
    modules = summary_of(model, lr.FullRankConfig()).modules
    assert modules["layer.0.SelfAttention.q (16 x 16)"] == (2, 16, 16, None)
    assert modules["layer.0.SelfAttention.q (16 x 32)"] == (2, 16, 32, None)
    assert sum(count for count, *_ in modules.values()) == sum(t.layer is not None for t in linear_layers(model))
