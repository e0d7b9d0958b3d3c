"""Cutting a text that arrives in pieces where no token is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from longread.config import UserError

BLOCK = 1 << 16
"""Characters taken at a time out of a longer piece."""
LEAST = 256
"""Characters that must be new before a stream looks for a place to cut."""


class Cut(NamedTuple):
    """A place in a text where one token ends and another begins, whatever stands before the text and comes after it."""

    end: int
    """The place, in characters."""
    start: int
    """Where a context begins: the tokens after `end` are those of the text from here on, without the first ones."""
    ids: list[int]
    """The tokens of the text between `start` and `end`."""
    settled: int
    """So many of the last `ids` are the same whatever stands before `start`."""


class Stretch(NamedTuple):
    """A part of a text that is cut where no token is."""

    context: str
    """The text before it, as far as it matters."""
    before: list[int]
    """The tokens of the context."""
    text: str
    settled: list[int]
    """The last tokens of context and text, as they were found when the place was chosen."""

    def own(self, ids: list[int]) -> list[int]:
        """The tokens of the text alone, from those of context and text. Raises `UserError` if they do not fit."""
        known, last = self.before, self.settled
        if ids[: len(known)] != known or ids[len(ids) - len(last) :] != last:
            raise UserError(
                "this tokenizer's tokens depend on text far away, so a long text cannot be cut for it; "
                "give shorter texts or another tokenizer"
            )
        return ids[len(known) :]


class Cutter:
    """Cuts a text that arrives in pieces into stretches of about `least` characters.

    `last_cut` is a tokenizer's. Where it leaves no place to cut (a run of one letter, a tokenizer without words), the
    stretch grows until there is one, at worst to the whole text.
    """

    def __init__(self, last_cut: Callable[[str, int], Cut | None], least: int) -> None:
        self._last_cut, self._least = last_cut, least
        self._context, self._before = "", list[int]()
        self._waiting: list[str] = []
        self._length, self._enough = 0, least

    def push(self, text: str) -> Iterator[Stretch]:
        """Stretches that are certain, now that `text` is there."""
        for begin in range(0, len(text), BLOCK):
            piece = text[begin : begin + BLOCK]
            self._waiting.append(piece)
            self._length += len(piece)
            if self._length >= self._enough:
                yield from self._cut()

    def close(self) -> Iterator[Stretch]:
        """The rest: nothing comes any more."""
        if self._length:
            yield Stretch(self._context, self._before, "".join(self._waiting), [])
        self._context, self._before, self._waiting, self._length = "", [], [], 0

    def _cut(self) -> Iterator[Stretch]:
        known, rest = len(self._context), "".join(self._waiting)
        text = self._context + rest
        cut = self._last_cut(text, known)
        if cut is None:
            self._waiting, self._enough = [rest], 2 * self._length  # not again and again over the same text
            return
        settled = cut.ids[len(cut.ids) - cut.settled :]
        yield Stretch(self._context, self._before, text[known : cut.end], settled)
        self._context, self._before = text[cut.start : cut.end], cut.ids
        self._waiting, self._length = [text[cut.end :]], len(text) - cut.end
        self._enough = self._length + self._least
