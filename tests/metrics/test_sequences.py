"""The evaluation set: losses without all logits at once, whatever the head does to them, on awkward data."""

import math

import pytest
import torch
from datasets import Dataset
from tiny_runs import dataset, gpt2, llama
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertGenerationConfig,
    BertGenerationDecoder,
    BertLMHeadModel,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    Gemma2Config,
    GraniteConfig,
    MixtralConfig,
    MixtralForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    XLNetConfig,
    XLNetLMHeadModel,
)

from hf_lowrank.metrics import sequences
from hf_lowrank.metrics.activations import compare_activations
from hf_lowrank.metrics.perplexity import mean_loss
from hf_lowrank.metrics.sequences import EvaluationSet, rows_digest, sequence_losses, unpacked

SMALL = dict(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=4, head_dim=4, max_position_embeddings=32,
)  # fmt: skip


def capped():
    """A model that does something to its head's output that would not show at its first weights."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(Gemma2Config(**SMALL, final_logit_softcapping=2.0))


def scaled():
    torch.manual_seed(0)
    sizes = {key: value for key, value in SMALL.items() if key != "head_dim"}
    return AutoModelForCausalLM.from_config(GraniteConfig(**sizes, logits_scaling=3.0))


MODELS = {"llama": llama, "gpt2": gpt2, "gemma2": capped, "granite": scaled}


def plain_losses(model, rows):
    """Summed losses of every sequence, from all logits at once."""
    with torch.no_grad():
        inputs = {k: v for k, v in rows.items() if k != "labels"}
        logits = model(**inputs).logits[:, :-1].double().log_softmax(-1)
    labels = rows["labels"][:, 1:]
    picked = logits.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return -(picked * (labels != -100)).sum(1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunks", ["whole", "few positions at a time"])
def test_losses_are_those_of_all_logits(name, chunks, monkeypatch):
    if chunks != "whole":
        monkeypatch.setattr(sequences, "LOGITS", 64 * 7)
        monkeypatch.setattr(sequences, "TOKENS", 40)
    model = MODELS[name]().eval()
    rows = EvaluationSet.from_dataset(dataset(5)).rows
    rows["labels"][1, 3:6] = -100
    losses, tokens = sequence_losses(model, rows)
    torch.testing.assert_close(losses, plain_losses(model, rows), rtol=1e-5, atol=1e-5)
    assert tokens.tolist() == [15, 12, 15, 15, 15]
    assert "forward" not in model.get_output_embeddings().__dict__


def test_the_heads_logits_are_never_there_for_all_positions(monkeypatch):
    monkeypatch.setattr(sequences, "LOGITS", 64 * 8)
    model, largest = llama().eval(), []
    model.lm_head.register_forward_pre_hook(lambda module, args: None)
    original = torch.nn.functional.cross_entropy

    def spy(logits, *args, **kwargs):
        largest.append(logits.numel())
        return original(logits, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", spy)
    sequence_losses(model, EvaluationSet.from_dataset(dataset(4)).rows)
    assert max(largest) == 64 * 8
    assert sum(largest) == 4 * 16 * 64


def test_a_head_of_its_own_forward_is_put_back_after_an_exception():
    model = llama().eval()
    rows = EvaluationSet.from_dataset(dataset(2)).rows
    model.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sequence_losses(model, rows)
    assert "forward" not in model.lm_head.__dict__


def test_batches_do_not_change_the_loss():
    model, rows = llama().eval(), dataset(7)
    found = [EvaluationSet.from_dataset(rows, batch_size=b).estimate(model) for b in (1, 3, 7, 100)]
    for other in found[1:]:
        assert other.value == pytest.approx(found[0].value, rel=1e-6)
        assert other.stderr == pytest.approx(found[0].stderr, rel=1e-4)


def test_padding_and_missing_labels():
    model = llama().eval()
    rows = [{"input_ids": list(range(1, n))} for n in (9, 5, 12)]
    evaluation_set = EvaluationSet.from_dataset(rows)
    assert evaluation_set.rows["input_ids"].shape == (3, 11)
    assert evaluation_set.tokens == 7 + 3 + 10
    alone = [EvaluationSet.from_dataset([row]).losses(model)[0].item() for row in rows]
    torch.testing.assert_close(evaluation_set.losses(model)[0], torch.tensor(alone).double(), rtol=1e-5, atol=1e-5)


def test_a_trainers_collator_makes_the_labels():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")), pad_token="b"
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    rows = Dataset.from_dict({"input_ids": [[0, 2, 3], [4, 5]]})
    made = EvaluationSet.from_dataset(rows, collator=collator)
    assert made.rows["labels"].tolist() == [[0, 2, 3], [4, 5, -100]]


def test_sequences_are_spread_evenly():
    rows = [{"input_ids": [i, i]} for i in range(101)]
    assert EvaluationSet.from_dataset(rows, 5).rows["input_ids"][:, 0].tolist() == [0, 25, 50, 75, 100]
    assert len(EvaluationSet.from_dataset(rows, 1000)) == 101
    # an iterable has no length: its first rows
    assert EvaluationSet.from_dataset(iter(rows), 3).rows["input_ids"][:, 0].tolist() == [0, 1, 2]


def test_the_digest_is_of_the_tokens():
    one, two = (EvaluationSet.from_dataset(dataset(3, seed=s)) for s in (0, 1))
    assert one.digest() == EvaluationSet.from_dataset(dataset(3, seed=0), batch_size=1).digest() != two.digest()
    assert one.settings() == {"sequences": 3, "tokens": 45, "evaluation_hash": one.digest()[:16]}


def test_the_digest_does_not_depend_on_batches_and_padding():
    rows = [{"input_ids": list(range(1, 2 + length))} for length in (5, 2, 7)]
    whole = EvaluationSet.from_dataset(rows)
    parts = [EvaluationSet.from_dataset(rows[:2]).rows, EvaluationSet.from_dataset(rows[2:]).rows]
    assert parts[0]["labels"].shape != whole.rows["labels"].shape
    assert rows_digest([(part["input_ids"], part["labels"]) for part in parts]) == whole.digest()
    assert whole.digest() != EvaluationSet.from_dataset(rows[::-1]).digest()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty"),
        ([{"text": "a"}], "no input_ids"),
        ([{"input_ids": [1]}], "predicts no token"),
        ([{"input_ids": [1, 2], "labels": [-100, -100]}], "predicts no token"),
        (3, "no data set"),
        ({"validation": [], "test": []}, r"several splits \(validation, test\)"),
        ([{"input_ids": [1, 2], "labels": 1}], "none of the next token"),
    ],
)
def test_what_is_no_evaluation_set(rows, message):
    with pytest.raises(ValueError, match=message):
        EvaluationSet.from_dataset(rows)


def test_the_standard_error_covers_the_truth():
    """Sequences of different lengths and difficulty: nominal 95 %, 2000 draws of 40, four standard errors."""
    generator = torch.Generator().manual_seed(0)
    population = torch.randint(1, 30, (5000,), generator=generator).double()
    losses = population * (3 + torch.randn(5000, generator=generator, dtype=torch.float64))
    truth = (losses.sum() / population.sum()).item()
    hits, draws = 0, 2000
    for _ in range(draws):
        chosen = torch.randint(0, 5000, (40,), generator=generator)
        found = mean_loss(losses[chosen], population[chosen])
        hits += abs(found.value - truth) < 1.96 * found.stderr
    # 40 sequences: the ratio's own skewness and the normal quantile cost a little
    assert 0.92 < hits / draws < 0.95 + 4 * math.sqrt(0.05 * 0.95 / draws)


TINY = dict(
    vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
    max_position_embeddings=32, pad_token_id=1,
)  # fmt: skip
# what each says of itself, and whether it is to be believed
ASKED = {
    "BertForMaskedLM": (BertForMaskedLM, BertConfig, {}, "does not predict the next token"),
    "BertLMHeadModel": (BertLMHeadModel, BertConfig, {}, "sees later tokens"),
    "BertLMHeadModel, is_decoder": (BertLMHeadModel, BertConfig, {"is_decoder": True}, None),
    "RobertaForCausalLM": (RobertaForCausalLM, RobertaConfig, {}, "sees later tokens"),
    "RobertaForCausalLM, is_decoder": (RobertaForCausalLM, RobertaConfig, {"is_decoder": True}, None),
    "BertGenerationDecoder": (BertGenerationDecoder, BertGenerationConfig, {}, "sees later tokens"),
    "XLNetLMHeadModel": (XLNetLMHeadModel, XLNetConfig, {}, "sees later tokens"),
    "MixtralForCausalLM": (
        MixtralForCausalLM,
        MixtralConfig,
        {"num_local_experts": 4, "num_key_value_heads": 2},
        None,
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ASKED)
def test_a_model_of_something_else_is_refused(name, dtype):
    kind, config, more, trouble = ASKED[name]
    torch.manual_seed(0)
    sizes = TINY if config is not XLNetConfig else {"vocab_size": 64, "d_model": 16, "n_layer": 2, "n_head": 2}
    model, rows = kind(config(**sizes, **more)).to(dtype), EvaluationSet.from_dataset(dataset(2))
    before = torch.get_rng_state()
    for measure in (rows.losses, rows.differentiable, rows.first(1)):
        if trouble is None:
            measure(model)
            continue
        with pytest.raises(ValueError, match=f"{kind.__name__} {trouble}"):
            measure(model)
    # asked in eval mode, with no random number of training's used up
    assert model.training
    if trouble is not None:
        assert torch.equal(torch.get_rng_state(), before)


def test_a_model_is_asked_with_tokens_that_are_no_padding():
    left = {"input_ids": [1] * 20 + [5, 6, 7], "attention_mask": [0] * 20 + [1] * 3}
    right = {"input_ids": [5, 6] + [1] * 21, "attention_mask": [1] * 2 + [0] * 21}
    for row in (left, right):
        rows = EvaluationSet.from_dataset([row])
        with pytest.raises(ValueError, match="sees later tokens"):
            rows.losses(BertLMHeadModel(BertConfig(**TINY)))
        assert math.isfinite(rows(llama().eval()))


@pytest.mark.parametrize(("make", "positions"), [(gpt2, 32), (RobertaForCausalLM, 30), (llama, None)])
def test_rows_longer_than_the_models_positions_are_refused(make, positions):
    model = make() if make is not RobertaForCausalLM else make(RobertaConfig(**TINY, is_decoder=True))
    rows = [{"input_ids": [(7 * i + 2) % 60 + 2 for i in range(positions or 40)]}]
    assert math.isfinite(EvaluationSet.from_dataset(rows)(model.eval()))
    if positions is not None:
        longer = EvaluationSet.from_dataset([{"input_ids": rows[0]["input_ids"] + [5]}])
        for measure in (longer.losses, longer.differentiable, lambda m: compare_activations(m, m, longer)):
            with pytest.raises(
                ValueError, match=f"rows of {positions + 1} tokens are longer than the {positions} that"
            ):
                measure(model)


def test_ids_beyond_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match="token id 64, and LlamaForCausalLM has a vocabulary of 64"):
        EvaluationSet.from_dataset([{"input_ids": [3, 64]}]).losses(llama())


FLATTENED = {
    "positions": {},
    "positions from 2 on": {"position_ids_start": 2},
    "bounds": {"return_flash_attn_kwargs": True},
    "bounds alone": {"return_flash_attn_kwargs": True, "return_position_ids": False},
    "indices": {"return_seq_idx": True},
}


@pytest.mark.parametrize("how", FLATTENED)
def test_a_padding_free_batch_is_its_sequences(how):
    rows = [{"input_ids": [(5 * i + n) % 64 for i in range(n)]} for n in (9, 2, 12, 1)]
    rows.append({"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6]})
    labelled = [{"labels": row["input_ids"], **row} for row in rows]
    made = EvaluationSet.from_dataset(labelled, collator=DataCollatorWithFlattening(**FLATTENED[how]))
    wanted = EvaluationSet.from_dataset([row for row in rows if len(row["input_ids"]) > 1])
    assert (len(made), made.tokens) == (4, 8 + 1 + 11 + 2)
    model = llama().eval()
    torch.testing.assert_close(made.losses(model), wanted.losses(model))
    # rows that were packed before, each with positions of its own
    packed = [{"input_ids": list(range(12)), "position_ids": [*range(5), *range(7)]}] * 2
    collated = {key: torch.tensor([row[key] for row in packed]) for key in packed[0]}
    collated["labels"] = collated["input_ids"]
    assert unpacked(collated)["input_ids"].shape == (4, 7)


def test_a_batch_that_is_not_packed_stays_as_it_is():
    ids = torch.arange(12).view(2, 6)
    for batch in (
        {"input_ids": ids, "labels": ids},
        {"input_ids": ids, "labels": ids, "position_ids": torch.arange(6).expand(2, 6)},
        {"input_ids": ids, "labels": ids, "position_ids": torch.zeros_like(ids), "attention_mask": ids > 2},
        {"input_ids": ids, "labels": ids, "position_ids": torch.zeros(3, 2, 6)},
    ):
        assert unpacked(batch) is batch


def test_a_share_of_the_loss_has_a_graph():
    model = llama().eval()
    rows = EvaluationSet.from_dataset(dataset(4), batch_size=3)
    share = rows.differentiable(model)
    assert share.item() == pytest.approx(rows(model), rel=1e-6)
    share.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_autocast_of_accelerate_is_left_aside():
    from accelerate.utils import convert_outputs_to_fp32

    model, rows = llama().eval(), EvaluationSet.from_dataset(dataset(4))
    expected = rows.losses(model)[0]
    model._original_forward = model.forward
    model.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(type(model).forward.__get__(model)))
    wrapped = model.forward
    assert torch.equal(rows.losses(model)[0], expected)
    assert model.forward is wrapped
