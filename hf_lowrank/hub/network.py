"""Failures of the Hub or the network: what to try again and after how long, and how to describe them in one line."""

from __future__ import annotations

import importlib
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from huggingface_hub import get_session, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import hf_raise_for_status

from hf_lowrank.report.secrets import redact

__all__ = ["FAILURES", "TIMEOUT", "TRIES", "DamagedError", "describe_error", "status_of", "with_retries"]

logger = logging.getLogger(__name__)

# httpx or httpx2, after the version of huggingface_hub
HTTP: Any = importlib.import_module(HfHubHTTPError.__bases__[0].__module__.partition(".")[0])

FAILURES: tuple[type[Exception], ...] = (HTTP.HTTPError, OSError, RuntimeError, json.JSONDecodeError, KeyError)
"""What the client raises when a request fails.

A RuntimeError wraps the failed upload of a file; the last two come from answers that are not the Hub's.
"""

TIMEOUT: type[Exception] = HTTP.TimeoutException

SILENCE = 60.0
"""Seconds without a byte after which a request has failed; the client itself would wait forever."""

TRIES = 3
FIRST_WAIT = 1.0
"""Seconds before the second try, doubled for each one after it."""

LONGEST_WAIT = 300.0
"""Seconds. We do not wait for a Hub that asks for more (Retry-After); its rate limits count in five minutes."""

PASSING = (429, 500, 502, 503, 504)
"""Status codes of failures that may pass."""

T = TypeVar("T")

# pushes beside the training and downloads by metrics share the client's session
_lock = threading.Lock()
_limited = 0


class DamagedError(OSError):
    """The bytes that arrived differ from the Hub's."""


def with_retries(call: Callable[[], T]) -> T:
    """Return `call()`; try again after a failure that may pass: a busy Hub, or a connection that broke off.

    A Hub that is silent or cannot be reached is not asked again: the client retries transfers itself, and waiting
    longer would hold up the caller. `call` must be safe to repeat.

    Raises:
        What `call` raises at the last try.
    """
    for tried in range(TRIES):
        try:
            with _limits():
                return call()
        except FAILURES as error:
            wait = _seconds_to_wait(error, tried)
            if wait is None or tried == TRIES - 1:
                raise
            logger.info("trying again in %.0f s: %s", wait, describe_error(error))
        time.sleep(wait)
    raise AssertionError("unreachable")


@contextmanager
def _limits() -> Iterator[None]:
    """Give the requests of the client's shared session time limits.

    `set_client_factory` would do so permanently, but it closes the session, on which a data set may be streaming.
    """
    global _limited
    with _lock:
        _limited += 1
        session = get_session()
        hooks = session.event_hooks
        if _end_silence not in hooks.get("request", []):
            session.event_hooks = {kind: [*hooks.get(kind, []), ours] for kind, ours in _hooks().items()}
    try:
        yield
    finally:
        with _lock:
            _limited -= 1
            if _limited == 0:
                # the client makes a new session where a connection failed
                session = get_session()
                hooks = session.event_hooks
                session.event_hooks = {
                    kind: [hook for hook in hooks.get(kind, []) if hook is not ours] for kind, ours in _hooks().items()
                }


def _hooks() -> dict[str, Callable[[Any], None]]:
    return {"request": _end_silence, "response": _refuse_long_wait}


def _end_silence(request: Any) -> None:
    """Give a request a time limit: most of the client's requests have none, some of them explicitly."""
    limits = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        kind: SILENCE if limits.get(kind) is None else min(SILENCE, limits[kind])
        for kind in ("connect", "read", "write", "pool")
    }


def _refuse_long_wait(response: Any) -> None:
    """Turn an answer that asks for more than LONGEST_WAIT into an error: the client would sleep that long."""
    if response.status_code in PASSING and (_asked_wait(response) or 0) > LONGEST_WAIT:
        response.read()
        hf_raise_for_status(response)


def _asked_wait(response: Any) -> float | None:
    """Return the seconds that the Hub asks us to wait: Retry-After, or the time to its rate limit's next window."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        window = re.search(r"r=0\s*;\s*t=(\d+)", response.headers.get("RateLimit", ""))
        return float(window[1]) if window and response.status_code == 429 else None


def _seconds_to_wait(error: BaseException, tried: int) -> float | None:
    """Return after how many seconds another try makes sense; None if it does not."""
    # the second is how the client reports a file that arrived too short; a download continues from the bytes it has
    if isinstance(error, DamagedError) or str(error).startswith("Consistency check failed"):
        return 0.0
    usual = FIRST_WAIT * 2**tried
    answer = _answer(error)
    if answer is None:
        passing = isinstance(error, HTTP.TransportError) or _lost_its_session(error)
        return usual if passing and not isinstance(error, TIMEOUT | HTTP.ConnectError) else None
    if answer.status_code not in PASSING:
        return None
    asked = _asked_wait(answer)
    return usual if asked is None else asked if asked <= LONGEST_WAIT else None


def _lost_its_session(error: BaseException) -> bool:
    """Tell whether a transfer failed because another could not connect: the client then closes their session."""
    causes = list(_causes(error))[1:]
    return (
        isinstance(error, RuntimeError)
        and len(causes) > 0
        and not any(isinstance(cause, HTTP.HTTPError | OSError) for cause in causes)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _answer(error: BaseException) -> Any:
    """Return the Hub's answer behind an error, None if there was none."""
    return next((e.response for e in _causes(error) if isinstance(e, HfHubHTTPError) and e.response is not None), None)


def status_of(error: BaseException) -> int | None:
    """Return the status code of the Hub's answer behind an error, None if there was no answer."""
    answer = _answer(error)
    return None if answer is None else int(answer.status_code)


def describe_error(error: BaseException, *secrets: str | None) -> str:
    """Return in one line, without tokens, why a request failed and what to do about it."""
    # which file could not be uploaded, and why, are two errors
    what = f"{error} " if isinstance(error, RuntimeError) and error.__cause__ is not None else ""
    return redact(what + _reason(error), get_token(), *secrets)


def _reason(error: BaseException) -> str:
    answer = _answer(error)
    if answer is not None:
        return _of_answer(error, answer)
    for cause in _causes(error):
        if isinstance(cause, TIMEOUT):
            return "the Hub does not answer: try again later"
        if isinstance(cause, HTTP.ConnectError):
            return f"the Hub cannot be reached ({cause}): check the network and try again"
        if isinstance(cause, HTTP.TransportError):
            return f"the connection broke off ({cause}): try again"
        if isinstance(cause, json.JSONDecodeError | KeyError):
            return "the answer is not one of the Hub's: check HF_ENDPOINT and the network"
    if _lost_its_session(error):
        return "the connection broke off: try again"
    return str(list(_causes(error))[-1])


def _of_answer(error: BaseException, answer: Any) -> str:
    said = next((getattr(e, "server_message", None) for e in _causes(error) if isinstance(e, HfHubHTTPError)), None)
    status, asked = answer.status_code, _asked_wait(answer)
    text = f"the Hub answers {status}" + (f" ({said})" if said else "")
    if status == 401:
        return f"{text}: log in with `hf auth login`, or put a valid token into HF_TOKEN"
    if status == 403:
        return f"{text}: use a token that may do this, or another name"
    if status == 404:
        return f"{text}: it is not there, or not for this token; was it deleted or renamed?"
    if asked is not None:
        return f"{text}: try again in {asked:.0f} seconds"
    if status in PASSING:
        return f"{text}: try again later"
    return f"{text}: try again" if status in (409, 412) else text
