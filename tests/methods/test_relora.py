"""ReLoRA: the merge keeps the function, the moments are pruned as asked, the rate follows its formula, resuming."""

import json
import logging
import math
import shutil

import pytest
import torch
from tiny_runs import METHODS, arguments, dataset, gpt2, llama, make_trainer, weights
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, StepLR
from transformers import Trainer, TrainerCallback

import hf_lowrank as lr
from hf_lowrank.methods import LoRALinear
from hf_lowrank.methods.base import seeded_generator
from hf_lowrank.methods.relora import MOMENTS, PRUNING, ReLoRACallback, fold, prune
from hf_lowrank.methods.schedule import with_restarts

RELORA = lr.ReLoRAConfig(r=4, dropout=0.1, reset_every=3, restart_warmup_steps=2)


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def restarts(trainer):
    return [entry for entry in trainer.state.log_history if "relora/restarts" in entry]


class Before(TrainerCallback):
    """Weights and moments at the start of a step, before the callbacks that come later."""

    def __init__(self, step):
        self.step, self.weights, self.moments = step, None, None

    def on_step_begin(self, args, state, control, model, optimizer, **kwargs):
        if state.global_step == self.step:
            self.weights = weights(model)
            self.moments = moments(model, optimizer)


class After(Before):
    """The same, after them."""


def moments(model, optimizer):
    named = {name: p for name, p in model.named_parameters() if p in optimizer.state}
    return {name: {key: value.clone() for key, value in optimizer.state[p].items()} for name, p in named.items()}


def run_over_a_restart(config, args, model=None):
    """A run, and what the third step left, before and after the restart."""
    model, trainer_kwargs = lr.prepare(model or llama(), config, args)
    before, after = Before(3), After(3)
    trainer_kwargs["callbacks"] = [before, *trainer_kwargs["callbacks"], after]
    trainer = Trainer(model=model, args=args, train_dataset=dataset(), **trainer_kwargs)
    trainer.train()
    return trainer, before, after


# The merge


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_merge_leaves_the_function(make, tmp_path):
    trainer, before, after = run_over_a_restart(RELORA, arguments(tmp_path, max_steps=4), make())
    model, x = trainer.model.eval(), torch.arange(16)[None]
    model.load_state_dict(before.weights)
    expected = model(x).logits
    model.load_state_dict(after.weights)
    torch.testing.assert_close(model(x).logits, expected, rtol=0, atol=1e-5)
    squared = 0.0
    for name, made in layers(model).items():
        W, A, B = (
            before.weights[f"{name}.{key}.weight"] for key in ("base_layer", "lora_A.default", "lora_B.default")
        )
        added = 32 / 4 * B @ A
        squared += added.square().sum().item()
        assert B.abs().max() > 0
        torch.testing.assert_close(made.base_weight, W + (added.T if make is gpt2 else added), rtol=1e-5, atol=1e-6)
        assert made.B.abs().max() == 0
        bound = made.in_features**-0.5
        drawn = torch.empty(A.shape).uniform_(-bound, bound, generator=seeded_generator(trainer.args.seed, name, 1))
        assert torch.equal(made.A, drawn)
        assert not torch.equal(made.A, A)
    untouched = {key for key in before.weights if not any(key.startswith(name) for name in layers(model))}
    assert all(torch.equal(after.weights[key], before.weights[key]) for key in untouched)
    (entry,) = restarts(trainer)
    assert (entry["step"], entry["relora/restarts"]) == (3, 1)
    assert entry["relora/merged_norm"] == pytest.approx(squared**0.5, rel=1e-5)


def test_a_merge_in_bf16_rounds_once():
    model = nn.ModuleDict({"only": nn.Linear(12, 20)}).bfloat16()
    lr.ReLoRAConfig(r=3).replace_layers(model, {"only": 3}, 0)
    made = model["only"]
    nn.init.normal_(made.B)
    exact = made.base_weight.double() + made.factor * made.B.double() @ made.A.double()
    squared = (exact - made.base_weight.double()).square().sum().float()
    torch.testing.assert_close(fold(made, seeded_generator(0, "only")), squared, rtol=1e-4, atol=0)
    # half a unit in the last of 8 bits
    torch.testing.assert_close(made.base_weight.double(), exact, rtol=1.001 * 2**-8, atol=0)


