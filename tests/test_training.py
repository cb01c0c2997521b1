"""Every method through a plain Trainer: the table of (method x capability), and exact resuming."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from tiny_runs import METHODS, arguments, dataset, gpt2, kind, llama, make_trainer, restarted, weights
from transformers import Trainer

import hf_lowrank as lr
from hf_lowrank.methods.prepare import summary_of
from hf_lowrank.methods.summary import optimizer_state_bytes


def final_weights(config, args, **kwargs):
    trainer = make_trainer(config, args, **kwargs)
    trainer.train()
    return weights(trainer.model)


def assert_close(a, b, rtol):
    for key, tensor in a.items():
        if tensor.is_floating_point():
            error = (tensor - b[key]).norm() / tensor.norm().clamp_min(1e-12)
            assert error < rtol, key
        else:
            assert torch.equal(tensor, b[key]), key


CAPABILITIES = {
    "gradient accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "compiled model": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
}
# what cannot go together, with the words of the error that says so
CONTRADICTIONS = {("cola-m", "gradient checkpointing"): "both recompute the blocks: drop gradient_checkpointing"}
# seconds a case: the first method of each kind at once, the others with the slow tests
FIRST = {kind(config): name for name, config in reversed(METHODS.items()) if kind(config)}
DEAR = [name if name in FIRST.values() else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
CASES = [
    pytest.param(method, name, marks=pytest.mark.slow if name == "compiled model" and method not in DEAR else ())
    for method in METHODS
    for name in CAPABILITIES
]


@pytest.mark.parametrize(("method", "capability"), CASES)
def test_a_capability_does_not_change_what_is_trained(method, capability, tmp_path):
    # no dropout here: its random numbers are drawn per micro-batch
    def run(**changes):
        model = llama(attention_dropout=0.0)
        return final_weights(METHODS[method], arguments(tmp_path, **changes), model=model)

    plain = run()
    if (method, capability) in CONTRADICTIONS:
        with pytest.raises(ValueError, match=CONTRADICTIONS[method, capability]):
            run(**CAPABILITIES[capability])
        return
    changed = {key.removeprefix("_orig_mod."): tensor for key, tensor in run(**CAPABILITIES[capability]).items()}
    # one summation order against another, amplified by Adam where a gradient is near zero, and by Muon's bf16
    assert_close(plain, changed, rtol=2e-2 if method == "muon" else 2e-3)


@pytest.mark.parametrize("method", DEAR)
def test_learns_in_bf16_autocast_and_in_pure_bf16(method, tmp_path):
    for changes, dtype in (({"bf16": True}, None), ({}, torch.bfloat16)):
        model = llama() if dtype is None else llama().to(dtype)
        args = arguments(tmp_path, max_steps=40, **changes)
        trainer = make_trainer(METHODS[method], args, model=model)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < 0.8 * losses[0]
        assert next(trainer.model.parameters()).dtype == (dtype or torch.float32)


@pytest.mark.parametrize("method", METHODS)
def test_clipping_reaches_the_optimizer(method, tmp_path):
    args = arguments(tmp_path, max_grad_norm=1e-12)
    before = weights(lr.prepare(llama(), METHODS[method], args)[0])
    after = final_weights(METHODS[method], arguments(tmp_path, max_grad_norm=1e-12, weight_decay=0.0))
    # gradients of 1e-12 vanish beside eps, so nothing moves by more than lr * 1e-12 / eps a step
    for key, tensor in after.items():
        # a restart draws A anew, a refactorisation or an exact step of LORO balances both factors
        balances = any(getattr(METHODS[method], name, 0) for name in ("refactorize_every", "exact_every"))
        refactorized = balances and key.endswith((".A", ".B"))
        # Stable-SPAM divides a gradient by its norm, and FRUGAL takes signs of what it does not project
        normalized = any(hasattr(METHODS[method], name) for name in ("gamma3", "sign_lr_scale")) and "_proj" in key
        if not (normalized or refactorized or (restarted(METHODS[method]) and "lora_A" in key)):
            assert (tensor.double() - before[key].double()).abs().max() < 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_optimizer_state_has_the_predicted_size(method, tmp_path):
    for model in (llama(), gpt2()):
        trainer = make_trainer(METHODS[method], arguments(tmp_path, max_steps=1), model=model)
        trainer.train()
        predicted = summary_of(trainer.model, METHODS[method])
        assert optimizer_state_bytes(trainer.optimizer.optimizer) == predicted.state_bytes
        plain = Trainer(
            model=llama() if model.config.model_type == "llama" else gpt2(),
            args=arguments(tmp_path, max_steps=1),
            train_dataset=dataset(),
        )
        plain.train()
        assert optimizer_state_bytes(plain.optimizer.optimizer) == predicted.adamw_state_bytes


def test_weight_decay_reaches_the_projected_weights(tmp_path):
    trainer = make_trainer(METHODS["galore"], arguments(tmp_path, weight_decay=0.1))
    groups = trainer.create_optimizer().param_groups
    assert {group["weight_decay"] for group in groups if "r" in group} == {0.1}
    assert sum(len(group["params"]) for group in groups if "r" in group) == 14
    assert sum(len(group["params"]) for group in groups) == len(list(trainer.model.parameters()))


def test_galore_on_gpt2_projects_conv1d(tmp_path):
    trainer = make_trainer(METHODS["galore"], arguments(tmp_path), model=gpt2())
    before = weights(trainer.model)
    trainer.train()
    update = trainer.model.transformer.h[0].attn.c_attn.weight.detach() - before["transformer.h.0.attn.c_attn.weight"]
    assert update.abs().max() > 0
    assert {tuple(s["projector"].shape) for s in trainer.optimizer.state.values() if "projector" in s} == {
        (16, 4), (4, 16),
    }  # fmt: skip


def losses_by_step(output_dir: Path, step: int):
    state = json.loads((output_dir / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [(entry["step"], entry["loss"]) for entry in state["log_history"] if "loss" in entry]


@pytest.mark.parametrize("method", DEAR)
def test_a_resumed_run_is_bit_identical(method, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    whole = make_trainer(METHODS[method], arguments(tmp_path / "whole", **saving))
    lr.attach(whole, lr.SpectralCallback(every=4))
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "again" / "checkpoint-4")
    again = make_trainer(METHODS[method], arguments(tmp_path / "again", **saving))
    lr.attach(again, lr.SpectralCallback(every=4))
    again.train(resume_from_checkpoint=lr.last_checkpoint(tmp_path / "again"))
    expected = weights(whole.model)
    for key, tensor in weights(again.model).items():
        assert torch.equal(tensor, expected[key]), key
    mine, theirs = again.optimizer.state_dict()["state"], whole.optimizer.state_dict()["state"]
    for index, state in theirs.items():
        for key, value in state.items():
            # a seed is a number
            assert torch.equal(torch.as_tensor(mine[index][key]), torch.as_tensor(value)), (index, key)
    assert losses_by_step(tmp_path / "again", 8) == losses_by_step(tmp_path / "whole", 8)
    loaded = torch.load(tmp_path / "again" / "checkpoint-8" / "optimizer.pt", weights_only=True)
    assert len(loaded["state"]) == len(theirs)


OTHERS = {
    "another method": ("galore", lr.FullRankConfig(), "galore.*fullrank"),
    "from full-rank": ("fullrank", lr.GaLoreConfig(r=4), "fullrank.*galore"),
    "another projected optimizer": ("galore", lr.FiraConfig(r=4, update_proj_gap=3), "galore.*fira"),
    "restarts for LoRA": ("lora", lr.ReLoRAConfig(r=4, reset_every=3, restart_warmup_steps=1), "lora.*relora"),
    "another rank": ("galore", lr.GaLoreConfig(r=5, update_proj_gap=3), "r is"),
    "another layer": ("sltrain", lr.FullRankConfig(), "trained with another method"),
    "to another layer": ("galore", lr.SLTrainConfig(r=4, sparsity=0.1), "trained with another method"),
    "another sparsity": ("sltrain", lr.SLTrainConfig(r=4, sparsity=0.2), "sparse_support"),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A checkpoint at step 2 for each method."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for method in ("fullrank", "galore", "sltrain", "lora"):
        args = arguments(folder / method, save_strategy="steps", save_steps=2, max_steps=2)
        make_trainer(METHODS[method], args).train()
    return folder


@pytest.mark.parametrize("case", OTHERS)
def test_a_checkpoint_of_another_run_is_refused(case, checkpoints, tmp_path):
    saved, config, message = OTHERS[case]
    trainer = make_trainer(config, arguments(tmp_path, max_steps=4))
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(checkpoints / saved / "checkpoint-2"))
    with pytest.raises(lr.CheckpointError, match="belongs to another run"):
        lr.check_resume(checkpoints / saved / "checkpoint-2", trainer.model)


def test_a_checkpoint_of_another_model_size_is_refused(checkpoints, tmp_path):
    trainer = make_trainer(METHODS["galore"], arguments(tmp_path), model=llama(num_hidden_layers=3))
    with pytest.raises(lr.CheckpointError, match="num_hidden_layers is 2 there, 3 here"):
        lr.check_resume(checkpoints / "galore" / "checkpoint-2", trainer.model)
    lr.check_resume(
        checkpoints / "galore" / "checkpoint-2", make_trainer(METHODS["galore"], arguments(tmp_path)).model
    )


def test_a_support_drawn_with_another_seed_is_refused(checkpoints, tmp_path):
    trainer = make_trainer(METHODS["sltrain"], arguments(tmp_path, max_steps=4, seed=2))
    with pytest.raises(ValueError, match="sparse_support"):
        trainer.train(resume_from_checkpoint=str(checkpoints / "sltrain" / "checkpoint-2"))


def test_a_plain_trainers_checkpoint_goes_on_as_full_rank(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    plain = Trainer(model=llama(), args=arguments(tmp_path, **saving), train_dataset=dataset())
    plain.train()
    trainer = make_trainer(lr.FullRankConfig(), arguments(tmp_path, **saving))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for key, tensor in weights(trainer.model).items():
        assert torch.equal(tensor, plain.model.state_dict()[key])


def test_full_rank_is_trainers_own_adamw(tmp_path):
    mine = final_weights(lr.FullRankConfig(), arguments(tmp_path))
    plain = Trainer(model=llama(), args=arguments(tmp_path), train_dataset=dataset())
    plain.train()
    for key, tensor in mine.items():
        assert torch.equal(tensor, plain.model.state_dict()[key])


def test_a_trainer_with_another_model_is_an_error(tmp_path):
    args = arguments(tmp_path)
    _, trainer_kwargs = lr.prepare(llama(), METHODS["galore"], args)
    trainer = Trainer(model=llama(), args=args, train_dataset=dataset(), **trainer_kwargs)
    with pytest.raises(ValueError, match="give the Trainer the model that prepare returned"):
        trainer.train()


def test_two_trainers_can_share_what_prepare_returned(tmp_path):
    args = arguments(tmp_path)
    model, trainer_kwargs = lr.prepare(llama(), METHODS["galore"], args)
    for _ in range(2):
        trainer = Trainer(model=model, args=args, train_dataset=dataset(), **trainer_kwargs)
        assert any("r" in group for group in trainer.create_optimizer().param_groups)


def test_non_finite_gradients_do_not_reach_the_projected_weights(tmp_path, caplog):
    trainer = make_trainer(METHODS["galore"], arguments(tmp_path, max_steps=3, max_grad_norm=0.0))

    def poison(grad):
        return torch.full_like(grad, float("nan"))

    handle = trainer.model.model.layers[0].mlp.up_proj.weight.register_hook(poison)
    with caplog.at_level(logging.WARNING, logger="hf_lowrank"):
        trainer.train()
    handle.remove()
    assert all(torch.isfinite(tensor).all() for tensor in weights(trainer.model).values())
    assert "not finite" in caplog.text
