"""`other_lr_scale`: what is no target trains at a rate of its own, in every method."""

import dataclasses
import json
import shutil

import pytest
import torch
from test_training import final_weights
from tiny_runs import METHODS, arguments, dataset, gpt2, llama, make_trainer, restarted, weights
from torch import nn
from toy_method import ToyConfig
from transformers import Trainer
from transformers.optimization import get_scheduler

import hf_lowrank as lr
from hf_lowrank.hub.ownership import run_of
from hf_lowrank.methods.prepare import method_of
from hf_lowrank.optim.plan import Plan
from hf_lowrank.report.comparability import settings_key
from hf_lowrank.report.io import validate_report
from hf_lowrank.report.tables import fact_rows

CONFIGS = {**METHODS, "toy": ToyConfig(r=4, update_proj_gap=3)}
MODELS = {"llama": lambda: llama(mlp_bias=True), "gpt2": gpt2}
SAVING = {"save_strategy": "steps", "save_steps": 2}


def rated(method, scale):
    return dataclasses.replace(CONFIGS[method], other_lr_scale=scale)


def is_target(name):
    """Whether a parameter of these models is a target's matrix or stands in its place."""
    inside = ".layers." in name or ".h." in name
    return inside and not name.endswith("bias") and "norm" not in name and ".ln_" not in name


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(tensor, b[key]) for key, tensor in a.items())


@pytest.mark.usefixtures("toy_method")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", CONFIGS)
def test_every_parameter_trains_at_its_rate_and_the_first_group_at_the_targets(method, model, tmp_path):
    for scale in (4.0, 0.5):
        trainer = make_trainer(rated(method, scale), arguments(tmp_path, learning_rate=3e-3), model=MODELS[model]())
        groups = trainer.create_optimizer().param_groups
        found = {id(p): group["lr"] for group in groups for p in group["params"]}
        trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        assert len(found) == len(trained) == sum(len(group["params"]) for group in groups)
        expected = {name: 3e-3 if is_target(name) else scale * 3e-3 for name in trained}
        assert {name: found[id(p)] for name, p in trained.items()} == expected
        assert groups[0]["lr"] == 3e-3
        decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        matrices = {name for name, p in trained.items() if decays[id(p)] == 0.1}
        assert {name for name in trained if is_target(name)} <= matrices
        assert not any(name.endswith("bias") or "norm" in name for name in matrices)


@pytest.mark.parametrize("model", MODELS)
def test_full_rank_at_one_rate_is_a_plain_trainer(model, tmp_path):
    args = arguments(tmp_path, max_steps=4)
    plain = Trainer(model=MODELS[model](), args=args, train_dataset=dataset())
    plain.train()
    assert equal(final_weights(lr.FullRankConfig(other_lr_scale=1), args, model=MODELS[model]()), weights(plain.model))


