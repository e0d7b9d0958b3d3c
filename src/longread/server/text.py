"""Token ids that come one by one, as text that goes out in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from longread.engine import Token
from longread.server.errors import ApiError
from longread.tokenizer import ByteTokenizer, StreamDecoder, Tokenizer

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
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
    """Makes text of engine tokens, and says where in it each begins.

    Args:
        stops: the text ends before the first of these.
        before: what the first token goes on from; its text is not shown again.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), before: Sequence[int] = ()) -> None:
        self._decoder = StreamDecoder(tokenizer, before=before, stops=stops)
        self._stops = bool(stops)
        self._tokenizer = tokenizer
        self._taken: list[int] = []
        self._ends = [0]  # characters that are known before each of these and after the last
        self._texts: list[str] = []  # what has gone out
        self._sent = 0  # characters of it
        self._held: list[tuple[Token, int, int]] = []  # tokens not yet gone out, with begin and end in the text

    @property
    def stopped(self) -> bool:
        """Whether a stop text has come; nothing more goes out then."""
        return self._decoder.stopped

    @property
    def text(self) -> str:
        """Everything that has gone out."""
        return "".join(self._texts)

    @property
    def ids(self) -> list[int]:
        """What a reader must have read to be where the text ends: the tokens, but for what is part of a stop text."""
        if not self.stopped:
            return self._taken
        known = self._ends.index(max(end for end in self._ends if end <= self._sent))
        return [*self._taken[:known], *self._tokenizer.encode_inside(self.text[self._ends[known] :])[0]]

    def push(self, token: Token) -> Piece:
        """One more token."""
        begin = self._decoder.decoded
        text = self._decoder.push(token.id)
        self._held.append((token, begin, self._decoder.decoded))
        self._taken.append(token.id)
        self._ends.append(self._decoder.decoded)
        return self._sending(text, final=False)

    def close(self) -> Piece:
        """What is left when no more tokens come."""
        if self.stopped:
            return Piece()
        return self._sending(self._decoder.close(), final=True)

    def _sending(self, text: str, *, final: bool) -> Piece:
        """The text, and the tokens whose text has gone out with it."""
        self._texts.append(text)
        self._sent += len(text)
        piece, end = Piece(text, stopped=self.stopped), self._sent
        while self._held:
            token, begin, finish = self._held[0]
            gone = begin < end if self.stopped else finish < end or (finish == end and (begin < end or not self._stops))
            if not (gone or (final and not self.stopped)):
                break
            piece.tokens.append(token)
            piece.offsets.append(begin)
            del self._held[0]
        return piece
