"""`attach` and the report: what is in it, when it is written, and that it never ends somebody's run."""

import gc
import json
import logging
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import peft
import pytest
import torch
from datasets import Dataset
from tiny_runs import LENGTH, METHODS, VOCABULARY, arguments, dataset, gpt2, llama, make_trainer, weights
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertLMHeadModel,
    DataCollatorWithFlattening,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

import hf_lowrank as lr
from hf_lowrank.families.records import metrics_folder, read_measurement
from hf_lowrank.metrics.sequences import EvaluationSet
from hf_lowrank.report.io import read_report, validate_report
from hf_lowrank.report.model import details
from hf_lowrank.run import facts
from hf_lowrank.run.report import ReportCallback

SAVING = dict(save_strategy="steps", save_steps=2)
NO_FIGURES = ("hf_lowrank.run.report.draw_figures", lambda publish: [])


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """Every Trainer collects garbage: not among all that was ever imported, which takes it most of a second."""
    gc.freeze()


@pytest.fixture
def no_figures(monkeypatch):
    """Drawing takes seconds; the tests that look at figures do without this."""
    monkeypatch.setattr(*NO_FIGURES)


def foreign(args, model=None, train=None, evaluation=None, **kwargs):
    """A stock Trainer, attached."""
    trainer = Trainer(
        model=gpt2() if model is None else model,
        args=args,
        train_dataset=dataset() if train is None else train,
        eval_dataset=evaluation,
    )
    lr.attach(trainer, **kwargs)
    return trainer


def metrics(folder):
    return {(m["name"], m["step"]): m for m in lr.load_report(folder)["metrics"]}


class At(TrainerCallback):
    """Calls something at the end of a step, before anything is saved."""

    def __init__(self, step, call):
        self.step, self.call = step, call

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.call()


# A whole run, looked at from all sides


@pytest.fixture(scope="module")
def foreign_run(tmp_path_factory):
    """A stock Trainer on GPT-2, attached, with metrics, checkpoints and figures: (folder, trainer)."""
    folder = tmp_path_factory.mktemp("foreign")
    args = arguments(
        folder, max_steps=4, gradient_accumulation_steps=2, data_seed=5, learning_rate=3e-3, adam_beta2=0.95,
        adam_epsilon=1e-7, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.1}, **SAVING,
    )  # fmt: skip
    trainer = Trainer(model=gpt2(), args=args, train_dataset=dataset(), eval_dataset=dataset(8, seed=1))
    lr.attach(trainer, lr.SpectralCallback(every=2), run=lr.RunInfo(name="mine", model_size="tiny", license="mit"))
    trainer.train()
    return folder, trainer


