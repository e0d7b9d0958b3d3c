"""/v1/completions: prompts continued by sessions that live as long as the request."""

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
from longread.server.openai_models import CompletionRequest
from longread.server.replies import REPLIES, STREAM_OF_OBJECTS
from longread.server.service import Service, TheService, number
from longread.server.stream import Event, streamed
from longread.server.text import Piece, Writer, stops_of, token_text
from longread.server.work import Work

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/completions", responses=REPLIES | {200: STREAM_OF_OBJECTS}, response_model=None)
async def completions(body: CompletionRequest, request: Request, service: TheService) -> Response | dict[str, Any]:
    """Continues prompts: texts, or lists of token ids. A text begins with BOS; token ids are read as they are."""
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

    def __init__(self, service: Service, body: CompletionRequest) -> None:
        self._service, self._body = service, body
        self._id, self._created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        self._prompts, self._hidden = _prompts(service, body)
        self._max_tokens, self._n = 16 if body.max_tokens is None else body.max_tokens, body.n or 1
        limited(service, self._prompts, self._n, self._max_tokens, body.logprobs or 0)
        stops = stops_of(body.stop)
        self._choices = [Continuation(i, stops) for i in range(len(self._prompts) * self._n)]
        self._echoes: dict[int, Piece] = {}

    async def pieces(self, work: Work) -> AsyncGenerator[tuple[Continuation, Piece], None]:
        """Everything that is written, in the order in which it becomes known."""
        sources = []
        for choice in self._choices:
            ids = self._prompts[choice.index // self._n]
            sampling = sampling_of(
                self._service, self._body, self._max_tokens, self._body.logprobs or 0, choice.index % self._n
            )
            running = await completed(self._service, work, ids, sampling, learn=self._body.learn)
            sources.append(choice.follow(self._service, work, running, ids))
        async for index, piece in merged(sources):
            yield self._choices[index], piece
        self._service.meters.tokens.labels("read").inc(sum(map(len, self._prompts)) * self._n)
        self._service.meters.tokens.labels("written").inc(sum(choice.num_tokens for choice in self._choices))

    async def events(self, request: Request) -> AsyncGenerator[Event, None]:
        """The answer as OpenAI streams it."""
        accounted = self._body.stream_options is not None and self._body.stream_options.include_usage
        extra = {"usage": None} if accounted else {}
        async with Work(self._service, request) as work:
            async for choice, piece in self.pieces(work):
                if self._body.echo and choice.index not in self._echoes:
                    yield None, self._chunk([self._shown(choice, self._echo(choice))], extra)
                yield None, self._chunk([self._shown(choice, piece)], extra)
        if accounted:
            yield None, self._chunk([], {"usage": self._usage()})
        yield None, "[DONE]"

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        shown = []
        for choice in self._choices:
            piece = choice.whole
            if self._body.echo:
                echo = self._echo(choice)
                offsets = echo.offsets + [len(echo.text) + offset for offset in piece.offsets]
                piece = Piece(echo.text + piece.text, echo.tokens + piece.tokens, offsets, reason=piece.reason)
                self._echoes.clear()
            shown.append(self._shown(choice, piece))
        return self._chunk(shown, {"usage": self._usage()})

    def _echo(self, choice: Continuation) -> Piece:
        """The prompt as a piece of text, without a BOS that was not in it."""
        writer, echo = Writer(self._service.tokenizer), Piece()
        pieces = [writer.push(token) for token in choice.prompt[self._hidden :]]
        for piece in [*pieces, writer.close()]:
            echo.tokens += piece.tokens
            echo.offsets += piece.offsets
        echo.text = writer.text
        self._echoes[choice.index] = echo
        return echo

    def _shown(self, choice: Continuation, piece: Piece) -> dict[str, Any]:
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
            "tokens": [token_text(self._service.tokenizer, token.id) for token in piece.tokens],
            "token_logprobs": [number(token.logprob) for token in piece.tokens],
            "top_logprobs": [self._top(token) for token in piece.tokens],
            "text_offset": [start + offset for offset in piece.offsets],
        }

    def _top(self, token: Token) -> dict[str, float] | None:
        if number(token.logprob) is None:
            return None
        found: dict[str, float] = {}
        for i, logprob in top_of(token):
            found.setdefault(token_text(self._service.tokenizer, i), logprob)
        return found

    def _chunk(self, choices: list[dict[str, Any]], extra: dict[str, Any]) -> dict[str, Any]:
        head = {"id": self._id, "object": "text_completion", "created": self._created, "model": self._service.name}
        return head | {"choices": choices} | extra

    def _usage(self) -> dict[str, Any]:
        return usage(self._prompts, sum(choice.num_tokens for choice in self._choices))


def _prompts(service: Service, body: CompletionRequest) -> tuple[list[list[int]], int]:
    """What is read for each prompt, and how many tokens of it the client did not send."""
    prompt = "" if body.prompt is None else body.prompt
    given: list[Any] = [prompt] if isinstance(prompt, str) else list(prompt)
    if given and isinstance(given[0], int):
        given = [given]
    if given and isinstance(given[0], str):
        return [service.encode(text, bos=True)[0] for text in given], int(service.tokenizer.bos_id is not None)
    for ids in given:
        service.check_tokens(ids, "prompt")
    return given, 0