def test_each_restart_draws_anew_and_leaves_the_global_generator(tmp_path):
    model, trainer_kwargs = lr.prepare(llama(), RELORA, arguments(tmp_path))
    (callback,) = trainer_kwargs["callbacks"]
    trainer = Trainer(model=model, args=arguments(tmp_path, max_steps=1), train_dataset=dataset(), **trainer_kwargs)
    trainer.train()
    seen = []
    state = torch.get_rng_state()
    for step in (3, 6):
        trainer.state.global_step = step
        callback.on_step_begin(trainer.args, trainer.state, trainer.control, model=model, optimizer=trainer.optimizer)
        seen.append(model.model.layers[0].mlp.up_proj.A.detach().clone())
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(*seen)


# The moments


def held(shape=(30, 40), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(shape, generator=generator).to(dtype) for _ in MOMENTS)
    return {"step": torch.tensor(7.0), "exp_avg": first, "exp_avg_sq": second.square() + 1}


@pytest.mark.parametrize("kind", PRUNING)
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.999, 1.0])
def test_so_many_entries_are_zeroed_and_the_same_in_both(kind, ratio):
    state, before = held(), held()
    expected = 1200 if kind == "reset" else round(1200 * ratio)
    assert prune(state, kind, ratio, seeded_generator(0)) == expected
    gone = state["exp_avg"] == 0
    assert int(gone.sum()) == expected
    assert torch.equal(state["exp_avg_sq"] == 0, gone)
    for key in MOMENTS:
        assert torch.equal(state[key][~gone], before[key][~gone])
    assert state["step"] == 7
    if kind == "magnitude" and 0 < ratio < 1:
        assert before["exp_avg"][gone].abs().max() < before["exp_avg"][~gone].abs().min()


def test_random_entries_are_spread_evenly_and_depend_on_the_seed():
    counts = torch.zeros(30, 40)
    for seed in range(200):
        state = held()
        prune(state, "random", 0.9, seeded_generator(seed))
        counts += state["exp_avg"] != 0
    # each entry stays with probability 0.1: mean 20 in 200 draws, standard deviation 4.2
    assert counts.mean().item() == pytest.approx(20)
    assert counts.std().item() == pytest.approx(18**0.5, rel=0.1)


@pytest.mark.parametrize("kind", PRUNING)
def test_the_share_pruned_in_a_run_is_the_one_asked_and_logged(kind, tmp_path, caplog):
    # 16 x 4 entries and more, so that rounding stays below a per cent
    config = lr.ReLoRAConfig(r=4, reset_every=3, restart_warmup_steps=2, pruning=kind, pruning_ratio=0.75)
    with caplog.at_level(logging.INFO, logger="hf_lowrank.methods.relora"):
        trainer, before, after = run_over_a_restart(config, arguments(tmp_path, max_steps=4))
    asked = 1.0 if kind == "reset" else 0.75
    entries = gone = 0
    for name, state in after.moments.items():
        assert torch.equal(state["step"], before.moments[name]["step"])
        if "lora_" in name:
            changed = [(state[key] == 0) & (before.moments[name][key] != 0) for key in MOMENTS]
            assert int(((state["exp_avg"] == 0) != (state["exp_avg_sq"] == 0)).sum()) == 0
            entries, gone = entries + changed[0].numel(), gone + int(changed[0].sum())
        else:
            assert all(torch.equal(state[key], before.moments[name][key]) for key in MOMENTS)
    assert gone / entries == pytest.approx(asked, abs=0.01)
    assert restarts(trainer)[0]["relora/pruned_share"] == pytest.approx(gone / entries, abs=1e-6)
    assert caplog.text.count("ReLoRA restart 1 after step 3") == 1


def test_the_choice_differs_between_layers_sides_and_restarts(tmp_path):
    trainer, _, after = run_over_a_restart(RELORA, arguments(tmp_path, max_steps=4))
    kept = {name: state["exp_avg"] != 0 for name, state in after.moments.items() if "lora_" in name}
    ups = [kept[f"model.layers.{i}.mlp.up_proj.lora_B.default.weight"] for i in (0, 1)]
    assert not torch.equal(*ups)
    assert len(restarts(trainer)) == 1