@pytest.fixture(scope="module")
def sltrain_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sltrain")
    trainer = make_trainer(METHODS["sltrain"], arguments(folder, max_steps=4, **SAVING))
    lr.attach(trainer, lr.SpectralCallback(every=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*NO_FIGURES)
        trainer.train()
    return folder, trainer


def test_a_foreign_run_has_a_valid_report(foreign_run):
    folder, _ = foreign_run
    report = json.loads((folder / "publish" / "report.json").read_text())
    validate_report(report)
    assert lr.load_report(folder) == report
    assert report["data"] is None
    assert report["run"]["method"] == "fullrank"
    assert report["run"]["method_config"] == {
        "method": "fullrank", "target_modules": None, "other_lr_scale": 1.0,
    }  # fmt: skip


def test_the_facts(foreign_run):
    folder, _ = foreign_run
    run = lr.load_report(folder)["run"]
    assert (run["steps"], run["max_steps"]) == (4, 4)
    # steps, micro-batches a step, sequences, tokens
    assert run["tokens_seen"] == 4 * 2 * 4 * LENGTH
    assert run["batch"] == {"per_device": 4, "gradient_accumulation": 2, "world_size": 1, "global_sequences": 8}
    assert run["learning_rate"] == 3e-3
    assert run["lr_schedule"] == {"type": "cosine_with_min_lr", "warmup_steps": 2, "min_lr_rate": 0.1}
    assert run["seeds"] == {"seed": 1, "data_seed": 5}
    assert run["optimizer"] == {
        "name": "AdamW", "betas": [0.9, 0.95], "eps": 1e-7, "weight_decay": 0.1, "max_grad_norm": 1.0,
        "other_lr_scale": 1.0,
    }  # fmt: skip
    # 64 x 16 tied embedding, 32 x 16 positions, two blocks of 3072 + 144 biases + 64, the last norm's 32
    assert run["model"]["parameters"] == run["model"]["parameters_trained"] == 1024 + 512 + 2 * 3280 + 32
    assert (run["model"]["architecture"], run["model"]["size"]) == ("gpt2", "tiny")
    assert (run["name"], run["license"], run["command"]) == ("mine", "mit", None)
    assert (run["precision"], run["world_size"]) == ("float32", 1)
    assert run["versions"]["torch"] == torch.__version__
    assert run["versions"]["hf_lowrank"] == lr.__version__
    assert run["peak_memory_bytes"]["value"] > 1e8
    assert run["flops"] > 0
    assert 0 < run["wall_time_seconds"] < 300


@pytest.mark.parametrize("which", ["foreign_run", "sltrain_run"])
def test_the_measured_state_is_the_predicted(which, request):
    folder, trainer = request.getfixturevalue(which)
    state = lr.load_report(folder)["run"]["optimizer_state_bytes"]
    held = sum(v.numel() * v.element_size() for s in trainer.optimizer.state.values() for v in s.values())
    assert state["measured"] == state["predicted"] == held
    assert (state["adamw"] == held) == (which == "foreign_run")


def own_loss(trainer):
    """The model's own loss; trainer.evaluate() may divide by the unshifted labels, after model and version."""
    ids = torch.tensor(dataset(8, seed=1)["input_ids"][:])
    with torch.no_grad():
        return trainer.model.eval()(input_ids=ids, labels=ids).loss.item()


def test_perplexity_and_its_error(sltrain_run):
    folder, trainer = sltrain_run
    own = own_loss(trainer)
    found = metrics(folder)
    loss, perplexity = found["validation_loss", 4], found["perplexity", 4]
    assert loss["value"] == pytest.approx(own, rel=1e-5)
    assert perplexity["value"] == pytest.approx(math.exp(own), rel=1e-4)
    assert perplexity["stderr"] == pytest.approx(perplexity["value"] * loss["stderr"])
    assert loss["stderr"] > 0
    # as `hf-lowrank measure` has it of the same rows
    assert loss["settings"] == EvaluationSet.from_dataset(dataset(8, seed=1)).settings()
    assert (loss["settings"]["sequences"], loss["settings"]["tokens"]) == (8, 8 * (LENGTH - 1))
    assert loss["about"] == {"stderr": "over sequences", "dof": 7}
    samples = {
        record.name: record.samples for record in read_measurement(metrics_folder(folder), "validation").records
    }
    assert samples["validation_loss"].value == loss["value"]
    assert samples["validation_loss"].units == EvaluationSet.from_dataset(dataset(8, seed=1)).units()
    assert samples["perplexity"].error()[0] == pytest.approx(perplexity["stderr"])


def test_perplexity_is_that_of_the_models_own_loss(foreign_run):
    folder, trainer = foreign_run
    own = own_loss(trainer)
    assert metrics(folder)["validation_loss", 4]["value"] == pytest.approx(own, rel=1e-5)
    assert metrics(folder)["perplexity", 4]["value"] == pytest.approx(math.exp(own), rel=1e-4)


def test_the_report_holds_what_the_callbacks_measured(foreign_run):
    folder, _ = foreign_run
    found = metrics(folder)
    assert {step for name, step in found if name == "spectral/weight/stable_rank"} == {0, 2, 4}
    stored = json.loads((folder / "publish" / "metrics" / "spectral.json").read_text())
    for record in stored:
        entry = found[record["name"], record["step"]]
        assert details(entry) == details(record)
        for field in ("value", "stderr", "space"):
            assert entry[field] == record[field]


def test_publish_is_complete(foreign_run, sltrain_run):
    common = {
        "README.md", "report.json", "config.json", "generation_config.json", "model.safetensors",
        "metrics/spectral.json", "metrics/spectral.parquet", "metrics/training.parquet", "metrics/validation.json",
        "metrics/validation.samples.parquet",
    }  # fmt: skip
    figures = {f"figures/{name}.png" for name in ("loss", "spectra_over_depth", "spectra_over_steps")}
    native = {"native/config.json", "native/generation_config.json", "native/model.safetensors"}
    for (folder, _), more in ((foreign_run, figures), (sltrain_run, {*native, "lowrank_config.json"})):
        publish = folder / "publish"
        assert {path.relative_to(publish).as_posix() for path in publish.rglob("*") if path.is_file()} == common | more
        card = (publish / "README.md").read_text()
        assert "| Validation perplexity (`perplexity`) |" in card
        assert ("figures/loss.png" in card) == (more is figures)


def test_what_is_published_loads(foreign_run, sltrain_run):
    ids = torch.arange(24).view(2, 12)
    for folder, trainer in (foreign_run, sltrain_run):
        expected = weights(trainer.model)
        for source in (folder, folder / "publish"):
            loaded = lr.from_pretrained(source)
            assert all(torch.equal(tensor, expected[key]) for key, tensor in weights(loaded).items())
            assert type(loaded) is type(trainer.model)
        with torch.no_grad():
            logits = trainer.model.eval()(ids).logits
            for dense in (
                lr.from_pretrained(folder, dense=True),
                AutoModelForCausalLM.from_pretrained(folder / "publish"),
            ):
                assert (dense.eval()(ids).logits - logits).abs().max() < 1e-4


def test_the_training_curve(foreign_run):
    folder, trainer = foreign_run
    curve = pd.read_parquet(folder / "publish" / "metrics" / "training.parquet")
    assert list(curve.columns) == ["step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm"]
    assert list(curve["step"]) == [0, 1, 2, 3, 4]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert list(curve["loss"].dropna()) == losses
    assert len(losses) == 4


def test_the_measured_sizes_are_shown_at_the_end(tmp_path, capsys, no_figures):
    foreign(arguments(tmp_path, max_steps=1)).train()
    shown = capsys.readouterr().out
    for text in ("step 1", "Optimizer state", "63.61 KiB", "Peak memory", "Tokens seen", "Wall time"):
        assert text in shown, text


# Attaching


def test_attaching_twice_is_an_error(tmp_path):
    trainer = foreign(arguments(tmp_path))
    with pytest.raises(ValueError, match="attached already: give all callbacks to one call of attach"):
        lr.attach(trainer, lr.SpectralCallback())
    assert not any(isinstance(c, lr.SpectralCallback) for c in trainer.callback_handler.callbacks)


@pytest.mark.parametrize("callback", [lr.SpectralCallback, "spectral", None])
def test_only_callbacks_are_attached(callback, tmp_path):
    trainer = Trainer(model=gpt2(), args=arguments(tmp_path), train_dataset=dataset())
    with pytest.raises(ValueError, match=r"is no TrainerCallback: give instances, SpectralCallback\(every=500\)"):
        lr.attach(trainer, callback)


# When it is written


def test_the_report_is_there_after_a_save(tmp_path, no_figures):
    seen = []

    def look():
        report = read_report(tmp_path)
        assert not report.run.stopped_early
        seen.append((report["run"]["steps"], report["run"]["max_steps"], report["run"]["tokens_seen"]))

    trainer = foreign(arguments(tmp_path, max_steps=5, **SAVING))
    trainer.add_callback(At(1, lambda: seen.append((tmp_path / "publish" / "report.json").exists())))
    trainer.add_callback(At(3, look))
    trainer.train()
    assert seen == [False, (2, 5, 2 * 4 * LENGTH)]
    assert read_report(tmp_path)["run"]["steps"] == 5
    assert read_report(tmp_path).run.checkpoint_of is None


def test_a_run_that_stopped_early_says_so(tmp_path, no_figures):
    trainer = foreign(arguments(tmp_path, max_steps=5, **SAVING))
    trainer.add_callback(At(3, lambda: setattr(trainer.control, "should_training_stop", True)))
    trainer.train()
    assert read_report(tmp_path).run.stopped_early
    assert "Training stopped at step 3 of 5." in (tmp_path / "publish" / "README.md").read_text()


def test_wall_time_goes_on_over_a_resume(tmp_path, no_figures):
    def kill():
        raise KeyboardInterrupt

    trainer = foreign(arguments(tmp_path, max_steps=4, **SAVING))
    trainer.add_callback(At(3, kill))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    path = tmp_path / "publish" / "report.json"
    report = json.loads(path.read_text())
    assert report["run"]["steps"] == 2
    report["run"]["wall_time_seconds"] += 1000
    path.write_text(json.dumps(report))
    trainer = foreign(arguments(tmp_path, max_steps=4, **SAVING))
    trainer.train(resume_from_checkpoint=True)
    run = read_report(tmp_path)["run"]
    assert 1000 < run["wall_time_seconds"] < 1300
    assert run["steps"] == 4
    assert run["tokens_seen"] == 4 * 4 * LENGTH
    # a new run has a new clock
    foreign(arguments(tmp_path, max_steps=1)).train()
    assert read_report(tmp_path)["run"]["wall_time_seconds"] < 300


def test_a_report_that_cannot_be_read_costs_the_earlier_time_alone(tmp_path, no_figures):
    foreign(arguments(tmp_path, max_steps=2, **SAVING)).train()
    (tmp_path / "publish" / "report.json").write_text("{")
    foreign(arguments(tmp_path, max_steps=3, **SAVING)).train(resume_from_checkpoint=True)
    assert read_report(tmp_path)["run"]["steps"] == 3


def test_without_a_validation_set_there_is_no_perplexity(tmp_path, no_figures):
    foreign(arguments(tmp_path, max_steps=1)).train()
    assert metrics(tmp_path) == {}
    two = foreign(arguments(tmp_path, max_steps=1), evaluation={"a": dataset(4), "b": dataset(4)})
    two.train()
    assert metrics(tmp_path) == {}


def test_a_new_run_in_an_old_folder_takes_nothing_over(tmp_path, no_figures):
    trainer = make_trainer(METHODS["sltrain"], arguments(tmp_path, max_steps=2))
    lr.attach(trainer, lr.SpectralCallback(every=1))
    trainer.train()
    assert ("perplexity", 2) in metrics(tmp_path)
    trainer = foreign(arguments(tmp_path, max_steps=1))
    trainer.train()
    assert metrics(tmp_path) == {}
    assert not (tmp_path / "publish" / "native").exists()
    assert not (tmp_path / "publish" / "lowrank_config.json").exists()
    loaded = lr.from_pretrained(tmp_path)
    assert type(loaded) is type(trainer.model)


def test_a_validation_from_beyond_the_checkpoint_is_not_taken_over(tmp_path, no_figures):
    foreign(arguments(tmp_path, max_steps=6, **SAVING), evaluation=dataset(4)).train()
    assert list(metrics(tmp_path)) == [("validation_loss", 6), ("perplexity", 6)]
    shutil.rmtree(tmp_path / "checkpoint-6")
    seen = []
    trainer = foreign(arguments(tmp_path, max_steps=6, **SAVING), evaluation=dataset(4))

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            seen.append((state.global_step, list(metrics(tmp_path))))

    trainer.add_callback(Look())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert seen == [(6, [])]
    assert list(metrics(tmp_path)) == [("validation_loss", 6), ("perplexity", 6)]


# What it must not hold


def test_no_token_is_published(tmp_path, monkeypatch, no_figures):
    token = "hf_" + "a1B2" * 9
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(sys, "argv", ["train.py", "--hub_token", token])
    foreign(arguments(tmp_path, max_steps=2, hub_token=token, **SAVING), evaluation=dataset(4)).train()
    published = [path for path in (tmp_path / "publish").rglob("*") if path.is_file()]
    assert len(published) > 4
    for path in published:
        assert token.encode() not in path.read_bytes(), path


def test_the_commit_is_that_of_a_checkout_and_of_nothing_else(tmp_path, monkeypatch):
    def git(*command):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *command], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    module = tmp_path / "env" / "hf_lowrank" / "callbacks" / "facts.py"
    module.parent.mkdir(parents=True)
    shutil.copy(Path(facts.__file__), module)
    monkeypatch.setattr(facts, "__file__", str(module))
    assert facts._git_commit() is None
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "somebody's project")
    # installed into an environment inside of a repository of its own
    assert facts._git_commit() is None
    git("add", ".")
    git("commit", "-q", "-m", "a checkout")
    assert facts._git_commit() == git("rev-parse", "HEAD")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert facts._git_commit() is None


