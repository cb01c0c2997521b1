"""Layers that a model uses without calling them: served exactly, refused by name, or named; never silent."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from tiny_runs import METHODS, arguments, gpt2, make_trainer, weights
from torch import nn
from torch.utils.checkpoint import checkpoint
from toy_models import OwnProducts, toy_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForCTC,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)
from transformers.pytorch_utils import Conv1D

import hf_lowrank as lr
from hf_lowrank.checkpoints import export
from hf_lowrank.methods.base import ReparameterizedLinear
from hf_lowrank.methods.derived_weight import UncalledLayerError
from hf_lowrank.methods.prepare import apply_method
from hf_lowrank.methods.probe import probe, trained_layers, without_gradient

REPLACING = {
    "sltrain": lr.SLTrainConfig(r=2, sparsity=0.1),
    "cola": lr.CoLAConfig(r=2),
    "lora": lr.LoRAConfig(r=2),
    "relora": lr.ReLoRAConfig(r=2, reset_every=3, restart_warmup_steps=1),
}
DENSE = [name for name, config in REPLACING.items() if config.has_dense_form]


def perturb(model):
    """Nothing is zero, so that whatever reaches the loss has a gradient."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator).to(p)


# What a layer's weight is


def one_layer(method, linear):
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"only": linear.double()})])})
    apply_method(model, REPLACING[method] if isinstance(method, str) else method, seed=1)
    perturb(model)
    return model["layers"][0]["only"]


class Kernel(torch.autograd.Function):
    """A fused kernel, as state-space models have them."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return dy @ weight, dy.T @ x, dy.sum(0)


# x: (5, 6), W: (4, 6), b: (4,)
USES = {
    "linear": lambda x, W, b: F.linear(x, W, b),
    "transposed": lambda x, W, b: x @ W.T + b,
    "from the left": lambda x, W, b: (W @ x.transpose(0, 1)).T + b,
    "einsum": lambda x, W, b: torch.einsum("bn,mn->bm", x, W) + b,
    "cut": lambda x, W, b: torch.cat([x @ part.T for part in W.chunk(2)], -1) + b,
    "reshaped": lambda x, W, b: F.conv2d(x[:, :, None, None], W.unsqueeze(-1).unsqueeze(-1), b)[:, :, 0, 0],
    "joined": lambda x, W, b: F.linear(x, torch.cat([W, W]), torch.cat([b, b]))[:, :4],
    "cast": lambda x, W, b: F.linear(x, W.to(torch.float64).contiguous(), b),
    "kernel": Kernel.apply,
    "checkpointed": lambda x, W, b: checkpoint(F.linear, x, W, b, use_reentrant=False),
}


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("method", DENSE)
def test_every_use_of_a_weight_computes_what_a_call_computes(method, kind):
    layer = one_layer(method, nn.Linear(6, 4) if kind is nn.Linear else Conv1D(4, 6))
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def derivatives(y):
        first = torch.autograd.grad(y.sin().sum(), wanted, create_graph=True)
        return first, torch.autograd.grad(sum(g.square().sum() for g in first), wanted)

    called = layer(x)
    expected = called, *derivatives(called)
    for name, use in USES.items():
        W = layer.weight if kind is nn.Linear else layer.weight.T
        y = use(x, W, layer.bias)
        # a kernel's backward pass is not differentiable here
        got = (y, torch.autograd.grad(y.sin().sum(), wanted)) if name == "kernel" else (y, *derivatives(y))
        torch.testing.assert_close(got, expected[: len(got)], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("method", REPLACING)
def test_shape_dtype_and_device_are_there_without_a_matrix(method, monkeypatch):
    layer = one_layer(method, Conv1D(4, 6))
    monkeypatch.setattr(type(layer), "compose", None)
    monkeypatch.setattr(type(layer), "dense_weight", None)
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    assert (weight.shape, weight.dtype, weight.device.type, weight.ndim) == ((6, 4), torch.float64, "cpu", 2)
    assert weight.is_floating_point()
    assert weight.requires_grad
    assert not weight.data.requires_grad


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda layer: nn.init.zeros_(layer.weight), "writes to the weight of layer layers.0.only"),
        (lambda layer: layer.weight.data.copy_(torch.zeros(4, 6)), "writes to the weight"),
        (lambda layer: layer.weight.data.mul_(2), "writes to the weight"),
        (lambda layer: layer.weight.data[0].mul_(2), "writes to the weight"),
        (lambda layer: layer.weight.__setitem__(0, 1.0), "writes to the weight"),
        (lambda layer: layer.weight.T.__setitem__((0, 1), 1.0), "writes to the weight"),
        (lambda layer: layer.weight.data.__setitem__(slice(2), 1.0), "writes to the weight"),
        (lambda layer: nn.init.normal_(layer.weight[1:, :2]), "writes to the weight"),
        (lambda layer: layer.weight.chunk(2)[1].zero_(), "writes to the weight"),
        (lambda layer: layer.weight.view(-1).detach().__iadd__(1), "writes to the weight"),
        (lambda layer: torch.add(torch.ones(6), 1, out=layer.weight[0].detach()), "writes to the weight"),
        (lambda layer: layer.weight.data_ptr(), "takes the memory of the weight"),
        (lambda layer: torch._foreach_mul_([layer.weight], 2), "writes to the weight"),
        (lambda layer: F.relu(layer.weight[0], inplace=True), "writes to the weight"),
        (lambda layer: setattr(layer.weight, "data", torch.zeros(4, 6)), "takes the memory of the weight"),
    ],
)
def test_what_a_weight_that_is_not_there_cannot_do(use, message):
    with pytest.raises(UncalledLayerError, match=f"{message}.*leave such layers out with target_modules"):
        use(one_layer("sltrain", nn.Linear(6, 4)))


def test_a_number_of_a_weight_can_be_read():
    layer = one_layer("sltrain", nn.Linear(6, 4))
    W = layer.dense_weight().detach()
    assert int(1000 * layer.weight[0, 1]) == int(1000 * W[0, 1])
    assert range(5)[(layer.weight[0, 1] * 0).long()] == 0
    torch.testing.assert_close(F.relu(layer.weight[0]), F.relu(W[0]))


def test_a_product_that_a_call_does_not_compute_is_refused():
    x = torch.ones(5, 6, dtype=torch.float64)
    with pytest.raises(UncalledLayerError, match="layer layers.0.only without calling .* no matrix .* CoLALinear"):
        F.linear(x, one_layer("cola", nn.Linear(6, 4)).weight)
    layer = one_layer(lr.LoRAConfig(r=2, dropout=0.5), nn.Linear(6, 4))
    with pytest.raises(UncalledLayerError, match="no dropout reaches the adapters"):
        F.linear(x, layer.weight)
    torch.testing.assert_close(F.linear(x, layer.eval().weight, layer.bias), layer(x))


def test_a_compiled_model_reads_weights_as_well():
    layer = one_layer("lora", nn.Linear(6, 4))
    x = torch.randn(5, 6, dtype=torch.float64)

    def use(x):
        return F.linear(x.to(layer.weight.dtype), layer.weight, layer.bias)

    torch.testing.assert_close(torch.compile(use, backend="eager")(x), layer(x))


# Models


class Encoder(nn.Module):
    """torch's own layers: attention reads the weight of `out_proj`, and in eval mode a fused path reads all."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.dummy_inputs = {"input_ids": torch.arange(10).view(2, 5)}

    def forward(self, input_ids):
        return self.encoder(self.embed(input_ids))


