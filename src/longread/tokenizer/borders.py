"""Where a text can be cut without changing a token, as the `tokenizers` library itself tells it.

Before its model, a tokenizer splits a text into words, and the tokens of a word depend on that word alone. So the
border of two words can be cut at, if it stays where it is whatever comes before and after. Tokenizers without words
(SentencePiece's BPE as it is often converted) have borders too: two characters that no merge joins are never in one
token.

Whether a border stays is found out by encoding a window around it again and again: from other places on, and with
other texts behind it (`PROBES`). A border must be the same every time, and it must have MARGIN characters and three
more borders behind it, since a rule may look that far. What this cannot see is a rule that looks further back than the
window and further ahead than the margin for one certain character, such as "all up to the closing quotation mark".
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import tokenizers

from longread.tokenizer.contract import Cut
from longread.tokenizer.definition import BYTE, parts

WINDOW = 256
"""Characters looked at; four times as many, and so on, where they hold no border that stays."""
MARGIN = 32
SETTLING = 16
"""Characters at the beginning of a window whose tokens may depend on what stands before it."""
BORDERS_BEHIND = 3
PROBES = ("", "a", "A", "1", "11", " ", "  ", "\n", "\r\n", ".", "'s", "é", "\u0338", "中", "▁", "\0")
"""Characters that may follow: each kind that rules ask for. U+0338 combines, and goes before other such marks."""


_TRIES = 8
_BPE_OF_WHOLE_WORDS = ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")


class Borders:
    """The places of a tokenizer at which texts can be cut."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, definition: dict[str, Any]) -> None:
        self._tokenizer = tokenizer
        added = [token for token in definition.get("added_tokens", ()) if not token["special"]]
        # An added token is found anywhere, and what stands before it is a text that ends there. Until it is there, it
        # may be coming. A normalizer may make it of more characters than it has.
        widest = max((len(token["content"]) * (4 if token["normalized"] else 1) for token in added), default=-1)
        self._hidden = widest + 1
        rules = [
            part.get("pattern") or part.get("delimiter")
            for step in ("normalizer", "pre_tokenizer")
            for part in parts(definition.get(step))
        ]
        named = sorted({c for rule in rules for c in json.dumps(rule, ensure_ascii=False) if not c.isalnum()})
        swallowing = [token["content"] for token in added if token["lstrip"]][:4]
        self._probes = list(dict.fromkeys((*PROBES, *named, *swallowing)))

    def last_cut(self, text: str, known: int) -> Cut | None:
        """As `Tokenizer.last_cut`."""
        size = WINDOW
        while True:
            begin = max(0, len(text) - self._hidden - MARGIN - size)
            cut = self._cut_from(begin, text, known)
            if cut is not None or begin == 0:
                return cut
            size *= 4

    def _cut_from(self, begin: int, text: str, known: int) -> Cut | None:
        """The last cut that a window from `begin` to the end of the text shows."""
        window = text[begin:]
        encoding = self._tokenizer.encode(window, add_special_tokens=False)
        ids = list(encoding.ids)
        reached = list(accumulate((end for _, end in encoding.offsets), max))
        borders = self._borders(encoding, reached)
        settled = 0
        if begin:
            settled = next((i for i in borders[1:] if reached[i - 1] >= SETTLING), len(ids))
        last = len(window) - self._hidden - MARGIN
        possible = [i for i in borders[:-BORDERS_BEHIND] if i > settled and known - begin < reached[i - 1] <= last]
        if not possible or not self._same_from_elsewhere(begin, text, encoding, settled):
            return None
        shown = window[: len(window) - self._hidden]
        agreed = len(ids)
        for probe in self._probes:
            agreed = min(agreed, _common(ids, self._ids(shown + probe)))
            if agreed < possible[0]:
                return None
        staying = [i for i in borders if i <= agreed][:-BORDERS_BEHIND]
        for i in [i for i in possible if i in staying][: -1 - _TRIES : -1]:
            if self._ids(window[: reached[i - 1]]) == ids[:i]:
                if begin == 0 and reached[i - 1] > WINDOW:
                    return self._from_nearer(window, encoding, reached, [j for j in borders if j < i], i)
                return Cut(begin + reached[i - 1], begin, ids[:i], i - settled)
        return None

    def _from_nearer(
        self, text: str, encoding: tokenizers.Encoding, reached: list[int], borders: list[int], i: int
    ) -> Cut:
        """The cut before token `i`, with a context that is shorter than all that is known of the text."""
        near = [j for j in borders if reached[i - 1] - WINDOW < reached[j - 1] <= reached[i - 1] - SETTLING]
        for j in near[:1]:
            again = self._tokenizer.encode(text[reached[j - 1] :], add_special_tokens=False)
            behind = len(encoding.ids) - i
            same = _common(_from_the_end(encoding), _from_the_end(again))
            if same > behind:
                return Cut(reached[i - 1], reached[j - 1], list(again.ids[: len(again.ids) - behind]), same - behind)
        return Cut(reached[i - 1], 0, list(encoding.ids[:i]), i)

    def _same_from_elsewhere(self, begin: int, text: str, encoding: tokenizers.Encoding, settled: int) -> bool:
        """Whether the text ends in these tokens and words too if it is encoded from before `begin` on.

        One character before shows every rule that counts characters (digits in threes).
        """
        known, count = _from_the_end(encoding), len(encoding.ids) - settled
        starts = {begin - shift for shift in (1, 2, WINDOW) if shift <= begin}
        there = (self._tokenizer.encode(text[start:], add_special_tokens=False) for start in starts)
        return all(_common(known, _from_the_end(other)) >= count for other in there)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def _borders(self, encoding: tokenizers.Encoding, reached: list[int]) -> list[int]:
        """The tokens that are not the first and begin where no token could have gone on."""
        words, offsets = encoding.word_ids, encoding.offsets
        clean = [i for i in range(1, len(words)) if is_border(offsets, reached, i)]
        borders = [i for i in clean if words[i] != words[i - 1]]
        if len(borders) > BORDERS_BEHIND or self._junctions is None:
            return borders
        tokens = encoding.tokens
        return [i for i in clean if words[i] != words[i - 1] or self._never_joined(tokens[i - 1], tokens[i])]

    def _never_joined(self, left: str, right: str) -> bool:
        """Whether the characters on both sides of a border are never in one token."""
        if self._junctions is None or self._model.get("unk_token") in (left, right):
            return False
        if BYTE.fullmatch(left) or BYTE.fullmatch(right):  # a character without a token; merges do not see it
            return True
        return left[-1] + right[0] not in self._junctions

    @cached_property
    def _model(self) -> dict[str, Any]:
        return dict(json.loads(self._tokenizer.to_str())["model"])

    @cached_property
    def _junctions(self) -> set[str] | None:
        """Every two characters that a merge joins; None where that is not all that matters.

        So it is in Unigram: of two ways to spell a text that are equally likely (a short and a long run of spaces, in
        either order) it takes the one that rounding prefers, and that depends on the sum over all text before.
        """
        model = self._model
        if model["type"] != "BPE" or any(model.get(name) for name in _BPE_OF_WHOLE_WORDS):
            return None
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        if any(BYTE.fullmatch(left) or BYTE.fullmatch(right) for left, right in pairs):
            return None
        return {left[-1] + right[0] for left, right in pairs}


def is_border(offsets: Sequence[tuple[int, int]], reached: Sequence[int], i: int) -> bool:
    """Whether no character is shared by token `i` and those before it, and both sides cover some.

    `reached`: how far the tokens up to each go.
    """
    return offsets[i][0] >= reached[i - 1] and offsets[i][1] > reached[i - 1] and offsets[i - 1][1] == reached[i - 1]


def _from_the_end(encoding: tokenizers.Encoding) -> list[tuple[int, int]]:
    """The ids, the last first, each with the number of its word, counted from the last too."""
    words = [word or 0 for word in encoding.word_ids]
    return [(token, words[-1] - word) for token, word in zip(encoding.ids[::-1], words[::-1], strict=True)]


def _common(left: Sequence[object], right: Sequence[object]) -> int:
    """So many first items are the same."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
