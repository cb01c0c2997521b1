"""Putting texts of others into Markdown so that they stay text.

A run's name or a config's value may hold Markdown, HTML or a template's braces. None of it may become markup, end a
table cell or start a line.
"""

import re
import unicodedata

__all__ = ["Markdown", "code", "escape", "fenced", "one_line", "slug"]

# characters that reorder the text around them: what is shown would not be what is there (Unicode TR 36)
_BIDI_CONTROLS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
# a backslash where Markdown alone gives meaning, an entity where HTML, a table, KaTeX or a template engine does too
_ESCAPES = str.maketrans(
    {
        **{character: f"\\{character}" for character in "\\`*_[]#~"},
        **{character: f"&#{ord(character)};" for character in "|${}"},
        "&": "&amp;",
        "<": "&lt;",
        ">": "&gt;",
        "@": "&#64;",
    }
)


class Markdown(str):
    """Text that is Markdown already: `escape` leaves it as it is."""

    __slots__ = ()


def one_line(text: object) -> str:
    """Return `text` as a single line without control characters, direction overrides and lone surrogates."""
    return " ".join(_visible(str(text)).split())


def escape(text: object) -> Markdown:
    """Return `text` as Markdown that shows it, on one line; safe inside a paragraph, a heading or a table cell.

    It must not begin a line, where `-`, `+`, `=` and `1.` would mean something.
    """
    if isinstance(text, Markdown):
        return text
    escaped = one_line(text).translate(_ESCAPES)
    unlinked = re.sub(r"(?i)\b(www)\.", r"\1&#46;", escaped.replace("://", "&#58;//"))
    return Markdown(unlinked)


def code(text: object) -> Markdown:
    """Return `text` as a code span for a table cell, the only place where a `|` in code may carry a backslash."""
    line = one_line(text)
    fence = "`" * (_longest_backticks(line) + 1)
    space = " " if len(fence) > 1 else ""
    return Markdown(f"{fence}{space}{line}{space}{fence}".replace("|", "\\|"))


def fenced(text: str, language: str = "") -> Markdown:
    """Return `text` as a fenced code block whose fence is longer than any in it."""
    fence = "`" * max(3, _longest_backticks(text) + 1)
    return Markdown("\n".join([f"{fence}{language}", *map(_visible, text.split("\n")), fence]))


def slug(text: object) -> str:
    """Return `text` in lower case with everything but ASCII letters, digits, `.`, `_` and `-` turned into `-`.

    Runs of `-` and `.` are joined and stripped at the ends, as repository names require; nothing left gives "run".
    """
    lowered = re.sub(r"[^a-z0-9._-]+", "-", one_line(text).lower())
    return re.sub(r"[-.]{2,}", "-", lowered).strip("-._")[:80] or "run"


def _longest_backticks(text: str) -> int:
    return max((len(run) for run in re.findall(r"`+", text)), default=0)


def _visible(text: str) -> str:
    """Return `text` with its control characters as spaces, without direction overrides, encodable as UTF-8."""
    valid = text.encode("utf-8", "replace").decode("utf-8")
    shown = (character for character in valid if character not in _BIDI_CONTROLS)
    return "".join(" " if unicodedata.category(character) in ("Cc", "Zl", "Zp") else character for character in shown)