def mamba2():
    model = toy_model("mamba2")
    for layer in model.backbone.layers:
        # the default pads five tokens to 256
        layer.mixer.chunk_size = 8
    return model


MODELS = {
    "mamba2": mamba2,
    "t5": lambda: toy_model("t5", auto_class=AutoModelForSeq2SeqLM),
    "switch_transformers": lambda: toy_model("switch_transformers", auto_class=AutoModelForSeq2SeqLM),
    **{
        name: lambda name=name: toy_model(name)
        for name in ("mamba", "falcon_mamba", "jamba", "gpt2", "bloom", "mixtral")
    },
    "wavlm": lambda: toy_model("wavlm", auto_class=AutoModelForCTC),
    "bert": lambda: toy_model("bert", auto_class=AutoModelForMaskedLM),
    "vit": lambda: toy_model("vit", auto_class=AutoModelForImageClassification),
    "torch": Encoder,
    "F.linear": lambda: OwnProducts(lambda mlp, x, y: F.linear(y, mlp.mix.weight, mlp.mix.bias)),
}
# what reads weights of layers that CoLA would replace
NO_COLA = {
    "mamba": "dt_proj", "falcon_mamba": "dt_proj", "jamba": "dt_proj", "wavlm": "q_proj", "torch": "out_proj",
    "F.linear": "mix",
}  # fmt: skip


@pytest.fixture(scope="module")
def built():
    return {}


