"""Numbers and settings as plain text, for cards, tables and pages alike."""

import json
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

__all__ = ["UNKNOWN", "describe", "format_bytes", "format_count", "format_duration", "format_value"]

UNKNOWN = "not recorded"


def format_value(value: float | None, stderr: float | None = None) -> str:
    """Return `3.612 ± 0.021`: the error to two significant digits, the value to the same decimal place.

    Without an error the value has four significant digits. Below 1e-3 and from 1e6 on, value and error share an
    exponent: `(1.234 ± 0.056)e-07`. What is not finite or not there reads `n/a`.
    """
    if value is None or not math.isfinite(value):
        return "n/a"
    if stderr is None or not math.isfinite(stderr):
        return _plain(value)
    if stderr == 0:
        return f"{_plain(value)} ± 0"
    error = Decimal(f"{stderr:.1e}")
    size = max(abs(Decimal(value)), error)
    exponent = 0 if Decimal("1e-3") <= size < Decimal("1e6") else size.adjusted()
    scaled, error = Decimal(value).scaleb(-exponent), error.scaleb(-exponent)
    decimals = max(1 - error.adjusted(), 0)
    if scaled and scaled.adjusted() + decimals >= 8:  # an error far below the value would print a row of noise digits
        return f"{value:.6g} ± {stderr:.1e}"
    text = f"{scaled:z.{decimals}f} ± {error:.{decimals}f}"
    return f"({text})e{exponent:+03d}" if exponent else text


def format_count(count: float | None) -> str | None:
    """Return `2,066,816 (2.07 M)`, or None for None; small counts stand alone."""
    if count is None:
        return None
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if count >= limit:
            return f"{count:,.0f} ({count / limit:.3g} {unit})"
    return f"{count:,.0f}"


def format_bytes(size: float | None) -> str | None:
    """Return a size in binary units, `12.3 MiB`, or None for None."""
    if size is None:
        return None
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def format_duration(seconds: float | None) -> str | None:
    """Return a time span, `2 h 5 min`, `2 min 11 s`, `1.3 s` or `12 ms`, or None for None."""
    if seconds is None:
        return None
    if 0 < seconds < 0.1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def describe(settings: Mapping[str, Any] | str | None) -> str:
    """Return settings as one line, `key=value, key=value` in the order of the keys.

    Equal settings give equal text; keys that hold nothing (null, an empty list or object) are left out.
    """
    if settings is None or isinstance(settings, str):
        return settings or ""
    return ", ".join(
        f"{key}={_short(value)}" for key, value in sorted(settings.items()) if value not in (None, [], {})
    )


def _plain(value: float) -> str:
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        return f"{value:.{max(3 - Decimal(value).adjusted(), 0)}f}"
    return f"{value:.3e}"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        return value
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
