"""Loss and perplexity: against transformers' own loss, and standard errors that cover the truth."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_lowrank.metrics.perplexity import Estimate, mean_loss, perplexity
from hf_lowrank.metrics.sequences import sequence_losses


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    return AutoModelForCausalLM.from_config(config).eval()


def test_equals_the_models_own_loss(model):
    ids = torch.randint(0, 50, (4, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[1, 6:] = -100
    batch = {"input_ids": ids, "labels": labels}
    losses, tokens = sequence_losses(model, batch)
    assert tokens.tolist() == [11, 5, 11, 11]
    assert mean_loss(losses, tokens).value == pytest.approx(model(**batch).loss.item(), rel=1e-5)


def test_standard_error_covers_the_truth_at_its_nominal_rate():
    # sequences of different lengths whose loss a token is 3 on average: 68 % of the intervals hold it
    generator = torch.Generator().manual_seed(0)
    covered, repeats = 0, 2000
    for _ in range(repeats):
        tokens = torch.randint(50, 200, (60,), generator=generator)
        losses = tokens * (3 + 0.3 * torch.randn(60, generator=generator, dtype=torch.float64))
        estimate = mean_loss(losses, tokens)
        covered += abs(estimate.value - 3) < estimate.stderr
    # 0.683 for the normal law; three standard errors of the share itself
    assert covered / repeats == pytest.approx(0.683, abs=3 * math.sqrt(0.683 * 0.317 / repeats) + 0.01)


def test_perplexity_is_exp_with_the_delta_methods_error():
    found = perplexity(Estimate(2.0, 0.1))
    assert found.value == pytest.approx(math.exp(2))
    assert found.stderr == pytest.approx(0.1 * math.exp(2))


def test_one_sequence_has_no_standard_error():
    assert math.isnan(mean_loss(torch.tensor([3.0]), torch.tensor([2])).stderr)


def test_nothing_to_predict_is_an_error():
    with pytest.raises(ValueError, match="predicts no token"):
        mean_loss(torch.zeros(3), torch.zeros(3))
