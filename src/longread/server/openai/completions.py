"""/v1/completions and /v1/chat/completions: prompts continued by sessions that live as long as the request."""

from __future__ import annotations

import contextlib
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import Any, ClassVar

from fastapi import APIRouter, Request
from fastapi.responses import Response

from longread.engine import Token
from longread.server.choices import (
    Choice,
    Piece,
    Writer,
    logprobs_of,
    merged,
    sampling_of,
    stops_of,
    token_text,
    top_of,
)
from longread.server.errors import ApiError
from longread.server.openai.history import COMPLETION, StoredResponse
from longread.server.openai.prompts import KeptSession, Prompt, reusing
from longread.server.openai.requests import ChatRequest, CompletionRequest, OpenAIRequest
from longread.server.openai.stored import Responses, TheResponses
from longread.server.openai.template import ends_of, text_of
from longread.server.schemas import REPLIES, STREAM_OF_OBJECTS
from longread.server.service import Service, Tenant, TheService, Work, number
from longread.server.stream import Event, streamed

router = APIRouter(tags=["OpenAI"], responses=REPLIES)

MOST_TOKENS = 512
"""Of an answer whose request does not say how long it may be."""


@router.post("/v1/completions", responses={200: STREAM_OF_OBJECTS}, response_model=None)
async def completions(
    body: CompletionRequest, request: Request, service: TheService, responses: TheResponses, tenant: Tenant
) -> Response | dict[str, Any]:
    """Continues prompts: texts, or lists of token ids. A text begins with BOS; token ids are read as they are."""
    service.check_model(body.model)
    given = _given(body)

    def encode(goes_on: bool) -> list[list[int]]:
        for ids in given:
            if not isinstance(ids, str):
                service.check_tokens(ids, "prompt")
        return [
            service.encode(one, bos=not goes_on, inside=goes_on)[0] if isinstance(one, str) else one for one in given
        ]

    prompts = await _prompts_of(responses, service, tenant, body, encode, whole=bool(body.echo))
    texts = bool(given) and isinstance(given[0], str) and not any(prompt.position for prompt in prompts)
    hidden = int(texts and service.tokenizer.bos_id is not None)
    kept = None if body.echo else _kept_of(responses, service, tenant, body, prompts)
    return await _answered(_Completion(service, body, prompts, hidden, kept), request)


@router.post("/v1/chat/completions", responses={200: STREAM_OF_OBJECTS}, response_model=None)
async def chat(
    body: ChatRequest, request: Request, service: TheService, responses: TheResponses, tenant: Tenant
) -> Response | dict[str, Any]:
    """Answers a chat, written out as a text with the speakers' names; the model is no chat model."""
    service.check_model(body.model)

    def encode(goes_on: bool) -> list[list[int]]:
        return [service.encode(text_of(body.messages, goes_on=goes_on), bos=not goes_on, inside=goes_on)[0]]

    prompts = await _prompts_of(responses, service, tenant, body, encode)
    kept = _kept_of(responses, service, tenant, body, prompts)
    return await _answered(_Chat(service, body, prompts, kept), request)


async def _answered(answering: Answering, request: Request) -> Response | dict[str, Any]:
    if answering.streams:
        return await streamed(answering.events(request), named=False)
    async with Work(answering.service, request) as work:
        async for _ in answering.pieces(work):
            pass
    return answering.whole()


def _given(body: CompletionRequest) -> list[Any]:
    """The prompts, each a text or a list of token ids."""
    prompt = "" if body.prompt is None else body.prompt
    given: list[Any] = [prompt] if isinstance(prompt, str) else list(prompt)
    return [given] if given and isinstance(given[0], int) else given


async def _prompts_of(
    responses: Responses,
    service: Service,
    tenant: str,
    body: OpenAIRequest,
    encode: Callable[[bool], list[list[int]]],
    *,
    whole: bool = False,
) -> list[Prompt]:
    """The prompts of a request.

    Args:
        encode: their token ids, given whether they go on from what a session has read.
        whole: every token of them must be read.

    Raises:
        ApiError: the session that the request names is not there.
    """
    if body.session is not None:
        session, position = await responses.named(tenant, body.session)
        return [Prompt(ids, session, position) for ids in await service.run(encode, position > 0)]
    prompts = [Prompt(ids) for ids in await service.run(encode, False)]
    if whole or not service.reuses(body.reuse):
        return prompts
    return [await reusing(responses, service, tenant, prompt.ids, body.learn) for prompt in prompts]


def _kept_of(
    responses: Responses, service: Service, tenant: str, body: OpenAIRequest, prompts: Sequence[Prompt]
) -> KeptSession | None:
    """The session that reads a prompt, writes and stays; None: one that ends with the request does."""
    if not (body.store and service.reuses(body.reuse) and body.session is None and len(prompts) * (body.n or 1) == 1):
        return None
    (prompt,) = prompts
    return KeptSession(
        responses, service, tenant, origin=prompt.session, prefix=prompt.prefix, learn=service.learns(body.learn)
    )


