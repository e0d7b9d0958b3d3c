"""One response on the engine: a session goes on from another, reads the input, writes, and is kept."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from longread.engine import Appended, Token
from longread.server.catalog import Catalog
from longread.server.chat import MOST_TOKENS
from longread.server.choices import Continuation, sampling_of, top_of
from longread.server.errors import ApiError, as_api_error
from longread.server.log import logger
from longread.server.openai.bodies import LOGPROBS, InputItem, ResponseContext, ResponseRequest
from longread.server.openai.history import RESPONSE, StoredResponse
from longread.server.openai.objects import ResponseObject, item_of, new_id, usage_of
from longread.server.openai.stored import Responses
from longread.server.openai.template import ends_of, text_of
from longread.server.service import Service
from longread.server.stream import Event
from longread.server.text import Piece, stops_of, token_bytes, token_text
from longread.server.work import Work


@dataclass(frozen=True)
class Past:
    """What a response goes on from."""

    base: StoredResponse | None = None
    """Whose session has read all that comes before `unread`."""
    unread: list[InputItem] = field(default_factory=list)
    """Items of a conversation that no session has read yet."""

    def messages(self, body: ResponseContext) -> list[InputItem]:
        """What is to be read, in order: instructions only if they are new."""
        before = None if self.base is None else self.base.instructions
        instructions = []
        if body.instructions and body.instructions != before:
            instructions = [InputItem(role="system", content=body.instructions)]
        if self.base is None:
            return [*instructions, *self.unread, *body.messages]
        return [*self.unread, *instructions, *body.messages]

    def tokens(self, service: Service, body: ResponseContext) -> list[int]:
        """The same as token ids."""
        goes_on = self.base is not None
        return service.encode(text_of(self.messages(body), goes_on=goes_on), bos=not goes_on, inside=goes_on)[0]


async def past_of(responses: Responses, service: Service, tenant: str, body: ResponseContext) -> Past:
    """What a request goes on from. Raises `ApiError` if that is not there, or if there is nothing to answer."""
    past = Past()
    if body.previous_response_id is not None:
        past = Past(await responses.get(tenant, body.previous_response_id, "previous_response_id"))
    elif body.conversation_id is not None:
        await responses.conversation(tenant, body.conversation_id, "conversation")
        base = await responses.newest(body.conversation_id)
        heard = 0 if base is None else base.heard or 0
        items = await service.run(responses.history.items, body.conversation_id, heard)
        past = Past(base, [InputItem.model_validate(item) for item in items])
    if past.base is None and not past.messages(body):
        raise ApiError(400, "input is missing; this request needs it", param="input")
    return past


class ResponseRun:
    """One request to /v1/responses, and what comes of it."""

    def __init__(
        self, service: Service, catalog: Catalog, responses: Responses, tenant: str, body: ResponseRequest
    ) -> None:
        self._service, self._catalog, self._responses = service, catalog, responses
        self._tenant, self._body = tenant, body
        self._max_tokens = body.max_output_tokens or MOST_TOKENS
        self._keeps = body.store is not False
        self._logprobs: list[dict[str, Any]] = []
        self._object: ResponseObject
        self._choice: Continuation

    async def whole(self, request: Request) -> dict[str, Any]:
        """The response, once it is finished."""
        async with contextlib.aclosing(self._events(request)) as events:
            async for _ in events:
                pass
        return self._object.fields

    async def streamed(self, request: Request) -> AsyncGenerator[Event, None]:
        """Its events. What goes wrong after the first is the last."""
        begun = False
        try:
            async with contextlib.aclosing(self._events(request)) as events:
                async for event in events:
                    yield event
                    begun = True
        except Exception as error:
            if not begun or isinstance(error, OSError):
                raise
            answer = as_api_error(error, self._service.directories)
            if answer.status_code == 500:
                logger.exception("a response failed")
            yield self._object.failed(answer.body["error"]["message"], "server_error")

    async def _events(self, request: Request) -> AsyncGenerator[Event, None]:
        async with contextlib.AsyncExitStack() as stack:
            if self._body.conversation_id is not None:  # one turn after the other
                await stack.enter_async_context(self._catalog.turn(self._body.conversation_id))
            past = await past_of(self._responses, self._service, self._tenant, self._body)
            stack.enter_context(self._responses.using(past.base))
            tokens = await self._service.run(past.tokens, self._service, self._body)
            most = self._body.top_logprobs or 0
            self._service.check_amount(len(tokens) + self._max_tokens * (1 + most))
            stops = [*stops_of(self._body.stop), *ends_of(self._body.messages)]
            self._choice = Continuation(0, stops)
            work = await stack.enter_async_context(Work(self._service, request))
            steps = self._kept(work, past, tokens) if self._keeps else self._passing(work, past, tokens)
            async with contextlib.aclosing(steps):
                async for event in steps:
                    yield event
        self._service.meters.tokens.labels("read").inc(len(tokens))
        self._service.meters.tokens.labels("written").inc(self._choice.num_tokens)
        for event in self._object.finished():
            yield event

    async def _passing(self, work: Work, past: Past, tokens: list[int]) -> AsyncGenerator[Event, None]:
        """Nothing stays: a session of the engine's own reads and writes, and is gone."""
        start = 0
        if past.base is not None:
            start = (await self._service.run(self._service.engine.info, past.base.session)).position
        self._object = ResponseObject(new_id("resp"), self._body, self._service.name)
        for event in self._object.begin():
            yield event
        async for event in self._written(work, tokens, None if past.base is None else past.base.session):
            yield event
        self._finish(start + len(tokens), start, len(self._choice.ids))

    async def _kept(self, work: Work, past: Past, tokens: list[int]) -> AsyncGenerator[Event, None]:
        """A new session goes on from the one before, and stays."""
        made = await self._responses.session(self._tenant, past.base, self._body.learn)
        session, start, kept = made.id, made.position, False
        try:
            self._object = ResponseObject(f"{RESPONSE}{session}", self._body, self._service.name)
            for event in self._object.begin():
                yield event
            await self._read(work, session, tokens, start)
            async for event in self._written(work, [], session, read=tokens):
                yield event
            read = start + len(tokens)
            ids = self._choice.ids
            await self._read(work, session, ids, read, wrote=True)
            self._finish(read, start, len(ids))
            kept = True  # or dropped by whoever keeps it, also if nobody waits for that
            await asyncio.shield(self._keep(past))
        finally:
            if not kept:
                await asyncio.shield(self._responses.drop(session))

    async def _read(self, work: Work, session: str, ids: list[int], position: int, *, wrote: bool = False) -> None:
        if not ids:
            return
        append = self._service.engine.append
        outcome: Appended = await (
            await work.run(append, session, ids, expected_position=position, wrote=wrote)
        ).result()
        if outcome.cancelled:
            work.check("nothing of it is kept, so ask again, for less if it was too long")
            raise ApiError(503, "the response was cancelled", code="cancelled", retry_after=1)

    async def _written(
        self, work: Work, tokens: list[int], session: str | None, read: list[int] | None = None
    ) -> AsyncGenerator[Event, None]:
        """The answer as it is written, after `tokens` that are read first, or `read` that have been."""
        learn = self._service.learn if session is None and self._body.learn is None else self._body.learn
        sampling = sampling_of(self._service, self._body, self._max_tokens, self._body.top_logprobs or 0)
        running = await work.run(self._service.engine.complete, tokens, sampling, session_id=session, learn=learn)
        async for piece in self._choice.follow(self._service, work, running, tokens if read is None else read):
            logprobs = self._entries(piece)
            self._logprobs += logprobs
            if piece.text:
                for event in self._object.delta(piece.text, logprobs):
                    yield event
        for event in self._object.end(self._choice.text, self._logprobs):
            yield event

    def _finish(self, read: int, cached: int, written: int) -> None:
        usage = usage_of(read, cached, written, kept=self._keeps)
        reason = self._choice.pieces[-1].reason or "stop"
        self._object.finish(self._choice.text, self._logprobs, reason, usage)

    async def _keep(self, past: Past) -> None:
        fields, base = self._object.fields, past.base
        items = [item_of(message) for message in self._body.messages]
        before = None if base is None else base.instructions
        instructions = before if self._body.instructions is None else self._body.instructions
        response = StoredResponse(fields["id"], self._tenant, fields, items, instructions, self._body.conversation_id)
        await self._responses.keep(response, [*items, *fields["output"]], base)

    def _entries(self, piece: Piece) -> list[dict[str, Any]]:
        if LOGPROBS not in (self._body.include or ()):
            return []
        most = self._body.top_logprobs or 0
        return [
            self._named(token) | {"top_logprobs": [self._named(Token(i, p, [], 0)) for i, p in top_of(token)[:most]]}
            for token in piece.tokens
        ]

    def _named(self, token: Token) -> dict[str, Any]:
        tokenizer = self._service.tokenizer
        text, its_bytes = token_text(tokenizer, token.id), token_bytes(tokenizer, token.id)
        return {"token": text, "logprob": max(token.logprob, -9999.0), "bytes": its_bytes or []}
