"""One prompt continued once: the engine's task as pieces of text, for completions, chats and sessions alike."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from longread.engine import Progress, Sampling, Token
from longread.server.errors import ApiError
from longread.server.openai_models import Writing
from longread.server.service import Service
from longread.server.text import Piece, Writer
from longread.server.work import Running, Work
from longread.session.sampling import derived_seed

T = TypeVar("T")


def sampling_of(service: Service, request: Writing, max_tokens: int, logprobs: int, choice: int = 0) -> Sampling:
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
class Continuation:
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


def limited(service: Service, prompts: Sequence[Sequence[int]], n: int, max_tokens: int, logprobs: int) -> None:
    """Refuses a request that is too large before any of it is begun."""
    if not prompts or not all(prompts):
        raise ApiError(400, "a prompt has no tokens; give at least one", param="prompt")
    most = service.limits.choices
    if len(prompts) * n > most:
        message = f"{len(prompts) * n} choices, n of each prompt, are more than {most}; send several requests"
        raise ApiError(400, message, param="n")
    # the likeliest tokens of a place are kept until the answer goes out, so each counts like a token
    service.check_amount(sum(len(prompt) + max_tokens for prompt in prompts) * n * (1 + logprobs))


def check_model(service: Service, model: str) -> None:
    """Refuses the name of a model that is not here."""
    if model != service.name:
        message = f"there is no model {model[:100]!r} here; there is {service.name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


async def completed(service: Service, work: Work, ids: list[int], sampling: Sampling, *, learn: bool | None) -> Running:
    """A session of its own reads the prompt and continues it; it is gone when the continuation ends."""
    return await work.run(service.engine.complete, ids, sampling, learn=service.learn if learn is None else learn)


def usage(prompts: Sequence[Sequence[int]], written: int) -> dict[str, Any]:
    """OpenAI's account of a request; a prompt counts once, however many choices go on from it."""
    read = sum(map(len, prompts))
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
