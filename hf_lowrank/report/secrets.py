"""Keeping access tokens out of what others read: reports, cards, logs and messages."""

import re
from collections.abc import Sequence

__all__ = ["TOKEN", "redact", "without_secrets"]

TOKEN = re.compile(r"\b(?:hf_|api_org_)[A-Za-z0-9]{30,}\b|\bhf_(?:jwt|oauth)_[\w.-]{20,}")
"""What the Hub's tokens look like: of users, of organisations, and of a session."""

SECRET_FLAG = re.compile(r"--(?:\w+_)?(?:hub|hf|auth|access|api)_(?:token|key)|--(?:\w+_)?(?:password|secret)|--token")


def redact(text: str, *secrets: str | None) -> str:
    """Return `text` on one line; `<token>` replaces `secrets` and everything that looks like a Hub token."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, "<token>")
    return TOKEN.sub("<token>", " ".join(text.split()))


def without_secrets(command: Sequence[str]) -> list[str]:
    """Return a command line without flags that carry a secret and their values; other tokens are redacted."""
    kept, skip = [], False
    for word in command:
        flag = word.partition("=")[0].replace("-", "_").replace("__", "--", 1)
        secret = SECRET_FLAG.fullmatch(flag) is not None
        if not secret and (word.startswith("-") or not skip):
            kept.append(TOKEN.sub("<token>", word))
        # the value is in the same word or in the next one
        skip = secret and "=" not in word
    return kept
