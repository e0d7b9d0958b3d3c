"""One response on the engine: a session goes on from another, reads the input, writes, and is kept."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from longread.server.catalog import Catalog
from longread.server.choices import Choice, Piece, logprobs_of, sampling_of, stops_of
from longread.server.errors import ApiError, as_api_error, logger
from longread.server.openai.bodies import LOGPROBS, InputItem, ResponseContext, ResponseRequest
from longread.server.openai.completions import MOST_TOKENS
from longread.server.openai.history import RESPONSE, StoredResponse
from longread.server.openai.objects import ResponseObject, item_of, new_id, usage_of
from longread.server.openai.prompts import KeptSession, Prompt, reusing
from longread.server.openai.stored import Responses
from longread.server.openai.template import ends_of, text_of
from longread.server.service import Service, Work
from longread.server.stream import Event


@dataclass(frozen=True)
class ResponsePast:
    """What a response goes on from."""

    base: StoredResponse | None = None
    """Whose session has read all that comes before `unread`."""
    position: int = 0
    """Of that session."""
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

    def prompt(self, service: Service, body: ResponseContext) -> Prompt:
        """The same as token ids."""
        text = text_of(self.messages(body), goes_on=self.base is not None)
        if self.base is None:
            return Prompt(service.encode(text, bos=True)[0])
        ids = service.encode(text, bos=False, inside=True)[0]
        return Prompt(ids, self.base.session, self.position, prefix=self.base.prefix)


async def past_of(responses: Responses, service: Service, tenant: str, body: ResponseContext) -> ResponsePast:
    """What a request goes on from. Raises `ApiError` if that is not there, or if there is nothing to answer."""
    past, base = ResponsePast(), None
    if body.previous_response_id is not None:
        param = "previous_response_id"
        base = await responses.get(tenant, body.previous_response_id, param)
        past = ResponsePast(base, await responses.position(base, param))
    elif body.conversation_id is not None:
        await responses.conversation(tenant, body.conversation_id, "conversation")
        base, position = await responses.newest(body.conversation_id)
        heard = 0 if base is None else base.heard or 0
        items = await service.run(responses.history.items, body.conversation_id, heard)
        past = ResponsePast(base, position, [InputItem.model_validate(item) for item in items])
    if base is None and not past.messages(body):
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
        self._choice = Choice(0, [*stops_of(body.stop), *ends_of(body.messages)])

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
        service = self._service
        async with contextlib.AsyncExitStack() as stack:
            if self._body.conversation_id is not None:  # one turn after the other
                await stack.enter_async_context(self._catalog.turn(self._body.conversation_id))
            past = await past_of(self._responses, service, self._tenant, self._body)
            stack.enter_context(self._responses.using(past.base))
            prompt = await service.run(past.prompt, service, self._body)
            if past.base is None and service.reuses(self._body.reuse):
                prompt = await reusing(self._responses, service, self._tenant, prompt.ids, self._body.learn)
            service.check_amount(len(prompt.ids) + self._max_tokens * (1 + (self._body.top_logprobs or 0)))
            work = await stack.enter_async_context(Work(service, request))
            steps = self._kept(work, past, prompt) if self._keeps else self._passing(work, prompt)
            async with contextlib.aclosing(steps):
                async for event in steps:
                    yield event
        service.meters.tokens.labels("read").inc(len(prompt.ids))
        service.meters.tokens.labels("written").inc(self._choice.num_tokens)
        for event in self._object.finished():
            yield event

    async def _passing(self, work: Work, prompt: Prompt) -> AsyncGenerator[Event, None]:
        """Nothing stays: a session of the engine's own reads and writes, and is gone."""
        for event in self._begun(new_id("resp")):
            yield event
        async for event in self._written(work, prompt.ids, prompt.session, prompt.ids):
            yield event
        self._finish(prompt)

    async def _kept(self, work: Work, past: ResponsePast, prompt: Prompt) -> AsyncGenerator[Event, None]:
        """A new session goes on from the one before, and stays."""
        async with KeptSession(
            self._responses,
            self._service,
            self._tenant,
            origin=prompt.session,
            prefix=prompt.prefix,
            learn=self._body.learn,
        ) as session:
            for event in self._begun(f"{RESPONSE}{session.id}"):
                yield event
            await session.read(work, prompt.ids)
            async for event in self._written(work, [], session.id, prompt.ids):
                yield event
            await session.read(work, self._choice.ids, wrote=True)
            self._finish(prompt)
            await self._keep(session, past.base)

    def _begun(self, response_id: str) -> list[Event]:
        self._object = ResponseObject(response_id, self._body, self._service.name)
        return list(self._object.begin())

    async def _written(
        self, work: Work, tokens: list[int], session: str | None, read: list[int]
    ) -> AsyncGenerator[Event, None]:
        """The answer as it is written by a fork of a session that reads `tokens` first; `read` is before it."""
        service, most = self._service, self._body.top_logprobs or 0
        learn = service.learns(self._body.learn) if session is None else self._body.learn
        sampling = sampling_of(service, self._body, self._max_tokens, most)
        complete = service.engine.complete
        running = await work.run(complete, tokens, sampling, session_id=session, learn=learn, owner=work.tenant)
        async for piece in self._choice.follow(service, work, running, read):
            logprobs = self._entries(piece)
            self._logprobs += logprobs
            if piece.text:
                for event in self._object.delta(piece.text, logprobs):
                    yield event
        for event in self._object.end(self._choice.text, self._logprobs):
            yield event

    def _finish(self, prompt: Prompt) -> None:
        read = prompt.position + len(prompt.ids)
        usage = usage_of(read, prompt.position, len(self._choice.ids), kept=self._keeps)
        self._object.finish(self._choice.text, self._logprobs, self._choice.pieces[-1].reason or "stop", usage)

    async def _keep(self, session: KeptSession, base: StoredResponse | None) -> None:
        fields, body = self._object.fields, self._body
        items = [item_of(message) for message in body.messages]
        instructions = base.instructions if body.instructions is None and base is not None else body.instructions
        response = StoredResponse(fields["id"], self._tenant, fields, items, instructions, body.conversation_id)
        await session.keep(response, [*items, *fields["output"]], base)

    def _entries(self, piece: Piece) -> list[dict[str, Any]]:
        if LOGPROBS not in (self._body.include or ()):
            return []
        return [logprobs_of(self._service.tokenizer, token, self._body.top_logprobs or 0) for token in piece.tokens]
