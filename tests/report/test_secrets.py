"""Tokens stay out of what others read."""

import pytest

from hf_lowrank.report.secrets import redact, without_secrets

TOKEN = "hf_" + "a1B2" * 9


@pytest.mark.parametrize("secret", [TOKEN, "api_org_" + "x" * 34, "hf_jwt_" + "ab.c-d_" * 5])
def test_what_looks_like_a_token_is_redacted(secret):
    assert redact(f"https://user:{secret}@huggingface.co\n  said no") == "https://user:<token>@huggingface.co said no"
    assert without_secrets(["run", f"--note={secret}"]) == ["run", "--note=<token>"]


def test_names_of_our_own_are_no_tokens():
    text = "hf_lowrank.run.report hf_lowrank_study hf_hub_download_with_a_long_name_of_its_own"
    assert redact(text) == text


def test_a_secret_of_any_form_is_redacted():
    assert redact("the token swordfish is wrong", None, "swordfish") == "the token <token> is wrong"


@pytest.mark.parametrize(
    "flag", ["--hub_token", "--hub-token", "--push_to_hub_token", "--token", "--wandb_api_key", "--password"]
)
def test_flags_that_carry_a_secret_are_left_out_with_their_value(flag):
    assert without_secrets(["run", flag, "swordfish", "--seed", "1"]) == ["run", "--seed", "1"]
    assert without_secrets(["run", f"{flag}=swordfish", "more", "--seed=1"])[-1] == "--seed=1"
    assert "swordfish" not in " ".join(without_secrets(["run", f"{flag}=swordfish"]))


def test_other_flags_stay():
    command = ["run", "--eos_token", "</s>", "--push_to_hub", "--tokenizer_name", "t5", "x", "--pad-token=0"]
    assert without_secrets(command) == command
