"""TRL's trainers, on data and a tokenizer made here: what trains is what the config says, however they are made."""

import pytest
import torch
from datasets import Dataset
from tiny_runs import METHODS, llama, weights
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

import hf_lowrank as lr

WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def text(i, words=4):
    return " ".join(WORDS[(i + 7 * k) % len(WORDS)] for k in range(words))


ROWS = range(16)
PROMPTS = [text(i) for i in ROWS]
ANSWERS = [" " + text(i + 28) for i in ROWS]
KINDS = {
    "sft": (SFTTrainer, SFTConfig, {"text": [text(i, 12) for i in ROWS]}, {}),
    "dpo": (DPOTrainer, DPOConfig, {"prompt": PROMPTS, "chosen": ANSWERS, "rejected": ANSWERS[::-1]}, {}),
    "kto": (
        KTOTrainer,
        KTOConfig,
        {"prompt": PROMPTS, "completion": ANSWERS, "label": [i % 2 == 0 for i in ROWS]},
        {},
    ),
    "grpo": (GRPOTrainer, GRPOConfig, {"prompt": PROMPTS}, {"num_generations": 2, "max_completion_length": 4}),
}


def word_lengths(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def trained(kind, method, folder, tokenizer, resume=None):
    """Four steps, saved after two, as README has it for every Trainer; the Trainer and the model's first weights."""
    trainer_cls, config_cls, rows, more = KINDS[kind]
    args = config_cls(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1,
        save_strategy="steps", save_steps=2, report_to="none", use_cpu=True, bf16=False, seed=1, **more,
    )  # fmt: skip
    args.disable_tqdm = True
    model, trainer_kwargs = lr.prepare(llama(), METHODS[method], args)
    before = weights(model)
    # the only one that takes them: attach hands them on to the others
    given = trainer_kwargs if kind == "sft" else {}
    if kind == "grpo":
        given["reward_funcs"] = word_lengths
    if kind in ("dpo", "kto"):
        given["ref_model"] = llama()
    dataset = Dataset.from_dict(rows)
    trainer = trainer_cls(model=model, args=args, train_dataset=dataset, processing_class=tokenizer, **given)
    lr.attach(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, before


@pytest.mark.parametrize("method", ["galore", "relora"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_trainer_of_trl_trains_with_the_method_and_goes_on(kind, method, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_lowrank.run.report.draw_figures", lambda publish: [])
    trainer, before = trained(kind, method, tmp_path / "run", tokenizer)
    whole, config = weights(trainer.model), METHODS[method]
    assert any(not torch.equal(tensor, before[name]) for name, tensor in whole.items())
    optimizer = trainer.optimizer.optimizer
    projected = [group for group in optimizer.param_groups if "r" in group]
    if method == "galore":
        assert type(optimizer).__mro__[1] is lr.optim.GaLoreAdamW
        assert {(group["r"], group["update_proj_gap"]) for group in projected} == {(config.r, config.update_proj_gap)}
    else:
        restarts = [entry["step"] for entry in trainer.state.log_history if "relora/restarts" in entry]
        assert restarts == [config.reset_every]
    report = lr.load_report(tmp_path / "run").run
    assert (report.method, report.optimizer.name, report.steps) == (method, type(optimizer).__name__, 4)
    assert report.optimizer_state_bytes.predicted == report.optimizer_state_bytes.measured
    assert report.learning_rate == 1e-2
    resumed, _ = trained(kind, method, tmp_path / "resumed", tokenizer, str(tmp_path / "run" / "checkpoint-2"))
    again = weights(resumed.model)
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def test_a_trainer_of_trl_without_attach_makes_no_step(tokenizer, tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True, bf16=False)
    model, _ = lr.prepare(llama(), METHODS["galore"], args)
    dataset = Dataset.from_dict(KINDS["sft"][2])
    trainer = SFTTrainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer)
    with pytest.raises(ValueError, match="config says GaLore, but AdamW would train it"):
        trainer.train()
