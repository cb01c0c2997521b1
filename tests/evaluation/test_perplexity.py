"""Perplexity in a Trainer's evaluation: the report's number, from batches that leave two numbers a sequence."""

import math
import re

import pytest
import torch
from datasets import Dataset
from tiny_runs import METHODS, arguments, dataset, llama, make_trainer
from toy_models import toy_config
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    set_seed,
)

from hf_lowrank.evaluation.perplexity import _warn_once, perplexity_metrics
from hf_lowrank.metrics.perplexity import losses_of_logits, perplexity
from hf_lowrank.metrics.sequences import EvaluationSet, sequence_losses

HOW = {
    "as it is": {},
    "batch by batch": {"batch_eval_metrics": True},
    "a list of batches": {"eval_do_concat_batches": False},
    "moved off the device": {"eval_accumulation_steps": 1},
}


def padded(rows=7):
    """Rows of different lengths, so that a mean over batches is another number than one over tokens."""
    columns = dataset(rows, seed=1).to_dict()
    for i, labels in enumerate(columns["labels"]):
        labels[2 + 2 * i :] = [-100] * len(labels[2 + 2 * i :])
    return Dataset.from_dict(columns)


def trainer_of(tmp_path, method="fullrank", model=None, **changes):
    args = arguments(tmp_path, per_device_eval_batch_size=3, **changes)
    return make_trainer(METHODS[method], args, model=model, **perplexity_metrics())


def expected(model, rows):
    return perplexity(EvaluationSet.from_dataset(rows).estimate(model.eval()))


@pytest.mark.parametrize("how", HOW)
def test_it_is_the_token_weighted_perplexity_of_the_report(how, tmp_path):
    trainer, rows = trainer_of(tmp_path, **HOW[how]), padded()
    for _ in range(2):
        found = trainer.evaluate(rows)
        wanted = expected(trainer.model, rows)
        assert found["eval_perplexity"] == pytest.approx(wanted.value, rel=1e-6)
        assert found["eval_perplexity_stderr"] == pytest.approx(wanted.stderr, rel=1e-5)
    assert torch.tensor(found["eval_loss"]).exp().item() != pytest.approx(wanted.value, rel=1e-4)
    assert trainer.state.log_history[-1]["eval_perplexity"] == found["eval_perplexity"]


@pytest.mark.parametrize("method", ["cola-m", "sltrain", "relora"])
def test_models_of_methods_have_it(method, tmp_path):
    trainer, rows = trainer_of(tmp_path, method), padded()
    assert trainer.evaluate(rows)["eval_perplexity"] == pytest.approx(expected(trainer.model, rows).value, rel=1e-6)


def test_other_outputs_of_a_model_are_left_out(tmp_path):
    trainer = trainer_of(tmp_path, model=llama(output_hidden_states=True, output_attentions=True))
    rows = padded()
    found = trainer.predict(rows)
    # neither logits nor hidden states of the evaluation set
    assert found.predictions.shape == (len(rows), 2)
    assert found.metrics["test_perplexity"] == pytest.approx(expected(trainer.model, rows).value, rel=1e-6)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "jamba", "gpt_oss"])
def test_a_mixture_of_experts_gives_its_auxiliary_loss_before_its_logits(model_type, tmp_path):
    config = toy_config(model_type)
    config.output_router_logits = True
    trainer = trainer_of(tmp_path, model=AutoModelForCausalLM.from_config(config), max_steps=1)
    rows = padded(3)
    for _ in range(2):
        found, wanted = trainer.evaluate(rows), expected(trainer.model, rows)
        assert found["eval_perplexity"] == pytest.approx(wanted.value, rel=1e-5)
        # one batch: the model's own loss is that of the tokens and the routers'
        columns = {key: torch.tensor(values) for key, values in rows.to_dict().items()}
        with torch.no_grad():
            auxiliary = trainer.model.eval()(**columns).aux_loss.item() * config.router_aux_loss_coef
        assert auxiliary > 0
        assert found["eval_loss"] == pytest.approx(math.log(wanted.value) + auxiliary, rel=1e-5)
        trainer.train()


def test_loss_only_means_no_perplexity(tmp_path):
    found = trainer_of(tmp_path, prediction_loss_only=True).evaluate(padded())
    assert "eval_loss" in found
    assert "eval_perplexity" not in found


def test_one_sequence_has_no_standard_error(tmp_path):
    found = trainer_of(tmp_path).evaluate(padded(1))
    assert "eval_perplexity" in found
    assert "eval_perplexity_stderr" not in found


SMALL = dict(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)


class NoGenerator(LlamaForCausalLM):
    """Shifts its labels, and says that it cannot generate, as somebody's own architecture may."""

    @classmethod
    def can_generate(cls):
        return False


ALIGNED = {
    "encoder": (BertForMaskedLM, BertConfig(**SMALL)),
    "encoder-decoder": (
        T5ForConditionalGeneration,
        T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0),
    ),
    "encoder-decoder, BART": (
        BartForConditionalGeneration,
        BartConfig(vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=24,
                   decoder_ffn_dim=24, encoder_attention_heads=2, decoder_attention_heads=2, pad_token_id=1),
    ),
    "decoder": (GPT2LMHeadModel, GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32)),
    "decoder of the encoder's kind": (BertLMHeadModel, BertConfig(**SMALL, is_decoder=True)),
    "no generator": (NoGenerator, LlamaConfig(**SMALL)),
}  # fmt: skip


@pytest.mark.parametrize("kind", ALIGNED)
def test_labels_are_aligned_as_in_the_models_own_loss(kind, tmp_path):
    make, config = ALIGNED[kind]
    set_seed(0)
    rows = dataset(6, seed=1)
    trainer = Trainer(make(config), arguments(tmp_path, per_device_eval_batch_size=6), **perplexity_metrics())
    model = trainer.model.eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
        own = model(**rows.with_format("torch")[:]).loss
    assert trainer.evaluate(rows)["eval_perplexity"] == pytest.approx(own.exp().item(), rel=1e-5)


REFUSED = {
    "bidirectional": (BertLMHeadModel, BertConfig(**SMALL), dataset, "BertLMHeadModel sees later tokens"),
    "a classifier": (
        BertForSequenceClassification,
        BertConfig(**SMALL),
        lambda n: dataset(n).remove_columns("labels").add_column("labels", [0, 1] * (n // 2)),
        r"logits of shape \(3, 2\) are none of labels \(3,\)",
    ),
}


@pytest.mark.parametrize("how", ["as it is", "batch by batch"])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_predicts_no_token_has_no_perplexity_and_the_log_says_why(kind, how, tmp_path, caplog):
    make, config, rows, message = REFUSED[kind]
    _warn_once.cache_clear()
    args = arguments(tmp_path, per_device_eval_batch_size=3, **HOW[how])
    found = Trainer(make(config), args, **perplexity_metrics()).evaluate(rows(6))
    assert "eval_loss" in found
    assert "eval_perplexity" not in found
    assert len(re.findall(f"no perplexity: {message}", caplog.text)) == 1


def test_losses_of_logits_are_those_of_the_model():
    model, batch = llama().eval(), padded().with_format("torch")[:]
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"]).logits.to(dtype)
        losses, tokens = losses_of_logits(logits, batch["labels"])
        wanted, counts = sequence_losses(model, batch)
        assert losses.dtype == torch.float64
        assert torch.allclose(losses, wanted, rtol=tolerance)
        assert torch.equal(tokens, counts)