def test_an_optimizer_without_moments_is_refused_after_one_step(tmp_path):
    args = arguments(tmp_path, max_steps=6)
    model, trainer_kwargs = lr.prepare(llama(), RELORA, args)
    del trainer_kwargs["optimizer_cls_and_kwargs"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = Trainer(model=model, args=args, train_dataset=dataset(), optimizers=(optimizer, None), **trainer_kwargs)
    with pytest.raises(ValueError, match="keeps momentum_buffer for .*q_proj.A where ReLoRA prunes exp_avg"):
        trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": "sgd"}, "optim='sgd': ReLoRA prunes AdamW's moments .* use adamw_torch"),
        ({"optim": "adafactor"}, "optim='adafactor'"),
        ({"fp16": True}, "fp16=True: where the gradient scaler skips a step .* use bf16=True"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}, "lr_scheduler_type='reduce_lr_on"),
    ],
)
def test_arguments_that_contradict_it_are_refused_before_the_model_is_changed(changes, message, tmp_path):
    model = llama()
    with pytest.raises(ValueError, match=message):
        lr.prepare(model, RELORA, arguments(tmp_path, **changes))
    assert not layers(model)


# The learning rate


def cosine(t, steps, warmup, least):
    """Factor of the overall schedule, written from its definition."""
    if t < warmup:
        return t / warmup
    return least + (1 - least) * (1 + math.cos(math.pi * (t - warmup) / (steps - warmup))) / 2