# ReLoRA's layers are LoRA's
@pytest.mark.parametrize(
    "method", ["sltrain", "cola", "lora", pytest.param("relora", marks=pytest.mark.slow), "galore"]
)
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_trains_in_both_modes_or_the_model_is_refused(name, method, built, tmp_path, caplog):
    if name not in built:
        built[name] = MODELS[name]()
    model = copy.deepcopy(built[name])
    config = {**REPLACING, "galore": lr.GaLoreConfig(r=2)}[method]
    before = model.state_dict()
    if method == "cola" and name in NO_COLA:
        with pytest.raises(UncalledLayerError, match=rf"{NO_COLA[name]}.*leave such layers out with target_modules"):
            lr.prepare(model, config, arguments(tmp_path))
        assert model.state_dict().keys() == before.keys()
        assert not any(isinstance(module, ReparameterizedLinear) for module in model.modules())
        return
    lr.prepare(model, config, arguments(tmp_path))
    layers = trained_layers(model)
    assert bool(layers) == config.replaces_layers
    assert [p for p in model.parameters() if p.grad is not None] == []
    # a second look, since the first one has changed nothing
    unused = probe(model, {})
    assert (unused is None) == (not layers)
    assert ("got no gradient" in caplog.text) == bool(unused)
    # experts without tokens
    assert all("expert" in layer for layer in unused or ())


def test_torchs_attention_is_known_without_inputs(tmp_path):
    model = Encoder()
    del model.dummy_inputs
    with pytest.raises(UncalledLayerError, match=r"encoder.layers.0.self_attn.out_proj, .*without calling the layer"):
        lr.prepare(model, lr.CoLAConfig(r=2), arguments(tmp_path))
    assert not any(isinstance(module, ReparameterizedLinear) for module in model.modules())


@pytest.mark.parametrize("method", [*REPLACING])
def test_torchs_fused_path_computes_what_the_layers_compute(method, tmp_path):
    model = Encoder()
    targets = ["linear1", "linear2"] if method == "cola" else ["linear1", "linear2", "out_proj"]
    config = type(REPLACING[method])(**{**vars(REPLACING[method]), "target_modules": targets})
    lr.prepare(model, config, arguments(tmp_path))
    perturb(model)
    inputs = model.dummy_inputs
    trained = model.train()(**inputs)
    trained.square().sum().backward()
    assert without_gradient(model) == []
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**inputs), trained)


# The probe


