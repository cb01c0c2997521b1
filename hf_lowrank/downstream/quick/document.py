"""A Python source file as the tasks look at it: characters, tokens, prose, and how the harness would be shown it."""

import ast
import io
import tokenize
import warnings
from bisect import bisect_right
from functools import cached_property

__all__ = ["Document", "parsed"]

# About 130 tokens of the embedded default, whose rows have 256; other byte-level tokenizers need no more.
_CONTEXT = 400
_LEAST_CONTEXT = 100


class Document:
    """One source file. Offsets count characters from 0, lines from 1, as `tokenize` and `ast` count them."""

    def __init__(self, file: str, text: str) -> None:
        self.file = file
        self.text = text
        self.lines = text.split("\n")
        self._starts = [0]
        for line in self.lines:
            self._starts.append(self._starts[-1] + len(line) + 1)

    @cached_property
    def tokens(self) -> list[tokenize.TokenInfo]:
        """Empty for what Python itself cannot tokenize."""
        try:
            return list(tokenize.generate_tokens(io.StringIO(self.text).readline))
        except (tokenize.TokenError, SyntaxError):
            return []

    @cached_property
    def tree(self) -> ast.Module:
        """Empty for what Python itself cannot parse."""
        return parsed(self.text) or ast.Module(body=[], type_ignores=[])

    @cached_property
    def prose(self) -> list[tuple[int, int]]:
        """Where comments and triple-quoted strings begin and end, in order."""
        return [
            (self.offset(token.start), self.offset(token.end))
            for token in self.tokens
            if token.type == tokenize.COMMENT
            or (token.type == tokenize.STRING and token.string.lstrip("rRbBuUfF")[:3] in ('"""', "'''"))
        ]

    @cached_property
    def statements(self) -> list[list[tokenize.TokenInfo]]:
        """The tokens of each logical line, comments and line ends left out."""
        statements: list[list[tokenize.TokenInfo]] = [[]]
        for token in self.tokens:
            if token.type == tokenize.NEWLINE:
                statements.append([])
            elif token.type not in (tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT):
                statements[-1].append(token)
        return [tokens for tokens in statements if tokens and tokens[0].type != tokenize.ENDMARKER]

    def offset(self, position: tuple[int, int]) -> int:
        """The offset of a (line, column)."""
        return self._starts[position[0] - 1] + position[1]

    def line(self, offset: int) -> int:
        """The number of the line that `offset` is in."""
        return bisect_right(self._starts, offset)

    def in_prose(self, offset: int) -> bool:
        """Whether `offset` is inside a comment or a triple-quoted string."""
        before = bisect_right(self.prose, (offset, len(self.text)))
        return before > 0 and offset < self.prose[before - 1][1]

    def context(self, offset: int) -> str | None:
        """Whole lines before `offset` and the beginning of its own, or None if that makes no good context.

        It must be ASCII, so that characters are bytes; long enough to say something; and it must not end in white
        space, which the harness would move to the answers.
        """
        begin = max(0, offset - _CONTEXT)
        if begin:
            begin = self.text.find("\n", begin - 1, offset) + 1
        context = self.text[begin:offset]
        if (begin == 0 and offset > _CONTEXT) or len(context) < _LEAST_CONTEXT or context[-1].isspace():
            return None
        return context if context.isascii() else None

    def line_pair(self, offset: int) -> tuple[str, str]:
        """The line of the answer at `offset` and the one before it that is not blank, as a copy would have them."""
        number = self.line(offset + 1)  # an answer that begins with a line end is about the next line
        before = next((line for line in reversed(self.lines[: number - 1]) if line.strip()), "")
        return before.strip(), self.lines[number - 1].strip()


def parsed(text: str) -> ast.Module | None:
    """The syntax tree, or None if there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escape sequences that the sources have
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError):
            return None
