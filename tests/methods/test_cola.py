"""CoLA's layer against the formula, CoLA-M against CoLA, and what CoLA-M keeps for the backward pass."""

import json
from math import prod

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from tiny_runs import METHODS, VOCABULARY, arguments, gpt2, llama, make_trainer, weights
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import OPTConfig, set_seed
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import hf_lowrank as lr
from hf_lowrank import CoLAConfig
from hf_lowrank.checkpoints import check_resume
from hf_lowrank.methods import CoLALinear
from hf_lowrank.methods.base import seeded_generator
from hf_lowrank.methods.prepare import apply_method, identity, method_of

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "tanh": torch.tanh, "linear": lambda h: h}


def layer(n=12, m=20, r=3, activation="silu", bias=True, dtype=torch.float64, recompute=False):
    made = CoLALinear(n, m, r, activation, bias, generator=seeded_generator(0)).to(dtype)
    if bias:
        nn.init.normal_(made.bias)
    made.recompute = recompute
    return made


def prepared(recompute=False, make=llama, tmp_path="unused", **changes):
    """A model in training mode, with the same weights whatever `recompute` is."""
    args = arguments(tmp_path)
    return lr.prepare(make(), CoLAConfig(r=4, recompute=recompute, **changes), args)[0].train()


def batch(rows=3, length=12):
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def gradients(model, seed=5):
    """Loss and gradients of a batch, dropout drawn from `seed`."""
    torch.manual_seed(seed)
    loss = model(batch(), labels=batch(), use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


# The layer


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 5, 12)], ids=str)
def test_forward_and_all_gradients_follow_the_formula(shape, activation, bias, recompute):
    made = layer(activation=activation, bias=bias, recompute=recompute)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    parameters = [x, *made.parameters()]
    y = made(x)
    plain = ACTIVATIONS[activation](x @ made.A.T) @ made.B.T + (made.bias if bias else 0)
    upstream = torch.randn_like(plain)
    torch.testing.assert_close(y, plain, rtol=1e-12, atol=1e-12)
    mine = torch.autograd.grad((y * upstream).sum(), parameters)
    theirs = torch.autograd.grad((plain * upstream).sum(), parameters)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradcheck_and_gradgradcheck(recompute):
    made = layer(n=4, m=5, r=2, recompute=recompute)
    inputs = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True), made.A, made.B, made.bias)

    def run(x, A, B, bias):
        return torch.func.functional_call(made, {"A": A, "B": B, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_initial_values():
    m, n, r = 300, 200, 50
    made = CoLALinear(n, m, r, generator=torch.Generator().manual_seed(0))
    std = r**-0.25 * (m + n) ** -0.25
    for factor in (made.A, made.B):
        # five standard errors: std / sqrt(N) of the mean, std / sqrt(2 N) of the standard deviation
        assert abs(factor.mean().item()) < 5 * std / factor.numel() ** 0.5
        assert abs(factor.std().item() - std) < 5 * std / (2 * factor.numel()) ** 0.5
    # an entry of B A has variance 1 / (m + n); a row's entries share B's row, so rows count as samples
    rows = made.dense_weight().square().mean(dim=1) * (m + n)
    assert abs(rows.mean().item() - 1) < 5 * rows.std().item() / m**0.5
    again = CoLALinear(n, m, r, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.A, made.A)
    assert torch.equal(again.B, made.B)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_replaces_either_kind_of_linear_layer(kind):
    linear = nn.Linear(12, 20) if kind is nn.Linear else Conv1D(20, 12)
    nn.init.normal_(linear.bias)
    made = CoLAConfig(r=3).replace_layer(linear.to(torch.bfloat16), 3, torch.Generator().manual_seed(0))
    assert (made.in_features, made.out_features, made.r) == (12, 20, 3)
    assert made.fan_in_fan_out == (kind is Conv1D)
    assert torch.equal(made.bias, linear.bias)
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert CoLAConfig().replace_layer(nn.Linear(12, 20, bias=False), 3, torch.Generator()).bias is None


def test_the_product_stands_for_the_layer_but_is_no_dense_form():
    made = layer()
    torch.testing.assert_close(made.dense_weight(), made.B.detach() @ made.A.detach())
    assert not made.dense_weight().requires_grad
    with pytest.raises(ValueError, match="CoLALinear has no dense form"):
        made.dense_state()
    # the layer's slope at 0 is act'(0) B A, and SiLU's is 1/2
    slope = torch.func.jacrev(made)(torch.zeros(12, dtype=torch.float64))
    torch.testing.assert_close(slope, made.dense_weight() / 2)


def test_the_optimizers_state_is_that_of_the_factors():
    assert CoLAConfig().state_elements(20, 12, 3) == 2 * 3 * (20 + 12)
    made = layer(activation="prelu", bias=False)
    assert CoLAConfig(activation="prelu").state_elements(20, 12, 3) == 2 * sum(p.numel() for p in made.parameters())


@pytest.mark.parametrize("recompute", [False, True])
def test_autocast_multiplies_in_bf16(recompute):
    made, x = layer(dtype=torch.float32, recompute=recompute), torch.randn(4, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = made(x)
        assert made.dense_weight().dtype == torch.float32
    half = layer(dtype=torch.bfloat16)
    half.load_state_dict(made.state_dict())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, half(x.bfloat16()))
    y.float().sum().backward()
    assert {p.grad.dtype for p in made.parameters()} == {torch.float32}


@pytest.mark.parametrize("recompute", [False, True])
def test_compiles(recompute):
    made, x = layer(dtype=torch.float32, recompute=recompute), torch.randn(4, 12, requires_grad=True)
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), made(x))
    mine, theirs = (torch.autograd.grad(f(x).sum(), [x, *made.parameters()]) for f in (compiled, made))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