@pytest.mark.parametrize(
    ("schedule", "least"),
    [
        ({"lr_scheduler_type": "cosine"}, 0.0),
        ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}, 0.1),
    ],
)
def test_the_rate_logged_and_used_at_every_step(schedule, least, tmp_path):
    config = lr.ReLoRAConfig(r=2, reset_every=6, restart_warmup_steps=3, target_modules=["up_proj"])
    used = []

    class Rates(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
            used.append({group["lr"] for group in optimizer.param_groups})

    trainer = make_trainer(config, arguments(tmp_path, max_steps=20, warmup_steps=4, **schedule))
    trainer.add_callback(Rates())
    trainer.train()
    expected = []
    for t in range(20):
        k, s = divmod(t, 6)
        if k and s < 3:
            expected.append(1e-2 * cosine(6 * k + 3, 20, 4, least) * s / 3)
        else:
            expected.append(1e-2 * cosine(t, 20, 4, least))
    assert [next(iter(rates)) for rates in used] == pytest.approx(expected, abs=1e-15)
    assert all(len(rates) == 1 for rates in used)
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged == pytest.approx(expected, abs=1e-15)


def test_no_warm_up_after_a_restart_leaves_the_schedule():
    factor = with_restarts(lambda t: 1 / (1 + t), 5, 0)
    assert [factor(t) for t in range(20)] == [1 / (1 + t) for t in range(20)]


@pytest.mark.parametrize("own", [False, True])
def test_training_twice_puts_the_restarts_in_once(own, tmp_path):
    args = arguments(tmp_path, max_steps=5, lr_scheduler_type="constant")
    model, trainer_kwargs = lr.prepare(llama(), RELORA, args)
    if own:
        optimizer_cls, options = trainer_kwargs.pop("optimizer_cls_and_kwargs")
        optimizer = optimizer_cls(model.parameters(), **options)
        trainer_kwargs["optimizers"] = optimizer, LambdaLR(optimizer, lambda step: 1.0)
    trainer = Trainer(model=model, args=args, train_dataset=dataset(), **trainer_kwargs)
    for _ in range(2):
        trainer.train()
        (factor,) = set(trainer.lr_scheduler.lr_lambdas) if own else trainer.lr_scheduler.lr_lambdas[:1]
        assert [factor(t) for t in range(8)] == [1, 1, 1, 0, 0.5, 1, 0, 0.5]


def test_a_schedule_of_another_kind_is_refused(tmp_path):
    args = arguments(tmp_path)
    model, trainer_kwargs = lr.prepare(llama(), RELORA, args)
    optimizer_cls, options = trainer_kwargs.pop("optimizer_cls_and_kwargs")
    optimizer = optimizer_cls(model.parameters(), **options)
    schedule = StepLR(optimizer, 2)
    trainer = Trainer(
        model=model, args=args, train_dataset=dataset(), optimizers=(optimizer, schedule), **trainer_kwargs
    )
    with pytest.raises(ValueError, match="gives a StepLR, which takes no restarts: .*cosine_with_min_lr"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_model_without_adapters_is_refused(tmp_path):
    trainer = Trainer(
        model=llama(), args=arguments(tmp_path), train_dataset=dataset(), callbacks=[ReLoRACallback(RELORA)]
    )
    with pytest.raises(ValueError, match="no LoRA layers: give the Trainer the model that prepare returned"):
        trainer.train()


def test_a_run_too_short_for_a_restart_says_so(tmp_path, caplog):
    make_trainer(RELORA, arguments(tmp_path, max_steps=3)).train()
    assert "reset_every=3: no restart within the 3 steps of training" in caplog.text


# Runs


@pytest.mark.parametrize("step", [3, 4])
@pytest.mark.parametrize("kind", PRUNING)
def test_a_run_resumed_at_or_behind_a_restart_is_bit_identical(kind, step, tmp_path):
    config = lr.ReLoRAConfig(r=4, dropout=0.1, reset_every=3, restart_warmup_steps=2, pruning=kind, pruning_ratio=0.9)
    saving = {"save_strategy": "steps", "save_steps": step, "max_steps": 8}
    whole = make_trainer(config, arguments(tmp_path / "whole", **saving))
    whole.train()
    saved = tmp_path / "again" / f"checkpoint-{step}"
    shutil.copytree(tmp_path / "whole" / saved.name, saved)
    if step == 3:
        # what was trained is not merged yet
        assert lr.from_pretrained(saved).model.layers[0].mlp.up_proj.B.abs().max() > 0
    schedule = torch.load(saved / "scheduler.pt", weights_only=True)
    assert set(schedule["lr_lambdas"]) == {None}
    again = make_trainer(config, arguments(tmp_path / "again", **saving))
    again.train(resume_from_checkpoint=str(saved))
    expected = weights(whole.model)
    for key, tensor in weights(again.model).items():
        assert torch.equal(tensor, expected[key]), key
    mine, theirs = again.optimizer.state_dict()["state"], whole.optimizer.state_dict()["state"]
    for index, state in theirs.items():
        assert all(torch.equal(mine[index][key], value) for key, value in state.items()), index

    def lines(trainer):
        history = json.loads(json.dumps(trainer.state.log_history))
        return [entry for entry in history if "train_runtime" not in entry]

    assert lines(again) == lines(whole)
    assert [entry["relora/restarts"] for entry in restarts(again)] == [1, 2]


def test_one_restart_an_optimizer_step_with_gradient_accumulation(tmp_path):
    # 5 micro-batches in an epoch: its last step has one alone
    args = arguments(tmp_path, max_steps=8, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    trainer = make_trainer(RELORA, args, rows=20)
    trainer.train()
    assert [(entry["step"], entry["relora/restarts"]) for entry in restarts(trainer)] == [(3, 1), (6, 2)]


def test_adapters_learn_from_the_first_step(tmp_path):
    args = arguments(tmp_path, max_steps=1, warmup_steps=0)
    trainer = make_trainer(RELORA, args)
    for made in layers(trainer.model).values():
        assert made.A.abs().max() > 0
        assert made.B.abs().max() == 0
    trainer.train()
    for name, made in layers(trainer.model).items():
        assert made.B.abs().max() > 0, name
        assert made.base_weight.grad is None


def test_the_contracts_defaults():
    assert lr.ReLoRAConfig().to_dict() == {
        "method": "relora", "r": None, "alpha": 32, "dropout": 0.0, "reset_every": 1000, "restart_warmup_steps": 100,
        "pruning": "random", "pruning_ratio": 0.99, "target_modules": None, "other_lr_scale": 1.0,
    }  # fmt: skip
    assert lr.LoRAConfig().to_dict() == {
        "method": "lora",
        "r": None,
        "alpha": 32,
        "dropout": 0.0,
        "target_modules": None,
        "other_lr_scale": 1.0,
    }


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"reset_every": 0}, "reset_every"),
        ({"reset_every": 2.5}, "reset_every"),
        ({"restart_warmup_steps": -1}, "restart_warmup_steps"),
        ({"reset_every": 100}, "restart_warmup_steps=100: .* less than reset_every=100"),
        ({"pruning": "some"}, "pruning='some': choose one of random, magnitude, reset"),
        ({"pruning_ratio": 1.1}, "pruning_ratio"),
        ({"pruning_ratio": -0.1}, "pruning_ratio"),
    ],
)
def test_values_out_of_range_are_named(fields, word):
    with pytest.raises(ValueError, match=word):
        lr.ReLoRAConfig(**fields)


def test_attached_the_restarts_go_to_every_reporter(tmp_path):
    logged = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append(dict(logs))

    trainer = make_trainer(METHODS["relora"], arguments(tmp_path, max_steps=5), model=llama())
    trainer.add_callback(Reporter())
    lr.attach(trainer)
    trainer.train()
    restarts = [entry for entry in logged if "relora/restarts" in entry]
    assert len(restarts) == 1
    assert restarts[0]["relora/pruned_share"] == pytest.approx(0.99, abs=0.01)
    # the training loss of the same step is logged all the same
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3, 4, 5]