# Any Trainer: nothing here may end somebody's run

SMALL_BERT = BertConfig(
    vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
    max_position_embeddings=32,
)  # fmt: skip


class Regression(nn.Module):
    """No PreTrainedModel, no config, no repeated blocks."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x, labels):
        y = self.linear(x).squeeze(-1)
        return {"loss": (y - labels).square().mean(), "logits": y}


def labelled(rows=32):
    return dataset(rows).remove_columns("labels").add_column("labels", [0, 1] * (rows // 2))


def points(rows=32):
    return Dataset.from_dict({"x": torch.randn(rows, 3).tolist(), "labels": torch.randn(rows).tolist()})


OTHERS = {
    "a classifier": (lambda: BertForSequenceClassification(SMALL_BERT), labelled),
    "a masked language model": (lambda: BertForMaskedLM(SMALL_BERT), dataset),
    "an encoder-decoder": (
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
        ),
        dataset,
    ),
    "a plain module": (Regression, points),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_model_that_is_no_causal_language_model(kind, tmp_path, no_figures):
    make, data = OTHERS[kind]
    trainer = foreign(arguments(tmp_path, max_steps=2, **SAVING), make(), data(), data())
    trainer.train()
    report = lr.load_report(tmp_path)
    assert report["run"]["steps"] == 2
    # its loss is none of the next token, so it has no perplexity
    assert report["metrics"] == []
    assert (tmp_path / "publish" / "model.safetensors").exists() == (kind != "a plain module")
    assert report["run"]["model"]["parameters"] == sum(p.numel() for p in trainer.model.parameters())


def test_a_causal_model_that_sees_later_tokens_has_no_validation_loss(tmp_path, caplog, no_figures):
    model = BertLMHeadModel(SMALL_BERT)
    trainer = foreign(arguments(tmp_path, max_steps=1), model, evaluation=dataset(4))
    for callback in (lr.LandscapeCallback, lr.CurvatureCallback, lr.InterpolationCallback):
        with pytest.raises(ValueError, match="BertLMHeadModel sees later tokens"):
            callback(dataset(4)).bind(trainer)
    lr.ActivationCallback(dataset(4), model).bind(trainer)
    assert trainer.train().global_step == 1
    assert "perplexity could not be measured: BertLMHeadModel sees later tokens" in caplog.text
    assert metrics(tmp_path) == {}


@pytest.mark.parametrize("how", [{}, {"return_flash_attn_kwargs": True}])
@pytest.mark.parametrize("batch", [1, 3])
def test_packed_rows_have_the_validation_loss_of_their_sequences(how, batch, tmp_path, no_figures):
    rows = [{"input_ids": row["input_ids"][: 5 + 2 * i]} for i, row in enumerate(dataset(5, seed=1))]
    rows = Dataset.from_list([{**row, "labels": row["input_ids"]} for row in rows])
    args = arguments(tmp_path, max_steps=1, per_device_eval_batch_size=batch)
    trainer = Trainer(
        llama(), args, train_dataset=rows, eval_dataset=rows, data_collator=DataCollatorWithFlattening(**how)
    )
    landscape = lr.LandscapeCallback(rows, directions=1, points=3, svd_k=())
    lr.attach(trainer, landscape)
    trainer.train()
    wanted = EvaluationSet.from_dataset(rows)
    entry = metrics(tmp_path)["validation_loss", 1]
    estimate = wanted.estimate(trainer.model.eval())
    assert entry["value"] == pytest.approx(estimate.value, rel=1e-5)
    assert entry["stderr"] == pytest.approx(estimate.stderr, rel=1e-4)
    assert entry["settings"]["tokens"] == wanted.tokens
    kept = EvaluationSet.from_dataset(pd.read_parquet(tmp_path / "evaluation.parquet").to_dict("records"))
    assert kept.tokens == landscape.evaluation(args).tokens == wanted.tokens
    assert kept(trainer.model) == pytest.approx(estimate.value, rel=1e-5)


@pytest.mark.parametrize("optim", ["adafactor", "sgd"])
def test_optimizers_with_other_settings(optim, tmp_path, no_figures):
    foreign(arguments(tmp_path, max_steps=2, optim=optim, **SAVING)).train()
    optimizer = lr.load_report(tmp_path)["run"]["optimizer"]
    assert optimizer["name"].lower() == optim
    assert optimizer["betas"] is None
    assert optimizer["eps"] is None


def test_a_run_that_diverged_has_a_report(tmp_path, no_figures):
    model = gpt2()
    model.transformer.wpe.weight.data.fill_(math.nan)
    foreign(arguments(tmp_path, max_steps=2, **SAVING), model, evaluation=dataset(4)).train()
    found = metrics(tmp_path)
    for name in ("validation_loss", "perplexity"):
        assert found[name, 2]["value"] is None
        assert found[name, 2]["about"]["note"] == "not finite: nan"


def test_one_validation_sequence_has_no_standard_error(tmp_path, no_figures):
    foreign(arguments(tmp_path, max_steps=1), evaluation=dataset(1)).train()
    entry = metrics(tmp_path)["validation_loss", 1]
    assert entry["value"] > 0
    assert entry["stderr"] is None


def test_a_validation_that_fails_is_reported_and_left_out(tmp_path, caplog, no_figures):
    # nothing to predict in any sequence
    silent = dataset(4).map(lambda row: {"labels": [-100] * LENGTH})
    with caplog.at_level(logging.WARNING, logger="hf_lowrank"):
        result = foreign(arguments(tmp_path, max_steps=1), evaluation=silent).train()
    assert result.global_step == 1
    assert "perplexity could not be measured: the evaluation set predicts no token" in caplog.text
    assert metrics(tmp_path) == {}


def test_a_report_that_cannot_be_written_does_not_end_training(tmp_path, caplog, no_figures):
    trainer = foreign(arguments(tmp_path, max_steps=4, **SAVING), run=lr.RunInfo(data={"name": "unfinished"}))

    def complete():
        next(c for c in trainer.callback_handler.callbacks if isinstance(c, ReportCallback)).info = lr.RunInfo()

    trainer.add_callback(At(3, complete))
    with caplog.at_level(logging.WARNING, logger="hf_lowrank"):
        trainer.train()
    assert "the report of step 2 could not be written" in caplog.text
    assert "data.config is missing" in caplog.text
    assert lr.load_report(tmp_path)["run"]["steps"] == 4


def test_no_log_at_all(tmp_path, no_figures):
    foreign(arguments(tmp_path, max_steps=2, logging_strategy="no", **SAVING)).train()
    curve = pd.read_parquet(tmp_path / "publish" / "metrics" / "training.parquet")
    # what Trainer says at the end whatever it is told, without a loss
    assert list(curve["step"]) == [2]
    assert curve["loss"].isna().all()


def test_llama_in_bf16(tmp_path, no_figures):
    trainer = foreign(arguments(tmp_path, max_steps=1), llama().to(torch.bfloat16), evaluation=dataset(4))
    trainer.train()
    run = lr.load_report(tmp_path)["run"]
    assert run["precision"] == "bfloat16"
    assert run["optimizer_state_bytes"]["measured"] == run["optimizer_state_bytes"]["predicted"]
    assert lr.from_pretrained(tmp_path).dtype == torch.bfloat16


# The card


def test_an_edited_card_stays_when_a_run_goes_on_and_is_set_aside_for_a_new_one(tmp_path, no_figures, caplog):
    card, aside = tmp_path / "publish" / "README.md", tmp_path / "README.edited.md"
    foreign(arguments(tmp_path, max_steps=2, **SAVING)).train()
    card.write_text(card.read_text() + "Mine.\n")
    foreign(arguments(tmp_path, max_steps=4, **SAVING)).train(resume_from_checkpoint=lr.last_checkpoint(tmp_path))
    assert card.read_text().endswith("Mine.\n")
    assert "README.md was edited since" in caplog.text
    assert not aside.exists()
    for name in ("README.edited.md", "README.edited1.md"):
        foreign(arguments(tmp_path, max_steps=2, save_strategy="no")).train()
        assert (tmp_path / name).read_text().endswith("Mine.\n")
        assert name in caplog.text
        assert "Mine." not in card.read_text()
        card.write_text(card.read_text() + "Mine.\n")


def test_a_card_says_how_to_load_what_is_there(tmp_path, no_figures):
    wrapped = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    vit = ViTForImageClassification(
        ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8)
    )
    seen = {}
    for name, model in (("llama", llama()), ("wrapped", wrapped), ("vit", vit)):
        # one folder: what an earlier run has published is not taken for a later one's
        trainer = foreign(arguments(tmp_path, max_steps=0), model)
        report = next(c for c in trainer.callback_handler.callbacks if isinstance(c, ReportCallback))
        report.write_all(report.whole_model())
        seen[name] = (tmp_path / "publish" / "README.md").read_text()
        assert (tmp_path / "publish" / "model.safetensors").exists() == (name != "wrapped")
    assert "AutoModelForCausalLM.from_pretrained(" in seen["llama"]
    assert "pipeline_tag: text-generation" in seen["llama"]
    assert "from_pretrained(" not in seen["wrapped"]
    assert "The weights are not published." in seen["wrapped"]
    assert "lr.load_report(" in seen["wrapped"]
    assert "library_name" not in seen["wrapped"]
    assert "ViTForImageClassification.from_pretrained(" in seen["vit"]
    assert "lr.from_pretrained(" in seen["vit"]
    assert "Causal" not in seen["vit"]
    assert "pipeline_tag" not in seen["vit"]
    assert "text-generation" not in seen["vit"]
