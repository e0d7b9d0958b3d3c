"""Token ids that come one by one, as text that goes out in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from longread.engine import Token
from longread.server.errors import ApiError
from longread.tokenizer import ByteTokenizer, Tokenizer

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 4
"""Tokens after which bytes that make no character will not make one any more."""
MOST_STOPS, LONGEST_STOP = 4, 1000


def stops_of(stop: str | list[str] | None) -> list[str]:
    """Stop texts as a list. Raises `ApiError` if there are too many, or one is empty or very long."""
    stops = [stop] if isinstance(stop, str) else list(stop or ())
    if len(stops) > MOST_STOPS:
        raise ApiError(400, f"{len(stops)} stop texts are too many; give up to {MOST_STOPS}", param="stop")
    if any(not 0 < len(text) <= LONGEST_STOP for text in stops):
        raise ApiError(400, f"a stop text is empty or longer than {LONGEST_STOP} characters", param="stop")
    return stops


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """One token for human eyes; what is no text of its own, half a character say, goes by its id."""
    if token >= tokenizer.vocab_size:  # a model may know more ids than its tokenizer
        return f"token_id:{token}"
    text = tokenizer.decode([token])
    if text and _UNKNOWN not in text:
        return text
    if isinstance(tokenizer, ByteTokenizer) and token != tokenizer.bos_id:
        return f"bytes:\\x{token:02x}"
    return f"token_id:{token}"


def token_bytes(tokenizer: Tokenizer, token: int) -> list[int] | None:
    """The UTF-8 bytes of one token; None where it has no text of its own."""
    if isinstance(tokenizer, ByteTokenizer):
        return None if token == tokenizer.bos_id else [token]
    text = token_text(tokenizer, token)
    return None if text.startswith("token_id:") else list(text.encode())


@dataclass
class Piece:
    """Text that is certain now, and the tokens that it ends."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    """Where the text of each token begins, in characters from the beginning of the whole."""
    stopped: bool = False
    """Whether a stop text came after it."""
    reason: str | None = None
    """Why nothing comes after it: "stop" or "length"; None if something does."""


class Writer:
    """Makes text of tokens. A character waits until all its bytes are there, and what may be the beginning of a stop
    text until that is clear.

    Args:
        stops: the text ends before the first of these.
        before: what the first token goes on from, for tokenizers whose tokens look different at a beginning.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), before: Sequence[int] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._ids = [i for i in before[-1:] if i < tokenizer.vocab_size]
        self._known = len(self._ids)  # ids whose text is in _text already; they give the others their context
        self._text = ""  # all that is certain to be text
        self._sent = 0  # characters of it that have gone out
        self._held: list[tuple[Token, int, int]] = []  # tokens not yet gone out, with begin and end in the text
        self.stopped = False
        """Whether a stop text has come; nothing more goes out then."""

    @property
    def text(self) -> str:
        """Everything that has gone out."""
        return self._text[: self._sent]

    def push(self, token: Token) -> Piece:
        """One more token."""
        begin = len(self._text)
        if token.id < self._tokenizer.vocab_size:  # a model may know more ids than its tokenizer
            self._ids.append(token.id)
            self._grow(final=False)
        self._held.append((token, begin, len(self._text)))
        return self._cut(final=False)

    def close(self) -> Piece:
        """What is left when no more tokens come."""
        if self.stopped:
            return Piece()
        self._grow(final=True)
        return self._cut(final=True)

    def _grow(self, *, final: bool) -> None:
        known = self._tokenizer.decode(self._ids[: self._known])
        last = len(self._ids)
        text = self._tokenizer.decode(self._ids)
        if not final and text.endswith(_UNKNOWN):
            if last - self._known < _LONGEST_CHARACTER:
                return
            last = self._known + 1  # no character begins with this one, or it would be there by now
            text = self._tokenizer.decode(self._ids[:last])
        self._text += text[len(known) :]
        del self._ids[: self._known]
        self._known = last - self._known

    def _cut(self, *, final: bool) -> Piece:
        """Sends what is certain, and ends at a stop text."""
        tail = self._text[self._sent :]
        found = [place for stop in self._stops if (place := tail.find(stop)) >= 0]
        self.stopped = bool(found)
        kept = max((n for stop in self._stops for n in range(1, len(stop)) if tail.endswith(stop[:n])), default=0)
        end = self._sent + min(found) if found else len(self._text) - (0 if final else kept)
        piece, self._sent = Piece(self._text[self._sent : end], stopped=self.stopped), end
        while self._held:
            token, begin, finish = self._held[0]
            gone = begin < end if self.stopped else finish < end or (finish == end and (begin < end or not self._stops))
            if not (gone or (final and not self.stopped)):
                break
            piece.tokens.append(token)
            piece.offsets.append(begin)
            del self._held[0]
        return piece
