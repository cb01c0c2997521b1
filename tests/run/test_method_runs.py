"""What trains a model is what its config, report and card say, or training does not start."""

import gc
import io
import pickle
import weakref

import pytest
import torch
from accelerate import Accelerator
from tiny_runs import METHODS, arguments, dataset, llama, make_trainer, projected, restarted
from torch.optim.optimizer import _global_optimizer_pre_hooks
from toy_method import ToyConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
)

import hf_lowrank as lr
from hf_lowrank.checkpoints import export
from hf_lowrank.methods.first_step import _UNCHECKED, _check
from hf_lowrank.methods.prepare import method_of
from hf_lowrank.methods.targets import find_targets

CONFIGS = {**METHODS, "toy": ToyConfig(r=4, update_proj_gap=3)}
OWN = [name for name, config in CONFIGS.items() if projected(config)]
CHANGED = [name for name, config in CONFIGS.items() if projected(config) or config.replaces_layers]


@pytest.fixture(scope="module", autouse=True)
def _registered(toy_method):
    """The toy is registered in these tests."""


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr("hf_lowrank.run.report.draw_figures", lambda *args, **kwargs: None)


class OwnOptimizer(Trainer):
    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-3)
        return self.optimizer


class TakesWhatever(Seq2SeqTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


@pytest.mark.parametrize("method", OWN)
def test_a_projected_method_that_was_not_handed_on_is_refused_by_attach(method, tmp_path):
    args = arguments(tmp_path)
    model, _ = lr.prepare(llama(), CONFIGS[method], args)
    trainer = Trainer(model=model, args=args, train_dataset=dataset())
    label = CONFIGS[method].label
    with pytest.raises(ValueError, match=rf"config says {label}, but AdamW would train it: .*\*\*trainer_kwargs"):
        lr.attach(trainer)


@pytest.mark.parametrize("method", OWN)
def test_a_trainer_that_makes_an_optimizer_of_its_own_does_not_start(method, tmp_path):
    args = arguments(tmp_path)
    model, trainer_kwargs = lr.prepare(llama(), CONFIGS[method], args)
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer = OwnOptimizer(model=model, args=args, train_dataset=dataset(), **trainer_kwargs)
    lr.attach(trainer)
    with pytest.raises(ValueError, match=f"config says {CONFIGS[method].label}, but AdamW .*leave create_optimizer"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_method_without_its_callback_is_refused_by_attach(tmp_path):
    args = arguments(tmp_path)
    config = next(config for config in CONFIGS.values() if restarted(config))
    model, trainer_kwargs = lr.prepare(llama(), config, args)
    (callback,) = trainer_kwargs.pop("callbacks")
    with pytest.raises(ValueError, match=f"config says {config.label}, .*{type(callback).__name__} is missing"):
        lr.attach(Trainer(model=model, args=args, train_dataset=dataset(), **trainer_kwargs))
    callback.config = type(config)(r=4, reset_every=5, restart_warmup_steps=1)
    trainer = Trainer(model=model, args=args, train_dataset=dataset(), **trainer_kwargs, callbacks=[callback])
    with pytest.raises(ValueError, match=f"{type(callback).__name__} has other settings"):
        lr.attach(trainer)


# Without attach


NOT_HANDED_ON = {name: config for name, config in CONFIGS.items() if projected(config) or restarted(config)}
NOT_HANDED_ON["rated"] = lr.LoRAConfig(r=4, other_lr_scale=0.1)


@pytest.mark.parametrize("method", NOT_HANDED_ON)
@pytest.mark.parametrize("trainer_cls", [Trainer, OwnOptimizer])
def test_a_method_that_was_not_handed_on_makes_no_step(method, trainer_cls, tmp_path):
    config = NOT_HANDED_ON[method]
    args = arguments(tmp_path)
    model, _ = lr.prepare(llama(), config, args)
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer = trainer_cls(model=model, args=args, train_dataset=dataset(), eval_dataset=dataset())
    trainer.evaluate()
    why = "the optimizer knows nothing of other_lr_scale=0.1"
    if projected(config) or restarted(config):
        why = "AdamW would train it" if projected(config) else "the Trainer's .* is missing"
    with pytest.raises(ValueError, match=rf"config says {config.label}, but {why}: .*FullRankConfig"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


class Wrapper(torch.optim.Optimizer):
    """As optimizers that average weights or look ahead are made: it shares the groups of the optimizer inside."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, inner.defaults)
        self.inner = inner

    def step(self, closure=None):
        self.inner.step(closure)


WRAPPED = {
    "bare": lambda optimizer: optimizer,
    "accelerate": lambda optimizer: Accelerator(cpu=True).prepare(optimizer),
    "wrapper": Wrapper,
}


def step(model, optimizer):
    model(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long)).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_a_loop_of_ones_own_steps_with_the_methods_optimizer_alone(wrapped, tmp_path):
    config = METHODS["galore"]
    model, trainer_kwargs = lr.prepare(llama(), config, arguments(tmp_path))
    with pytest.raises(ValueError, match="config says GaLore, but AdamW would train it"):
        step(model, WRAPPED[wrapped](torch.optim.AdamW(model.parameters())))
    # another model's optimizer
    other = llama()
    step(other, torch.optim.AdamW(other.parameters()))
    optimizer_cls, kwargs = trainer_kwargs["optimizer_cls_and_kwargs"]
    optimizer = WRAPPED[wrapped](optimizer_cls(model.parameters(), **kwargs))
    torch.optim.lr_scheduler.LambdaLR(getattr(optimizer, "optimizer", optimizer), lambda step: 1.0)
    step(model, optimizer)
    assert model not in _UNCHECKED
    # nothing is left in PyTorch once every model is checked
    _UNCHECKED.clear()
    step(model, optimizer)
    assert _check not in _global_optimizer_pre_hooks.values()


def test_a_model_that_awaits_its_first_step_is_not_kept_alive(tmp_path):
    model, _ = lr.prepare(llama(), METHODS["galore"], arguments(tmp_path))
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_an_optimizer_of_the_method_with_other_settings_does_not_start(tmp_path):
    args = arguments(tmp_path)
    model, _ = lr.prepare(llama(), lr.GaLoreConfig(r=4), args)
    optimizer = lr.optim.GaLoreAdamW(model.parameters(), lr=1e-2)
    trainer = Trainer(model=model, args=args, train_dataset=dataset(), optimizers=(optimizer, None))
    lr.attach(trainer)
    with pytest.raises(ValueError, match="q_proj would be trained with .*=None"):
        trainer.train()


def test_a_config_that_names_layers_which_the_model_lacks_does_not_start(tmp_path):
    args = arguments(tmp_path)
    prepared, _ = lr.prepare(llama(), METHODS["lora"], args)
    model = type(prepared)(prepared.config)
    trainer = Trainer(model=model, args=args, train_dataset=dataset())
    lr.attach(trainer)
    with pytest.raises(ValueError, match="config says LoRA, but .*q_proj is a plain Linear"):
        trainer.train()


@pytest.mark.parametrize("method", ["lora", "sltrain", "galore"])
def test_a_published_model_that_is_trained_on_plainly_is_full_rank_or_refused(method, tmp_path):
    model, _ = lr.prepare(llama(), METHODS[method], arguments(tmp_path))
    dense = lr.to_dense(model)
    trainer = Trainer(model=dense, args=arguments(tmp_path, max_steps=1), train_dataset=dataset())
    if method == "galore":
        with pytest.raises(ValueError, match="to train the model full-rank, prepare it with FullRankConfig"):
            lr.attach(trainer)
        return
    lr.attach(trainer)
    trainer.train()
    assert lr.load_report(tmp_path).run.method == method_of(dense).method == "fullrank"


@pytest.mark.parametrize("initialised", [False, True], ids=["model", "model_init"])
@pytest.mark.parametrize("method", CHANGED)
def test_what_prepare_returned_is_refused_with_another_model(method, initialised, tmp_path):
    args = arguments(tmp_path)
    _prepared, trainer_kwargs = lr.prepare(llama(), CONFIGS[method], args)
    given = {"model_init": lambda: llama()} if initialised else {"model": llama()}
    trainer = Trainer(**given, args=args, train_dataset=dataset(), **trainer_kwargs)
    with pytest.raises(
        ValueError, match=rf"not prepared.*'{CONFIGS[method].method}'.*the model that prepare returned"
    ):
        trainer.train()
    assert trainer.state.global_step == 0


def test_what_prepare_returned_for_another_method_is_refused(tmp_path):
    args = arguments(tmp_path)
    _galore, trainer_kwargs = lr.prepare(llama(), METHODS["galore"], args)
    model, _ = lr.prepare(llama(), METHODS["lora"], args)
    with pytest.raises(ValueError, match="prepared for 'lora', .* returned for 'galore'"):
        Trainer(model=model, args=args, train_dataset=dataset(), **trainer_kwargs).create_optimizer()


# What Trainer's arguments say when it makes its optimizer


@pytest.mark.parametrize("method", CONFIGS)
def test_a_model_init_that_prepares_is_trained_with_the_arguments_of_that_time(method, tmp_path):
    args = arguments(tmp_path, max_steps=1, warmup_steps=0)

    def model_init():
        return lr.prepare(llama(), CONFIGS[method], args)[0]

    _, trainer_kwargs = lr.prepare(llama(), CONFIGS[method], args)
    data = dict(train_dataset=dataset(), eval_dataset=dataset(8))
    trainer = Trainer(model_init=model_init, args=args, **data, **trainer_kwargs)
    lr.attach(trainer)
    losses = set()
    for rate, beta in ((1e-9, 0.5), (1e-2, 0.6)):
        # as a search does between its trials
        args.learning_rate, args.adam_beta1, args.weight_decay = rate, beta, rate
        trainer.train()
        groups = trainer.optimizer.optimizer.param_groups
        rates = {rate, rate * CONFIGS[method].other_lr_scale}
        assert {group["initial_lr"] for group in groups} == rates
        assert {group["betas"][0] for group in groups} == {beta}
        assert {group["weight_decay"] for group in groups} == {rate, 0.0}
        assert any("r" in group for group in groups) == projected(CONFIGS[method])
        losses.add(trainer.evaluate()["eval_loss"])
    assert len(losses) == 2


def test_an_optimizer_that_is_named_after_prepare_is_refused(tmp_path):
    args = arguments(tmp_path)
    trainer = make_trainer(METHODS["lora"], args)
    args.optim = "sgd"
    with pytest.raises(ValueError, match="makes a SGD and no AdamW: set it before prepare"):
        trainer.create_optimizer()


@pytest.mark.parametrize("trainer_cls", [Seq2SeqTrainer, TakesWhatever])
@pytest.mark.parametrize("method", CONFIGS)
def test_attach_hands_the_method_on_where_a_trainer_cannot_take_it(method, trainer_cls, tmp_path):
    values = arguments(tmp_path, max_steps=2).to_dict()
    args = Seq2SeqTrainingArguments(
        **{key: values[key] for key in ("output_dir", "max_steps", "report_to", "use_cpu")}
    )
    config = CONFIGS[method]
    model, trainer_kwargs = lr.prepare(llama(), config, args)
    with pytest.raises(TypeError, match="optimizer_cls_and_kwargs"):
        trainer_cls(model=model, args=args, train_dataset=dataset(), **trainer_kwargs)
    trainer = trainer_cls(model=model, args=args, train_dataset=dataset())
    lr.attach(trainer)
    args.learning_rate = 2e-3
    assert any("r" in group for group in trainer.create_optimizer().param_groups) == projected(config)
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {2e-3, 2e-3 * config.other_lr_scale}
    if trainer_cls is Seq2SeqTrainer and method in ("galore", "relora"):
        trainer.train()
        assert lr.load_report(tmp_path).run.optimizer.name == type(trainer.optimizer.optimizer).__name__


@pytest.mark.parametrize("method", CONFIGS)
def test_a_prepared_model_can_be_pickled(method, tmp_path):
    args = arguments(tmp_path)
    model, _ = lr.prepare(llama(), CONFIGS[method], args)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for copied in (torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(model))):
        assert all(torch.equal(copied.state_dict()[name], t) for name, t in model.state_dict().items())
        # it is prepared again where it is trained, which changes nothing
        again, trainer_kwargs = lr.prepare(copied, CONFIGS[method], args)
        assert again is copied
        Trainer(model=copied, args=args, train_dataset=dataset(), **trainer_kwargs).create_optimizer()


# Frozen layers


@pytest.mark.parametrize("method", OWN)
def test_a_projected_method_whose_targets_are_all_frozen_is_refused(method, tmp_path):
    model = llama()
    model.model.layers.requires_grad_(False)
    with pytest.raises(ValueError, match=f"all 14 target layers are frozen, .*{CONFIGS[method].label} would train"):
        lr.prepare(model, CONFIGS[method], arguments(tmp_path))
    assert method_of(model) is None


def test_what_is_frozen_after_prepare_is_named(tmp_path):
    trainer = make_trainer(METHODS["galore"], arguments(tmp_path))
    trainer.model.model.layers[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"layers\.0\.\S+ was frozen after prepare \(7 target weights in all\)"):
        trainer.create_optimizer()


# What a model and a run keep


@pytest.mark.parametrize("method", ["fullrank", "galore", "lora", "relora", "sltrain", "cola"])
def test_several_ends_of_sequence_survive(method, tmp_path):
    model, _ = lr.prepare(llama(), CONFIGS[method], arguments(tmp_path))
    model.generation_config.eos_token_id = [3, 5]
    export(model, tmp_path / "publish")
    loaded = lr.from_pretrained(tmp_path / "publish")
    assert loaded.generation_config.eos_token_id == [3, 5]
    if CONFIGS[method].has_dense_form:
        for dense in (lr.to_dense(model), lr.from_pretrained(tmp_path / "publish", dense=True)):
            assert dense.generation_config.eos_token_id == [3, 5]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "publish", trust_remote_code=True)
    assert plain.generation_config.eos_token_id == [3, 5]


def test_tokens_are_counted_and_the_log_is_that_of_a_plain_trainer(tmp_path):
    def logged(attached):
        trainer = Trainer(model=llama(), args=arguments(tmp_path, max_steps=2), train_dataset=dataset())
        if attached:
            lr.attach(trainer)
        trainer.train()
        return [set(entry) for entry in trainer.state.log_history]

    assert logged(True) == logged(False)
    assert lr.load_report(tmp_path).run.tokens_seen == 2 * 4 * 16


def test_the_report_has_the_batch_that_was_used(tmp_path):
    class OutOfMemoryOnce(Trainer):
        def training_step(self, *args, **kwargs):
            if self._train_batch_size == 4:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(*args, **kwargs)

    args = arguments(tmp_path, max_steps=2, auto_find_batch_size=True)
    trainer = OutOfMemoryOnce(model=llama(), args=args, train_dataset=dataset())
    lr.attach(trainer)
    trainer.train()
    used = trainer._train_batch_size
    assert used < 4
    batch = lr.load_report(tmp_path).run.batch
    assert (batch.per_device, batch.global_sequences) == (used, used)


def test_a_run_that_saves_its_models_alone_does_not_start_anew_without_a_word(tmp_path):
    args = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1, save_only_model=True)
    Trainer(model=llama(), args=args, train_dataset=dataset()).train()
    with pytest.raises(lr.CheckpointError, match="checkpoint-2 was saved with save_only_model"):
        lr.last_checkpoint(tmp_path)


SGDNotAdamW = type("SGDNotAdamW", (torch.optim.SGD,), {})
OwnOne = type("OwnOne", (torch.optim.AdamW,), {})


@pytest.mark.parametrize(
    ("method", "optimizer_cls", "options", "predicted"),
    [
        ("fullrank", torch.optim.Adam, {}, True),
        ("fullrank", OwnOne, {}, True),
        ("fullrank", torch.optim.AdamW, {"amsgrad": True}, False),
        ("fullrank", SGDNotAdamW, {}, False),
        ("lora", torch.optim.AdamW, {}, True),
        ("galore", None, {}, True),
    ],
)
def test_state_is_predicted_of_what_the_optimizer_is(method, optimizer_cls, options, predicted, tmp_path):
    args = arguments(tmp_path, max_steps=1)
    model, trainer_kwargs = lr.prepare(llama(), METHODS[method], args)
    if optimizer_cls is not None:
        trained = [p for p in model.parameters() if p.requires_grad]
        trainer_kwargs = {"optimizers": (optimizer_cls(trained, lr=1e-3, **options), None)}
    trainer = Trainer(model=model, args=args, train_dataset=dataset(), **trainer_kwargs)
    lr.attach(trainer)
    trainer.train()
    state = lr.load_report(tmp_path).run.optimizer_state_bytes
    assert (state.predicted == state.measured) == predicted
    assert predicted or state.predicted is None


def test_all_linear_leaves_a_classification_head_out():
    llama_config = llama().config
    llama_config.pad_token_id = 0
    model = AutoModelForSequenceClassification.from_config(llama_config)
    names = [target.name for target in find_targets(model, "all-linear")]
    assert len(names) == 14
    assert "score" not in names
