"""From places in the held-out sources to the items of a task: balanced, without repetition, the same every time.

Where places lend each other their answers, the items come in groups: as many places as there are answers, all with the
same answers in the same order, each answer right in one of them. Whatever looks at the answers alone (their length,
how common they are, their position) scores exactly the chance level on such a group. Where an item has its own wrong
answer, that one has the same words, and the right one stands first in every other item.

Every order comes from hashes of content, not from a random generator, whose sequence may change between versions of
Python.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hf_lowrank.downstream.quick import candidates
from hf_lowrank.downstream.quick.candidates import Place
from hf_lowrank.downstream.quick.document import Document

__all__ = ["KINDS", "Kind", "make_items"]

# So far from one another that no context shows what another place of its group asks for.
_LINES_APART = 25


@dataclass(frozen=True)
class Kind:
    """A task.

    places: finds its questions in a document.
    title: what is asked, in a few words.
    answers: choices an item has; the chance level is one in so many.
    repeats: share of the items that may have one label (`Place.label`).
    common: how many places must have a label for it to be asked for.
    """

    places: Callable[[Document], Iterable[Place]]
    title: str
    answers: int = 2
    repeats: float = 1.0
    common: int = 1


KINDS: Mapping[str, Kind] = {
    "brackets": Kind(candidates.brackets, "Which bracket closes the one above"),
    "punctuation": Kind(
        candidates.punctuation, "Which punctuation follows a word of code", answers=4, repeats=0.2, common=8
    ),
    "indentation": Kind(candidates.indentation, "How deep the next statement is indented", repeats=0.2),
    "keywords": Kind(candidates.keywords, "In which order a statement has its keywords", repeats=0.2),
    "operators": Kind(candidates.operators, "In which order a statement has operand and operator", repeats=0.5),
    "words": Kind(candidates.words, "In which order a comment has its words", repeats=0.02),
    "names": Kind(candidates.names, "Which name the function has defined above", repeats=0.04),
    "cloze": Kind(candidates.cloze, "Which word comes next", answers=4, repeats=0.08, common=20),
}


def make_items(
    kind: Kind, documents: Iterable[Document], copied: set[tuple[str, str]], count: int, seed: int
) -> list[dict[str, Any]]:
    """Up to `count` items (a multiple of `kind.answers`) from `documents`.

    copied: pairs of consecutive lines (`Document.line_pair`) that the training share has too, which are not asked for.

    An item is ready for JSON: `context` and `choices`, which the harness scores as continuations of it, `answer` (the
    index of the right one), `file` and `line` (where that stands). No file gives more than about half of `count`.
    Any first part of a task is as balanced as the whole, up to one group.
    """
    places = [place for document in documents for place in kind.places(document)]
    often = Counter(place.label for place in places)
    asked: dict[tuple[str, str], Place] = {}
    for place in sorted(places, key=lambda place: _digest(seed, place.document.file, place.offset)):
        new = often[place.label] >= kind.common and place.document.line_pair(place.offset) not in copied
        if new and (context := place.document.context(place.offset)) is not None:
            asked.setdefault((context, place.right), place)
    size = 1 if any(place.wrong is not None for place in places) else kind.answers
    count -= count % kind.answers
    items: list[dict[str, Any]] = []
    for group in _groups(list(asked.values()), size, count, kind.repeats):
        answers = sorted((place.right for place in group), key=lambda answer: _digest(seed, len(items), answer))
        for place in group:
            items.append(_item(place, answers if place.wrong is None else _in_turn(place, len(items))))
    return items[: len(items) - len(items) % kind.answers]


def _groups(places: list[Place], size: int, count: int, repeats: float) -> Iterator[list[Place]]:
    """Groups of `size` places whose answers are wrong in each other's, each place once, `count` places in all."""
    files: Counter[str] = Counter()
    labels: Counter[Any] = Counter()
    pools: dict[Any, list[Place]] = {}
    for place in places:
        pools.setdefault(place.pool, []).append(place)
    used: set[int] = set()

    def free(place: Place) -> bool:
        full = files[place.document.file] >= count // 2 or labels[place.label] >= max(1, round(repeats * count))
        return id(place) not in used and not full

    for place in places:
        group: list[Place] = []
        for other in [place, *pools[place.pool]]:
            if len(group) < size and free(other) and all(_together(other, member) for member in group):
                group.append(other)
            if not group or len(group) == size:
                break
        if len(group) == size and len(used) < count:
            used.update(map(id, group))
            files.update(member.document.file for member in group)
            labels.update(member.label for member in group if member.label is not None)
            yield group


def _together(one: Place, other: Place) -> bool:
    """Whether each one's answer is wrong for the other, and neither one's context shows the other's question."""
    if not (one.admits(other) and other.admits(one)):
        return False
    apart = abs(one.document.line(one.offset) - other.document.line(other.offset)) > _LINES_APART
    return apart or one.document is not other.document


def _in_turn(place: Place, number: int) -> list[str]:
    assert place.wrong is not None
    return [place.right, place.wrong] if number % 2 == 0 else [place.wrong, place.right]


def _item(place: Place, choices: list[str]) -> dict[str, Any]:
    return {
        "context": place.document.context(place.offset),
        "choices": choices,
        "answer": choices.index(place.right),
        "file": place.document.file,
        "line": place.document.line(place.offset + 1),
    }


def _digest(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()
