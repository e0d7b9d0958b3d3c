"""/v1/chat/completions: a chat written out as a text that a base model can continue."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from longread.engine import Token
from longread.server.choices import (
    Continuation,
    check_model,
    completed,
    limited,
    merged,
    sampling_of,
    top_of,
    usage,
)
from longread.server.openai.template import ends_of, text_of
from longread.server.openai_models import ChatRequest
from longread.server.replies import REPLIES, STREAM_OF_OBJECTS
from longread.server.service import Service, TheService
from longread.server.stream import Event, streamed
from longread.server.text import Piece, stops_of, token_bytes, token_text
from longread.server.work import Work

router = APIRouter(tags=["OpenAI"])

MOST_TOKENS = 512
"""Of an answer whose request does not say how long it may be."""


@router.post("/v1/chat/completions", responses=REPLIES | {200: STREAM_OF_OBJECTS}, response_model=None)
async def chat(body: ChatRequest, request: Request, service: TheService) -> Response | dict[str, Any]:
    """Answers a chat, written out as a text with the speakers' names; the model is no chat model."""
    check_model(service, body.model)
    answer = await service.run(_Answer, service, body)
    if body.stream:
        return await streamed(answer.events(request), named=False)
    async with Work(service, request) as work:
        async for _ in answer.pieces(work):
            pass
    return answer.whole()


class _Answer:
    """One request and what has come of it."""

    def __init__(self, service: Service, body: ChatRequest) -> None:
        self._service, self._body = service, body
        self._id, self._created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self._prompt = service.encode(text_of(body.messages), bos=True)[0]
        asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        self._max_tokens = MOST_TOKENS if asked is None else asked
        self._n = body.n or 1
        limited(service, [self._prompt], self._n, self._max_tokens, body.top_logprobs or 0)
        stops = [*stops_of(body.stop), *ends_of(body.messages)]
        self._choices = [Continuation(i, stops) for i in range(self._n)]

    async def pieces(self, work: Work) -> AsyncGenerator[tuple[Continuation, Piece], None]:
        """Everything that is written, in the order in which it becomes known."""
        sources = []
        for choice in self._choices:
            logprobs = self._body.top_logprobs or 0
            sampling = sampling_of(self._service, self._body, self._max_tokens, logprobs, choice.index)
            running = await completed(self._service, work, self._prompt, sampling, learn=self._body.learn)
            sources.append(choice.follow(self._service, work, running, self._prompt))
        async for index, piece in merged(sources):
            yield self._choices[index], piece
        self._service.meters.tokens.labels("read").inc(len(self._prompt) * self._n)
        self._service.meters.tokens.labels("written").inc(sum(choice.num_tokens for choice in self._choices))

    async def events(self, request: Request) -> AsyncGenerator[Event, None]:
        """The answer as OpenAI streams it."""
        accounted = self._body.stream_options is not None and self._body.stream_options.include_usage
        extra = {"usage": None} if accounted else {}
        begun = set()
        async with Work(self._service, request) as work:
            async for choice, piece in self.pieces(work):
                delta = {} if choice.index in begun else {"role": "assistant"}
                begun.add(choice.index)
                shown = self._shown(choice, piece)
                shown["delta"] = delta | {"content": piece.text}
                yield None, self._body_of("chat.completion.chunk", [shown], extra)
        if accounted:
            yield None, self._body_of("chat.completion.chunk", [], {"usage": self._usage()})
        yield None, "[DONE]"

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        choices = []
        for choice in self._choices:
            shown = self._shown(choice, choice.whole)
            shown["message"] = {"role": "assistant", "content": choice.text, "refusal": None}
            choices.append(shown)
        return self._body_of("chat.completion", choices, {"usage": self._usage()})

    def _shown(self, choice: Continuation, piece: Piece) -> dict[str, Any]:
        logprobs = {"content": [self._entry(token) for token in piece.tokens], "refusal": None}
        return {
            "index": choice.index,
            "logprobs": logprobs if self._body.logprobs else None,
            "finish_reason": piece.reason,
        }

    def _entry(self, token: Token) -> dict[str, Any]:
        top = top_of(token)[: self._body.top_logprobs or 0]
        return self._named(token.id, token.logprob) | {"top_logprobs": [self._named(i, logprob) for i, logprob in top]}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        tokenizer = self._service.tokenizer
        text, its_bytes = token_text(tokenizer, token), token_bytes(tokenizer, token)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": its_bytes}

    def _body_of(self, kind: str, choices: list[dict[str, Any]], extra: dict[str, Any]) -> dict[str, Any]:
        head = {"id": self._id, "object": kind, "created": self._created, "model": self._service.name}
        if self._body.service_tier is not None:
            extra = extra | {"service_tier": "default"}
        return head | {"choices": choices} | extra

    def _usage(self) -> dict[str, Any]:
        return usage([self._prompt], sum(choice.num_tokens for choice in self._choices))