# The config


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"activation": "sillu"}, "activation='sillu' is unknown \\(did you mean 'silu'\\?\\); transformers has gelu"),
        ({"activation": 3}, "activation=3 is unknown"),
        ({"only_lr_act": "yes"}, "only_lr_act='yes'"),
        ({"recompute": 1}, "recompute=1"),
        ({"r": 0}, "r=0"),
    ],
)
def test_values_that_make_no_sense_are_named(fields, words):
    with pytest.raises(ValueError, match=words):
        CoLAConfig(**fields)


def opt():
    set_seed(0)
    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2,
        word_embed_proj_dim=16, max_position_embeddings=32,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (llama, ["model.layers.0.mlp.act_fn", "model.layers.1.mlp.act_fn"]),
        (gpt2, ["transformer.h.0.mlp.act", "transformer.h.1.mlp.act"]),
        (opt, ["model.decoder.layers.0.activation_fn", "model.decoder.layers.1.activation_fn"]),
    ],
)
def test_only_the_low_rank_activations_are_left(make, names):
    kept, dropped = (prepared(make=make, only_lr_act=only) for only in (False, True))
    types = {name: type(module) for name, module in kept.named_modules()}
    now = {name: type(module) for name, module in dropped.named_modules()}
    assert {name for name in types if types[name] is not now[name]} == set(names)
    assert {now[name] for name in names} == {nn.Identity}
    # nothing else differs
    assert all(torch.equal(tensor, weights(dropped)[key]) for key, tensor in weights(kept).items())


def test_no_activation_to_drop_is_an_error_before_anything_is_changed():
    model = llama()
    with pytest.raises(ValueError, match="only_lr_act=True drops .* LlamaForCausalLM has none beside the target"):
        lr.prepare(model, CoLAConfig(r=4, only_lr_act=True, target_modules=["q_proj"]), arguments("unused"))
    assert not any(isinstance(module, CoLALinear) for module in model.modules())


def test_recomputing_may_change_within_a_run(tmp_path):
    model, other = prepared(), prepared(recompute=True)
    plain, recomputing = method_of(model), method_of(other)
    assert identity(model, plain) == identity(other, recomputing)
    model.save_pretrained(tmp_path / "checkpoint-1")
    check_resume(tmp_path / "checkpoint-1", other)
    # a loaded model takes the other setting and notes it; anything else stays an error
    lr.prepare(model, recomputing, arguments(tmp_path))
    assert method_of(model) == recomputing
    with pytest.raises(ValueError, match="cannot be put on it"):
        apply_method(model, CoLAConfig(r=4, activation="gelu"), seed=1)
    assert json.loads((tmp_path / "checkpoint-1" / "config.json").read_text())["lowrank"]["recompute"] is False