@pytest.mark.parametrize("schedule", ["cosine", "polynomial", "cosine_with_min_lr", "reduce_lr_on_plateau"])
def test_full_rank_at_two_rates_is_adamw_with_groups_made_by_hand(schedule, tmp_path):
    changes = {
        "cosine_with_min_lr": {"lr_scheduler_kwargs": {"min_lr": 1e-3}},
        "reduce_lr_on_plateau": {"eval_strategy": "steps", "eval_steps": 1, "lr_scheduler_kwargs": {"patience": 0}},
    }.get(schedule, {})
    args = arguments(tmp_path, lr_scheduler_type=schedule, weight_decay=0.1, **changes)
    ours = make_trainer(lr.FullRankConfig(other_lr_scale=2), args)
    ours.train()
    model = llama()
    named = dict(model.named_parameters())
    decayed = {name for name in named if "norm" not in name}
    groups = [
        {"params": [named[n] for n in named if n in decayed and is_target(n)], "weight_decay": 0.1, "lr": 1e-2},
        {"params": [named[n] for n in named if n in decayed and not is_target(n)], "weight_decay": 0.1, "lr": 2e-2},
        {"params": [named[n] for n in named if n not in decayed], "weight_decay": 0.0, "lr": 2e-2},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    scheduler = None
    if schedule != "reduce_lr_on_plateau":
        scheduler = get_scheduler(schedule, optimizer, 2, 6, scheduler_specific_kwargs=args.lr_scheduler_kwargs)
    plain = Trainer(
        model=model, args=args, train_dataset=dataset(), eval_dataset=dataset(8, seed=1),
        optimizers=(optimizer, scheduler),
    )  # fmt: skip
    plain.train()
    assert equal(weights(ours.model), weights(plain.model))
    logged = [[e["learning_rate"] for e in t.state.log_history if "learning_rate" in e] for t in (ours, plain)]
    assert logged[0] == logged[1]
    assert max(logged[0]) <= 1e-2


def test_a_restart_of_the_rate_reaches_both(tmp_path):
    config = next(config for config in METHODS.values() if restarted(config))
    runs = [make_trainer(dataclasses.replace(config, other_lr_scale=s), arguments(tmp_path)) for s in (1.0, 3.0)]
    seen = []
    for trainer in runs:
        trainer.train()
        seen.append([entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry])
        rates = {group["lr"] / group["initial_lr"] for group in trainer.optimizer.param_groups}
        assert max(rates) == pytest.approx(min(rates))
    assert seen[0] == seen[1], "the rate that Trainer logs is the targets'"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Full-rank runs of 4 steps, saved every 2, by their scale."""
    folder = tmp_path_factory.mktemp("rates")
    runs = {}
    for scale in (1.0, 4.0):
        trainer = make_trainer(rated("fullrank", scale), arguments(folder / str(scale), max_steps=4, **SAVING))
        lr.attach(trainer)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hf_lowrank.run.report.draw_figures", lambda *args, **kwargs: None)
            trainer.train()
        runs[scale] = folder / str(scale), weights(trainer.model)
    return runs


def test_a_resumed_run_keeps_both_rates_bit_for_bit(checkpoints, tmp_path):
    folder, expected = checkpoints[4.0]
    assert not equal(expected, checkpoints[1.0][1])
    shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    again = make_trainer(rated("fullrank", 4.0), arguments(tmp_path, max_steps=4, **SAVING))
    lr.check_resume(tmp_path / "checkpoint-2", again.model)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert equal(weights(again.model), expected)


@pytest.mark.parametrize(("saved", "scale"), [(1.0, 4.0), (4.0, 1.0), (4.0, 2.0)])
def test_a_checkpoint_at_other_rates_is_refused(saved, scale, checkpoints, tmp_path):
    checkpoint = str(checkpoints[saved][0] / "checkpoint-2")
    trainer = make_trainer(rated("fullrank", scale), arguments(tmp_path, max_steps=4))
    message = f"other_lr_scale is {saved} there, {scale} here"
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=checkpoint)
    with pytest.raises(lr.CheckpointError, match=message):
        lr.check_resume(checkpoint, trainer.model)


def test_a_checkpoint_from_before_the_setting_is_one_at_one_rate(tmp_path):
    args = arguments(tmp_path, max_steps=2, **SAVING)
    make_trainer(METHODS["galore"], args).train()
    checkpoint = tmp_path / "checkpoint-2"
    config = json.loads((checkpoint / "config.json").read_text())
    del config["lowrank"]["other_lr_scale"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    for group in state["param_groups"]:
        group["lowrank"] = json.dumps({k: v for k, v in json.loads(group["lowrank"]).items() if k != "other_lr_scale"})
    torch.save(state, checkpoint / "optimizer.pt")
    args.max_steps = 4
    for scale in (4.0, 1.0):
        trainer = make_trainer(rated("galore", scale), args)
        if scale == 1:
            lr.check_resume(checkpoint, trainer.model)
            trainer.train(resume_from_checkpoint=str(checkpoint))
            assert trainer.state.global_step == 4
            continue
        with pytest.raises(lr.CheckpointError, match="other_lr_scale is 1.0 there, 4.0 here"):
            lr.check_resume(checkpoint, trainer.model)
        with pytest.raises(ValueError, match="other_lr_scale is 1.0 there, 4.0 here"):
            trainer.train(resume_from_checkpoint=str(checkpoint))


def test_report_and_card_say_both_rates(checkpoints, tmp_path):
    one, two = (lr.load_report(checkpoints[scale][0]) for scale in (1.0, 4.0))
    assert (two.run.learning_rate, two.run.optimizer.other_lr_scale) == (1e-2, 4)
    assert two.run.method_config["other_lr_scale"] == 4
    assert one.run.optimizer.other_lr_scale == 1
    texts = [{fact.key: fact.text for fact in fact_rows(report)}["learning_rate"] for report in (one, two)]
    assert texts == ["0.01", "0.01, other parameters 0.04"]
    assert (
        "| Peak learning rate | 0.01, other parameters 0.04 |"
        in (checkpoints[4.0][0] / "publish" / "README.md").read_text()
    )
    assert settings_key(one) != settings_key(two)
    path = checkpoints[1.0][0] / "publish" / "report.json"
    older = json.loads(path.read_text())
    del older["run"]["method_config"]["other_lr_scale"], older["run"]["optimizer"]["other_lr_scale"]
    assert settings_key(validate_report(older)) == settings_key(one)
    (tmp_path / "report.json").write_text(json.dumps(older))
    assert run_of(tmp_path / "report.json") == run_of(path), "an older version's report of this run is not another's"


@pytest.mark.parametrize("method", ["fullrank", "galore", "lora"])
def test_an_optimizer_at_one_rate_does_not_start(method, tmp_path):
    args = arguments(tmp_path)
    model, _ = lr.prepare(llama(), rated(method, 4.0), args)
    optimizer_cls, kwargs = lr.methods.prepare._optimizer(CONFIGS[method], args)
    options = [{"params": [p], **CONFIGS[method].group_options(4)} for p in model.parameters() if p.ndim == 2]
    optimizer = optimizer_cls(options if method == "galore" else model.parameters(), **kwargs)
    trainer = Trainer(model=model, args=args, train_dataset=dataset(), optimizers=(optimizer, None))
    lr.attach(trainer)
    with pytest.raises(ValueError, match=r"knows nothing of other_lr_scale=4: hand on what prepare returned"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_model_that_was_not_prepared_is_refused_rather_than_trained_at_one_rate(tmp_path):
    args = arguments(tmp_path)
    _prepared, trainer_kwargs = lr.prepare(llama(), rated("fullrank", 4.0), args)
    with pytest.raises(ValueError, match="a model that was not prepared"):
        Trainer(model=llama(), args=args, train_dataset=dataset(), **trainer_kwargs).create_optimizer()


@pytest.mark.parametrize("method", ["fullrank", "lora"])
def test_frozen_targets_leave_nothing_to_compare_a_rate_with(method, tmp_path):
    model = llama()
    model.model.layers.requires_grad_(False)
    if method == "lora":
        # its factors train
        lr.prepare(model, rated(method, 4.0), arguments(tmp_path))
        return
    with pytest.raises(ValueError, match="other_lr_scale=4: all 14 target layers are frozen.*learning_rate alone"):
        lr.prepare(model, rated(method, 4.0), arguments(tmp_path))


def test_what_fsdp_1_flattens_has_no_rate_of_its_own():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self._fsdp_wrapped_module = nn.Linear(4, 4)

    model = Wrapped()
    identity = {"method": "fullrank", "other_lr_scale": 4.0}
    plan = Plan(model, {}, identity, targets=frozenset({"layer.weight"}), other_lr_scale=4.0)
    with pytest.raises(ValueError, match="FSDP 1 flattens the weights that have a rate of their own"):
        plan.regroup(list(model.parameters()), 1e-3)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "2", None, True, [1.0]])
@pytest.mark.parametrize("method", ["fullrank", "galore", "sltrain"])
def test_a_scale_that_makes_no_sense_is_refused(method, value):
    with pytest.raises(ValueError, match="other_lr_scale=.* is a positive number"):
        type(CONFIGS[method])(other_lr_scale=value)


def test_a_model_as_trained_goes_on_at_other_rates(tmp_path):
    model, _ = lr.prepare(llama(), rated("sltrain", 4.0), arguments(tmp_path))
    lr.prepare(model, rated("sltrain", 0.5), arguments(tmp_path))
    assert method_of(model).other_lr_scale == 0.5
