"""Tokens of a text that arrives in pieces: those of the whole text, wherever it is cut."""

from __future__ import annotations

from collections.abc import Iterator

from longread.tokenizer.contract import Tokenizer, utf8
from longread.tokenizer.cutting import LEAST, Cutter, Stretch


class StreamEncoder:
    """Ids and byte lengths of a text in pieces, as soon as no later piece can change them.

    All that `push` and `close` give, in order, is `tokenizer.encode_with_bytes` of the whole text. About 300 characters
    wait for what follows; more where the tokenizer leaves no place to cut (`Cutter`).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._cutter = Cutter(tokenizer.last_cut, LEAST)

    def push(self, text: str) -> tuple[list[int], list[int]]:
        """The next piece. Raises `UserError` on half a surrogate pair."""
        utf8(text)
        return self._encoded(self._cutter.push(text))

    def close(self) -> tuple[list[int], list[int]]:
        """The rest of the tokens, when no more text comes."""
        return self._encoded(self._cutter.close())

    def _encoded(self, stretches: Iterator[Stretch]) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        lengths: list[int] = []
        for stretch in stretches:
            found, covered = self._tokenizer.encode_with_bytes(stretch.context + stretch.text)
            ids += stretch.own(found)
            lengths += covered[len(stretch.before) :]
        return ids, lengths
