"""Places in Python sources where a task can ask for what comes next, each with the answer that stands there.

Two forms. Where the question has a fixed set of answers (which bracket, which name), a place carries its right answer
and a *pool*: the answers of two places of one pool can stand in for each other, so that the wrong answer of one place
is the right one of another. Where the question is about order, a place carries its own wrong answer, which has the
same words.

Every answer begins where a byte-level tokenizer begins a new token in the real text too (a letter after a bracket, a
bracket after a letter, a space or a line end before a word), else the harness would compare tokens that no training
text has.
"""

import ast
import hashlib
import keyword
import re
import tokenize
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from hf_lowrank.downstream.quick.document import Document, parsed

__all__ = ["Place", "brackets", "cloze", "indentation", "keywords", "names", "operators", "punctuation", "words"]

_CLOSES = {"(": ")", "[": "]", "{": "}"}
_PUNCTUATION = re.compile(r"[^\w\s]+")
_THREE_WORDS = re.compile(r"(?<=\S) ([a-z]{2,}) ([a-z]{2,})( [a-z]{2,})(?![\w-])")
_WORD = re.compile(r"(?<=\S) [A-Za-z_]{2,}(?!\w)")
_KEYWORDS = frozenset(keyword.kwlist) - {"True", "False", "None"}
_OPERATORS = frozenset(("=", "==", "!=", "<", ">", "<=", ">=", "+", "-", "*", "/", "//", "%", "+=", "-=", "|", "&"))
# What lets a lone statement parse: a body, or the statement that must come before it.
_FRAMES = ("{}", "{} pass", "if 1: pass\n{} pass", "try: pass\n{} pass", "try: pass\nexcept: pass\n{} pass")
# Statements after which a line at the same depth would never be reached.
_LEAVING = frozenset(("return", "raise", "break", "continue"))


@dataclass(frozen=True)
class Place:
    """A question: what stands at `offset` of `document`.

    label: what it has in common with others of its kind, of which a task takes only so many.
    wrong: the answer of a question about order; None if another place of the pool lends its own.
    absent: a name that the context must not have for it to be a wrong answer (`names`).
    """

    document: Document
    offset: int
    right: str
    pool: Hashable = None
    label: Hashable = None
    wrong: str | None = None
    absent: bool = False

    def admits(self, other: "Place") -> bool:
        """Whether the other's answer is wrong here."""
        if self.right == other.right:
            return False
        if self.absent:
            context = self.document.context(self.offset) or ""
            return re.search(rf"\b{re.escape(other.right.strip())}\b", context) is None
        return True


_Places: TypeAlias = Iterator[Place]
_Pair: TypeAlias = tuple[tokenize.TokenInfo, tokenize.TokenInfo]


def brackets(document: Document) -> _Places:
    """A closing bracket whose opening one is in the context; wrong: another kind of bracket, a syntax error."""
    opened: list[tokenize.TokenInfo] = []
    for token in document.tokens:
        if token.type != tokenize.OP:
            continue
        if token.string in _CLOSES:
            opened.append(token)
        elif token.string in _CLOSES.values() and opened:
            opener, offset = opened.pop(), document.offset(token.start)
            context = document.context(offset)
            if context and document.offset(opener.start) >= offset - len(context) and _ends_word(context):
                run = _PUNCTUATION.match(document.text, offset)
                if run and len(run[0]) <= 3:
                    yield Place(document, offset, run[0], pool=run[0][1:])


def punctuation(document: Document) -> _Places:
    """The punctuation that follows a word of code; wrong: what follows others."""
    for one, other in pairwise(document.tokens):
        adjacent = one.type == tokenize.NAME and other.type == tokenize.OP and one.end == other.start
        offset = document.offset(other.start)
        if adjacent and one.string[-1].isalnum():
            run = _PUNCTUATION.match(document.text, offset)
            if run and len(run[0]) <= 2 and not set(run[0]) & set("'\"#"):
                yield Place(document, offset, run[0], label=run[0])


def indentation(document: Document) -> _Places:
    """The depth of the next statement and its first word: one level deeper after a colon, as deep after others.

    Each depth is a wrong answer if the other is right: there it is a syntax error.
    """
    for last, following in pairwise(document.statements):
        depth, next_depth = last[0].start[1], following[0].start[1]
        opens = last[-1].string == ":"
        offset = document.offset(last[-1].end)
        word = following[0].string
        if (
            document.text[offset : offset + 1] == "\n"
            and following[0].start[0] == last[-1].end[0] + 1
            and next_depth == (depth + 4 if opens else depth)
            and last[0].string not in _LEAVING
            and word.isascii()
            and word.isalpha()
        ):
            yield Place(document, offset, f"\n{' ' * next_depth}{word}", pool=(depth, word), label=word)


