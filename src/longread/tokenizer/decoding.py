"""Text of token ids that come one by one: that of all of them, as far as it is certain."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence

from longread.tokenizer.contract import Tokenizer

_CONTEXT = 8
"""Tokens before a beginning that are looked at, more if they have no text."""

_LONGEST_CHARACTER = 4  # bytes


def decoded(ids: Iterable[int], tokenizer: Tokenizer, *, before: Iterable[int] = ()) -> Iterator[str]:
    """The text of `ids`, for example of `Session.generate`, in pieces as it becomes certain.

    Args:
        before: ids that the first one goes on from; their text is not given again.
    """
    decoder = StreamDecoder(tokenizer, before=before)
    yield from filter(None, map(decoder.push, ids))
    if rest := decoder.close():
        yield rest


class StreamDecoder:
    """The text of ids as it becomes certain. All that `push` and `close` give is `tokenizer.decode` of all ids.

    A character waits exactly as long as its bytes can still become one; what can become none is U+FFFD at once. The
    tokens of single bytes that SentencePiece falls back to are an exception: a run of them is text only together, so it
    waits for its end.

    Args:
        before: ids that the first one goes on from; their text is not given again.
        stops: the text ends before the first of these that is complete; of those that end together, the longest. What
            may be the beginning of one waits until that is clear.
    """

    def __init__(self, tokenizer: Tokenizer, *, before: Iterable[int] = (), stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []  # those that may depend on their neighbours, with what goes before them
        self._given = ""  # the part of their text that is certain
        self._held = ""  # text that may be the beginning of a stop
        self.decoded = 0
        """Characters that are certain, those included that wait for a stop text."""
        self.stopped = False
        """Whether a stop text has come; nothing more is given then."""
        for token in _last(tokenizer, list(before)):
            self._text(token)
        self._given = max(self._given, self._whole(), key=len)

    def push(self, token: int) -> str:
        """One more id; an id beyond the tokenizer's has no text. Gives what is certain now and was not before."""
        if self.stopped or token >= self._tokenizer.vocab_size:  # a model may know more ids than its tokenizer
            return ""
        return self._out(self._text(token), final=False)

    def close(self) -> str:
        """The rest of the text, when no more ids come."""
        if self.stopped:
            return ""
        text = self._bytes.decode(b"", True) + self._tokenizer.decode(self._ids)[len(self._given) :]
        self._ids, self._given = [], ""
        return self._out(text, final=True)

    def _text(self, token: int) -> str:
        data = self._tokenizer.bytes_of(token)
        if data is not None:
            text = self._bytes.decode(data)
            if b"\xed\xa0" <= self._bytes.getstate()[0] < b"\xee":  # Python waits for half a surrogate pair
                text += self._bytes.decode(b"", True)
            return text
        self._ids.append(token)
        if self._tokenizer.joins_bytes(token):
            return ""
        text = self._tokenizer.decode(self._ids)
        certain = text
        for probe in self._tokenizer.decoding_probes():
            certain = _common(certain, self._tokenizer.decode([*self._ids, probe]))
        new = certain[len(self._given) :]
        self._given += new
        if certain == text:
            self._forget(text)
        return new

    def _whole(self) -> str:
        """The text of the ids without a last character that is not whole."""
        texts = (self._tokenizer.decode(self._ids[: len(self._ids) - missing]) for missing in range(_LONGEST_CHARACTER))
        return next((text for text in texts if "\N{REPLACEMENT CHARACTER}" not in text), "")

    def _forget(self, text: str) -> None:
        """Keeps only the last ids: as many as have a text, which ends that of all."""
        for count in range(1, len(self._ids)):
            end = self._tokenizer.decode(self._ids[-count:])
            if end and text.endswith(end):
                self._ids, self._given = self._ids[-count:], end
                return

    def _out(self, text: str, *, final: bool) -> str:
        self.decoded += len(text)
        self._held += text
        found = [(place + len(stop), place) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)[1]], ""
            return text
        kept = max((n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])), default=0)
        end = len(self._held) - (0 if final else kept)
        text, self._held = self._held[:end], self._held[end:]
        return text


def _common(one: str, other: str) -> str:
    """The longest text that both begin with."""
    if other.startswith(one):
        return one
    return one[: next(i for i, (a, b) in enumerate(zip(one + "\0", other + "\1", strict=False)) if a != b)]


def _last(tokenizer: Tokenizer, before: list[int]) -> list[int]:
    """The last of `before` that have a text and begin with whole characters."""
    known = [i for i in before if i < tokenizer.vocab_size]
    count = min(_CONTEXT, len(known))
    while count < len(known) and not tokenizer.decode(known[-count:]):
        count = min(2 * count, len(known))
    while count < len(known) and tokenizer.joins_bytes(known[-count]):
        count += 1
    return known[len(known) - count :]
