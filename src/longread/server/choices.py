"""What sessions write: the engine's tokens as text that goes out in pieces, for all routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from longread.engine import Progress, Sampling, Token
from longread.server.errors import ApiError
from longread.server.schemas import WritingOptions
from longread.server.service import Running, Service, Work
from longread.session.sampling import derived_seed
from longread.tokenizer import ByteTokenizer, StreamDecoder, Tokenizer

T = TypeVar("T")
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
        rest = self.text[self._ends[known] :]
        for n in range(known, len(self._taken)):  # bytes that became no character, for one
            if self._tokenizer.decode(self._taken[known:n]) == rest:
                return self._taken[:n]
        return [*self._taken[:known], *self._tokenizer.encode_inside(rest)[0]]

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


def sampling_of(service: Service, request: WritingOptions, max_tokens: int, logprobs: int, choice: int = 0) -> Sampling:
    """What the engine should do; the choices of one request draw differently, and each the same every time."""
    return Sampling(
        max_tokens=max_tokens,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=request.top_k,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        seed=None if request.seed is None else derived_seed(request.seed, choice),
        stop_ids=service.stop_ids,
        logprobs=logprobs,
    )


@dataclass
class Choice:
    """How a prompt is being continued."""

    index: int
    stops: Sequence[str]
    prompt: list[Token] = field(default_factory=list)
    """The tokens that were read, with their log-probabilities; complete when the first piece comes."""
    pieces: list[Piece] = field(default_factory=list)
    num_tokens: int = 0
    """Written, those of a stop text included."""
    ids: list[int] = field(default_factory=list)
    """What a session must read to be where the text ends; complete after the last piece."""

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def whole(self) -> Piece:
        """All pieces in one."""
        tokens = [token for piece in self.pieces for token in piece.tokens]
        offsets = [offset for piece in self.pieces for offset in piece.offsets]
        return Piece(self.text, tokens, offsets, reason=self.pieces[-1].reason)

    async def follow(
        self, service: Service, work: Work, running: Running, read: Sequence[int]
    ) -> AsyncGenerator[Piece, None]:
        """Yields what is written, piece by piece; the last piece has a reason."""
        writer = Writer(service.tokenizer, self.stops, read)
        async for event in running:
            if isinstance(event, Progress):
                self._read(event, read)
            elif isinstance(event, Token) and not writer.stopped:
                self.num_tokens += 1
                piece = writer.push(event)
                self.pieces.append(piece)
                if piece.stopped:
                    running.task.cancel()
                else:
                    yield piece
        outcome = await running.result()
        self.ids = writer.ids
        if not writer.stopped:
            if outcome.reason == "cancelled":
                work.check("nothing of it is kept, so ask again, for less if it was too long")
                raise ApiError(503, "the continuation was cancelled", code="cancelled", retry_after=1)
            self.pieces.append(writer.close())
        self.pieces[-1].reason = "stop" if writer.stopped else outcome.reason
        yield self.pieces[-1]

    def _read(self, event: Progress, read: Sequence[int]) -> None:
        tops = event.top or [[] for _ in event.nll]
        for nll, top in zip(event.nll, tops, strict=True):
            self.prompt.append(Token(read[len(self.prompt)], -nll, top, len(self.prompt) + 1))


def logprobs_of(tokenizer: Tokenizer, token: Token, most: int) -> dict[str, Any]:
    """A token as chats and responses show it, with the `most` likeliest in its place."""

    def named(token: int, logprob: float) -> dict[str, Any]:
        text, its_bytes = token_text(tokenizer, token), token_bytes(tokenizer, token)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": its_bytes}

    top = [named(i, logprob) for i, logprob in top_of(token)[:most]]
    return named(token.id, token.logprob) | {"top_logprobs": top}


async def merged(sources: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """Items of several sources as they come, each with the number of its source. Raises what a source raises."""
    items: asyncio.Queue[tuple[int, T] | BaseException | None] = asyncio.Queue()

    async def drain(number: int, source: AsyncIterator[T]) -> None:
        try:
            async for item in source:
                items.put_nowait((number, item))
        except BaseException as error:
            items.put_nowait(error)
            raise
        items.put_nowait(None)

    tasks = [asyncio.create_task(drain(number, source)) for number, source in enumerate(sources)]
    try:
        left = len(tasks)
        while left:
            item = await items.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def top_of(token: Token) -> list[tuple[int, float]]:
    """The likeliest tokens with the chosen one among them, its number the same in both places to the last bit."""
    top = [(i, token.logprob if i == token.id else logprob) for i, logprob in token.top]
    return top if any(i == token.id for i, _ in top) else [*top, (token.id, token.logprob)]