def keywords(document: Document) -> _Places:
    """A statement with two of its keywords in each other's place, which is no Python."""
    for line, tokens in _indented_lines(document):
        spots = [token for token in tokens if token.string in _KEYWORDS and line[token.start[1] - 1] == " "]
        pairs = [(one, other) for one, other in pairwise(spots) if one.string != other.string]
        yield from _swapped(document, line, pairs, lambda one, other: (one.string, other.string))


def operators(document: Document) -> _Places:
    """A statement with an operator before the operand that it follows, which is no Python."""
    for line, tokens in _indented_lines(document):
        pairs = [
            (one, other)
            for one, other in pairwise(tokens)
            if one.type == tokenize.NAME
            and one.string not in _KEYWORDS
            and other.string in _OPERATORS
            and line[one.start[1] - 1] == line[one.end[1]] == " "
            and line[other.end[1] : other.end[1] + 1] == " "
        ]
        yield from _swapped(document, line, pairs, lambda one, other: other.string)


def words(document: Document) -> _Places:
    """Three words of a comment or docstring; wrong: the first two in each other's place."""
    for start, end in document.prose:
        for match in _THREE_WORDS.finditer(document.text, start, end):
            one, other, third = match.groups()
            if one != other:
                right, wrong = f" {one} {other}{third}", f" {other} {one}{third}"
                yield Place(document, match.start(), right, wrong=wrong, label=(one, other))


def names(document: Document) -> _Places:
    """A name that the context binds in the same function; wrong: one of the same length that it does not mention."""
    for function in ast.walk(document.tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        bound: dict[str, int] = {}
        found = []
        for node in ast.walk(function):
            if isinstance(node, ast.arg):
                _note(bound, node.arg, document.offset((node.lineno, node.col_offset)))
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                _note(bound, node.id, document.offset((node.lineno, node.col_offset)))
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                found.append((node.id, document.offset((node.lineno, node.col_offset))))
        for name, offset in found:
            lead = " " if document.text[offset - 1] == " " else ""
            context = document.context(offset - len(lead))
            inside = context and offset - len(lead) - len(context) <= bound.get(name, offset) < offset - len(lead)
            if (
                inside
                and name not in ("self", "cls")
                and re.match("[A-Za-z].", name)
                and document.text.startswith(name, offset)
            ):
                pool = (len(name), name.count("_"), lead)
                yield Place(document, offset - len(lead), lead + name, pool=pool, label=name, absent=True)


def cloze(document: Document) -> _Places:
    """The next word; wrong: those of other places, prose for prose and code for code."""
    for match in _WORD.finditer(document.text):
        prose = document.in_prose(match.start())
        if not prose or match[0].islower():  # not the names of characters in the tables of codecs
            yield Place(document, match.start(), match[0], pool=prose, label=(prose, match[0]))


def _indented_lines(document: Document) -> Iterator[tuple[str, list[tokenize.TokenInfo]]]:
    """The statements of one line each, inside a block and without a comment."""
    for tokens in document.statements:
        line = document.lines[tokens[0].start[0] - 1]
        whole = tokens[0].start[0] == tokens[-1].end[0] and tokens[-1].end[1] == len(line)
        if whole and line.startswith(" ") and len(line) <= 100:
            yield line, tokens


def _swapped(document: Document, line: str, pairs: list[_Pair], label: Callable[..., Hashable]) -> _Places:
    """The line as it stands against the line with one of the pairs swapped, the first drawn one that is no Python."""
    for one, other in sorted(pairs, key=lambda pair: _digest(line, pair[0].start, pair[1].start)):
        between = line[one.end[1] : other.start[1]]
        swapped = line[: one.start[1]] + other.string + between + one.string + line[other.end[1] :]
        if _is_python(line.strip()) and not _is_python(swapped.strip()):
            before = document.offset((one.start[0], 0)) - 1
            yield Place(document, before, f"\n{line}", wrong=f"\n{swapped}", label=label(one, other))
            return


def _note(bound: dict[str, int], name: str, offset: int) -> None:
    bound[name] = min(offset, bound.get(name, offset))


def _ends_word(context: str) -> bool:
    return context[-1].isalnum()


def _is_python(statement: str) -> bool:
    return any(parsed(frame.format(statement)) for frame in _FRAMES)


def _digest(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()