class Normed(nn.Module):
    """It changes itself going forward: statistics, a counter, a cache; it draws from three generators."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.norm = nn.BatchNorm1d(8)
        self.calls, self.cache = 0, []
        self.dummy_inputs = {"x": torch.ones(4, 8)}

    def forward(self, x):
        self.calls += 1
        self.cache.append(x)
        x = self.norm(self.layers[0](x)) + torch.randn(8) + random.random() + np.random.rand()
        return {"x": self.layers[1](F.dropout(x, 0.1, self.training)), "count": self.calls}


@pytest.mark.parametrize("training", [True, False])
def test_the_probe_leaves_no_trace(training):
    model = Normed().train(training)
    model.norm.eval()
    apply_method(model, lr.LoRAConfig(r=2), seed=1)
    model.layers[0].A.grad = torch.full_like(model.layers[0].A, 3.0)
    before = weights(model)
    modes = [module.training for module in model.modules()]
    trains = [p.requires_grad for p in model.parameters()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert probe(model, {f"layers.{i}": model.layers[i].base_weight for i in (0, 1)}) == []
    after = weights(model)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert (model.calls, model.cache) == (0, [])
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == trains
    assert [p.grad is None for p in model.parameters() if p is not model.layers[0].A] == [True] * 9
    assert (model.layers[0].A.grad == 3).all()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


@pytest.mark.parametrize("method", ["lora", "sltrain"])
def test_training_is_the_same_without_the_probe(method, tmp_path, monkeypatch):
    ends = []
    for _ in range(2):
        trainer = make_trainer(METHODS[method], arguments(tmp_path, max_steps=2), model=gpt2())
        trainer.train()
        ends.append(weights(trainer.model))
        monkeypatch.setattr("hf_lowrank.methods.prepare.probe", lambda model, replaced: None)
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


# What is refused, and what is named


def behind_the_back(model):
    """The model keeps the weight of its layers in a place that no method knows."""
    kept = {id(layer.mlp): (layer.mlp.mix.weight,) for layer in model.model.layers}
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda mlp, x, y: F.linear(y, kept[id(mlp)][0]))
    return model


@pytest.mark.parametrize("method", REPLACING)
def test_a_layer_whose_old_weight_is_still_used_is_refused_and_nothing_is_changed(method, tmp_path):
    model = behind_the_back(OwnProducts(lambda mlp, x, y: y)).eval()
    model.model.norm.requires_grad_(False)

    def state():
        modules = {name: (id(m), m.training, len(m._forward_hooks)) for name, m in model.named_modules()}
        parameters = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
        return modules, parameters, model.config.to_dict(), sorted(vars(model))

    before = state()
    with pytest.raises(UncalledLayerError, match=r"keeps using the weight that layer model.layers.[01].mlp.mix had"):
        lr.prepare(model, REPLACING[method], arguments(tmp_path))
    assert state() == before
    lr.prepare(model, lr.GaLoreConfig(r=2), arguments(tmp_path))
    targets = ["q_proj", "up_proj"]
    lr.prepare(model, type(REPLACING[method])(r=2, target_modules=targets), arguments(tmp_path))
    assert len(trained_layers(model)) == 4


class Sometimes(OwnProducts):
    """One layer is never used, another for tokens that the probe does not have."""

    def __init__(self):
        def use(mlp, x, y):
            return y + mlp.mix(y) if mlp is self.model.layers[0].mlp and self.tokens.max() > 40 else y

        super().__init__(use)

    def forward(self, input_ids, labels=None, **kwargs):
        self.tokens = input_ids
        return super().forward(input_ids, labels=labels, **kwargs)


@pytest.mark.parametrize("method", ["lora", "sltrain"])
def test_layers_without_a_gradient_are_named_and_trained_when_they_are_used(method, tmp_path, caplog):
    args = arguments(tmp_path, max_steps=2, warmup_steps=0)
    trainer = make_trainer(METHODS[method], args, model=Sometimes())
    (record,) = caplog.records
    assert "2 of 16 target layers got no gradient from a few tokens" in record.message
    assert record.message.endswith("model.layers.0.mlp.mix, model.layers.1.mlp.mix")
    before = weights(trainer.model)
    trainer.train()
    # nothing that is new
    assert [r for r in caplog.records if "got no gradient" in r.message] == [record]
    changed = {key for key, tensor in weights(trainer.model).items() if not torch.equal(tensor, before[key])}
    assert any("0.mlp.mix" in key for key in changed)
    assert not any("1.mlp.mix" in key for key in changed)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return F.linear(self.called(x), self.read.weight, self.read.bias)


class OwnModule(nn.Module):
    """Nothing but its first layer tells what it takes."""

    def __init__(self, first):
        super().__init__()
        self.first, self.layers = first, nn.ModuleList([Block(), Block()])

    def forward(self, x, scale=None):
        x = self.first(x)
        for block in self.layers:
            x = block(x)
        return x


@pytest.mark.parametrize("first", [nn.Embedding(5, 16), nn.Linear(7, 16)], ids=["ids", "features"])
def test_a_module_that_tells_nothing_is_tried_by_its_first_layer(first, tmp_path):
    model = OwnModule(first)
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(UncalledLayerError, match=r"layers.0.read.*leave such layers out with target_modules"):
        lr.prepare(model, lr.CoLAConfig(r=2, target_modules=["called", "read"]), arguments(tmp_path))
    assert {name: type(module) for name, module in model.named_modules()} == before
    # what is called alone is no fault, and a module that needs more than one input is left to the first batch
    lr.prepare(model, lr.CoLAConfig(r=2, target_modules=["called"]), arguments(tmp_path))
    assert probe(model, {}) == []
    model.forward = lambda x, y: None
    assert probe(model, {}) is None


def test_where_prepare_cannot_run_a_model_the_first_batch_tells(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(Sometimes, "dummy_inputs", {})
    trainer = make_trainer(METHODS["lora"], arguments(tmp_path, max_steps=2), model=Sometimes())
    assert "got no gradient" not in caplog.text
    trainer.train()
    (record,) = [r for r in caplog.records if "got no gradient" in r.message]
    assert "1 of 16 target layers got no gradient from the first batch" in record.message
    assert record.message.endswith("model.layers.1.mlp.mix")


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", ["lora", "sltrain"])
def test_gradient_checkpointing_reads_the_weight_twice(method, reentrant, tmp_path):
    def trained(**changes):
        model = MODELS["F.linear"]()
        args = arguments(tmp_path, max_steps=2, warmup_steps=0, **changes)
        trainer = make_trainer(METHODS[method], args, model=model)
        trainer.train()
        return weights(trainer.model)

    plain = trained()
    again = trained(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for key in plain:
        torch.testing.assert_close(again[key], plain[key], rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["t5", "mamba2"])
def test_what_cola_publishes_runs_in_plain_transformers(name, tmp_path):
    model = MODELS[name]()
    apply_method(model, REPLACING["cola"], seed=1)
    perturb(model)
    export(model, tmp_path)
    auto = AutoModel if name == "t5" else AutoModelForCausalLM
    plain = auto.from_pretrained(tmp_path, trust_remote_code=True)
    inputs = {"input_ids": torch.arange(5)[None]}
    inputs |= {"decoder_input_ids": torch.arange(3)[None]} if name == "t5" else {}
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(**inputs).logits, model.eval()(**inputs).logits)