def test_resuming_with_recomputation_goes_on_bit_for_bit(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = make_trainer(METHODS["cola"], arguments(tmp_path, **saving))
    whole.train()
    again = make_trainer(METHODS["cola-m"], arguments(tmp_path, **saving))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(tensor, weights(again.model)[key]) for key, tensor in weights(whole.model).items())


# CoLA-M


@pytest.mark.parametrize("make", [llama, gpt2])
def test_cola_m_has_the_gradients_of_cola_bit_for_bit(make):
    # both models have dropout, which the recomputation draws again
    mine, theirs = gradients(prepared(recompute=True, make=make)), gradients(prepared(make=make))
    assert mine.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(mine[key], tensor), key


def test_cola_m_under_autocast_has_the_gradients_of_cola():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine, theirs = gradients(prepared(recompute=True)), gradients(prepared())
    for key, tensor in theirs.items():
        assert torch.equal(mine[key], tensor), key


class Alive(TorchDispatchMode):
    """Every tensor that is computed, by shape, and whether its storage still lives."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.seen.append((tuple(tensor.shape), StorageWeakRef(tensor.untyped_storage())))
        return out

    def shapes(self, model):
        """Shape of each live storage, once: views of one storage count as one, and of parameters as none."""
        own = {StorageWeakRef(p.untyped_storage()).cdata for p in model.parameters()}
        found = {}
        for shape, storage in self.seen:
            if not storage.expired() and storage.cdata not in own:
                found.setdefault(storage.cdata, shape)
        return list(found.values())


def kept_by(layers, recompute):
    """Shapes of what lives between the forward and the backward pass of a Llama with so many blocks."""
    # sizes that tell each other apart; one position's cosines and sines are shared by the blocks
    sizes = dict(hidden_size=32, intermediate_size=88, num_attention_heads=4, num_key_value_heads=2)
    model = prepared(recompute, lambda: llama(num_hidden_layers=layers, attention_dropout=0.0, **sizes))
    with Alive() as alive:
        hidden = model.model(batch(2, 10), use_cache=False).last_hidden_state
        shapes = alive.shapes(model)
    hidden.sum().backward()
    return [shape for shape in shapes if prod(shape) >= 20]


def test_cola_m_keeps_a_blocks_input_and_seven_low_rank_activations():
    tokens, r, n = (2, 10), 4, 32
    kept, before = kept_by(3, True), kept_by(2, True)
    for shape in before:
        kept.remove(shape)
    # what one more block costs: 7 r numbers a token beside its input
    assert sorted(kept) == sorted([(*tokens, r)] * 7 + [(*tokens, n)])
    plain = kept_by(3, False)
    for shape in kept_by(2, False):
        plain.remove(shape)
    assert sum(map(prod, plain)) > 5 * sum(map(prod, kept))


def test_cola_m_in_gradient_accumulation_trains_what_cola_trains(tmp_path):
    accumulating = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    runs = {}
    for name in ("cola", "cola-m"):
        trainer = make_trainer(METHODS[name], arguments(tmp_path, **accumulating))
        trainer.train()
        runs[name] = weights(trainer.model)
    assert all(torch.equal(tensor, runs["cola-m"][key]) for key, tensor in runs["cola"].items())


def test_recomputation_is_for_training_alone():
    model = prepared(recompute=True).eval()
    plain = prepared().eval()
    with torch.no_grad():
        assert torch.equal(model(batch()).logits, plain(batch()).logits)


def test_cola_m_and_gradient_checkpointing_contradict_each_other(tmp_path):
    model, args = llama(), arguments(tmp_path, gradient_checkpointing=True)
    with pytest.raises(ValueError, match="drop gradient_checkpointing"):
        lr.prepare(model, CoLAConfig(r=4, recompute=True), args)
    assert not any(isinstance(module, CoLALinear) for module in model.modules())


class Stack(nn.Module):
    """Repeated blocks without transformers' checkpointing."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)])


def test_a_model_without_checkpointing_is_refused(tmp_path):
    model = Stack()
    with pytest.raises(ValueError, match="recompute=True .* which Stack does not have: set recompute=False"):
        lr.prepare(model, CoLAConfig(r=2, recompute=True), arguments(tmp_path))
    lr.prepare(Stack(), CoLAConfig(r=2), arguments(tmp_path))