class Answering(ABC):
    """One request and what has come of it.

    Args:
        prompts: what is read for each.
        max_tokens: of each choice.
        logprobs: how many of the likeliest tokens are told of each place.
        stops: where a choice ends.
        kept: reads the only prompt and stays; None: the engine's own sessions read.
    """

    KINDS: ClassVar[tuple[str, str, str]]
    """How ids begin, what an answer is called, and a piece of one."""

    def __init__(
        self,
        service: Service,
        body: OpenAIRequest,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int,
        logprobs: int,
        stops: Sequence[str],
        kept: KeptSession | None,
    ) -> None:
        self.service, self.streams, self._kept = service, bool(body.stream), kept
        self._asked, self._prompts, self._n = body, prompts, body.n or 1
        self._max_tokens, self._top = max_tokens, logprobs
        self._id, self._created = f"{self.KINDS[0]}-{secrets.token_hex(12)}", int(time.time())
        self._check()
        self._choices = [Choice(i, stops) for i in range(len(prompts) * self._n)]

    def _check(self) -> None:
        """Refuses a request that is too large before any of it is begun."""
        if not self._prompts or any(not prompt.ids and prompt.session is None for prompt in self._prompts):
            raise ApiError(400, "a prompt has no tokens; give at least one", param="prompt")
        most, count = self.service.limits.choices, len(self._prompts) * self._n
        if count > most:
            message = f"{count} choices, n of each prompt, are more than {most}; send several requests"
            raise ApiError(400, message, param="n")
        # the likeliest tokens of a place are kept until the answer goes out, so each counts like a token
        read = sum(len(prompt.ids) + self._max_tokens for prompt in self._prompts)
        self.service.check_amount(read * self._n * (1 + self._top))

    async def pieces(self, work: Work) -> AsyncGenerator[tuple[Choice, Piece], None]:
        """Everything that is written, in the order in which it becomes known."""
        service = self.service
        async with contextlib.AsyncExitStack() as stack:
            kept = await stack.enter_async_context(self._kept) if self._kept is not None else None
            if kept is not None:
                await kept.read(work, self._prompts[0].ids)
            sources = [await self._begun(work, choice, kept) for choice in self._choices]
            async for index, piece in merged(sources):
                yield self._choices[index], piece
            if kept is not None:
                await kept.read(work, self._choices[0].ids, wrote=True)
                await kept.keep(StoredResponse(f"{COMPLETION}{kept.id}", kept.tenant, {}, [], None))
        service.meters.tokens.labels("read").inc(sum(len(prompt.ids) for prompt in self._prompts) * self._n)
        service.meters.tokens.labels("written").inc(sum(choice.num_tokens for choice in self._choices))

    async def _begun(self, work: Work, choice: Choice, kept: KeptSession | None) -> AsyncGenerator[Piece, None]:
        prompt, complete = self._prompts[choice.index // self._n], self.service.engine.complete
        sampling = sampling_of(self.service, self._asked, self._max_tokens, self._top, choice.index % self._n)
        learn = self._asked.learn if prompt.session is not None else self.service.learns(self._asked.learn)
        read, session = (prompt.ids, prompt.session) if kept is None else ([], kept.id)
        running = await work.run(complete, read, sampling, session_id=session, learn=learn, owner=work.tenant)
        return choice.follow(self.service, work, running, prompt.ids)

    async def events(self, request: Request) -> AsyncGenerator[Event, None]:
        """The answer as OpenAI streams it."""
        accounted = self._asked.stream_options is not None and self._asked.stream_options.include_usage
        extra = {"usage": None} if accounted else {}
        async with Work(self.service, request) as work:
            async for choice, piece in self.pieces(work):
                for shown in self._chunks(choice, piece):
                    yield None, self._object(self.KINDS[2], [shown], extra)
        if accounted:
            yield None, self._object(self.KINDS[2], [], {"usage": self._usage()})
        yield None, "[DONE]"

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        shown = [self._message(choice) for choice in self._choices]
        return self._object(self.KINDS[1], shown, {"usage": self._usage()})

    @abstractmethod
    def _chunks(self, choice: Choice, piece: Piece) -> Iterator[dict[str, Any]]:
        """A piece of a choice, as a stream has it."""

    @abstractmethod
    def _message(self, choice: Choice) -> dict[str, Any]:
        """A choice in one piece."""

    def _object(self, kind: str, choices: list[dict[str, Any]], extra: dict[str, Any]) -> dict[str, Any]:
        head = {"id": self._id, "object": kind, "created": self._created, "model": self.service.name}
        return head | {"choices": choices} | extra

    def _usage(self) -> dict[str, Any]:
        """OpenAI's account; a prompt counts once, however many choices go on from it, with all that is before it."""
        cached = sum(prompt.position for prompt in self._prompts)
        read = cached + sum(len(prompt.ids) for prompt in self._prompts)
        written = sum(choice.num_tokens for choice in self._choices)
        found = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        return found | {"prompt_tokens_details": {"cached_tokens": cached}}


class _Completion(Answering):
    """Of texts, or of token ids; `hidden` tokens at the beginning were not in the prompt."""

    KINDS = ("cmpl", "text_completion", "text_completion")

    def __init__(
        self,
        service: Service,
        body: CompletionRequest,
        prompts: Sequence[Prompt],
        hidden: int,
        kept: KeptSession | None,
    ) -> None:
        super().__init__(
            service,
            body,
            prompts,
            max_tokens=16 if body.max_tokens is None else body.max_tokens,
            logprobs=body.logprobs or 0,
            stops=stops_of(body.stop),
            kept=kept,
        )
        self._body, self._hidden = body, hidden
        self._echoes: dict[int, Piece] = {}

    def _chunks(self, choice: Choice, piece: Piece) -> Iterator[dict[str, Any]]:
        if self._body.echo and choice.index not in self._echoes:
            yield self._shown(choice, self._echo(choice))
        yield self._shown(choice, piece)

    def _message(self, choice: Choice) -> dict[str, Any]:
        piece = choice.whole
        if self._body.echo:
            echo = self._echo(choice)
            offsets = echo.offsets + [len(echo.text) + offset for offset in piece.offsets]
            piece = Piece(echo.text + piece.text, echo.tokens + piece.tokens, offsets, reason=piece.reason)
            self._echoes.clear()
        return self._shown(choice, piece)

    def _echo(self, choice: Choice) -> Piece:
        """The prompt as a piece of text, without a BOS that was not in it."""
        writer, echo = Writer(self.service.tokenizer), Piece()
        pieces = [writer.push(token) for token in choice.prompt[self._hidden :]]
        for piece in [*pieces, writer.close()]:
            echo.tokens += piece.tokens
            echo.offsets += piece.offsets
        echo.text = writer.text
        self._echoes[choice.index] = echo
        return echo

    def _shown(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        echo = self._echoes.get(choice.index)
        start = len(echo.text) if echo is not None and echo is not piece else 0
        return {
            "index": choice.index,
            "text": piece.text,
            "logprobs": None if self._body.logprobs is None else self._logprobs(piece, start),
            "finish_reason": piece.reason,
        }

    def _logprobs(self, piece: Piece, start: int) -> dict[str, Any]:
        return {
            "tokens": [token_text(self.service.tokenizer, token.id) for token in piece.tokens],
            "token_logprobs": [number(token.logprob) for token in piece.tokens],
            "top_logprobs": [self._likeliest(token) for token in piece.tokens],
            "text_offset": [start + offset for offset in piece.offsets],
        }

    def _likeliest(self, token: Token) -> dict[str, float] | None:
        if number(token.logprob) is None:
            return None
        found: dict[str, float] = {}
        for i, logprob in top_of(token):
            found.setdefault(token_text(self.service.tokenizer, i), logprob)
        return found


class _Chat(Answering):
    """Of a chat."""

    KINDS = ("chatcmpl", "chat.completion", "chat.completion.chunk")

    def __init__(
        self, service: Service, body: ChatRequest, prompts: Sequence[Prompt], kept: KeptSession | None
    ) -> None:
        asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        super().__init__(
            service,
            body,
            prompts,
            max_tokens=MOST_TOKENS if asked is None else asked,
            logprobs=body.top_logprobs or 0,
            stops=[*stops_of(body.stop), *ends_of(body.messages)],
            kept=kept,
        )
        self._body, self._named = body, set[int]()

    def _chunks(self, choice: Choice, piece: Piece) -> Iterator[dict[str, Any]]:
        role = {} if choice.index in self._named else {"role": "assistant"}
        self._named.add(choice.index)
        yield self._shown(choice, piece) | {"delta": role | {"content": piece.text}}

    def _message(self, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return self._shown(choice, choice.whole) | {"message": message}

    def _shown(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        tokenizer, most = self.service.tokenizer, self._top
        content = [logprobs_of(tokenizer, token, most) for token in piece.tokens] if self._body.logprobs else None
        return {
            "index": choice.index,
            "logprobs": None if content is None else {"content": content, "refusal": None},
            "finish_reason": piece.reason,
        }

    def _object(self, kind: str, choices: list[dict[str, Any]], extra: dict[str, Any]) -> dict[str, Any]:
        tier = {} if self._body.service_tier is None else {"service_tier": "default"}
        return super()._object(kind, choices, extra | tier)
