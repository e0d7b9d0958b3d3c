"""/v1/completions and /v1/chat/completions: prompts continued by sessions that live as long as the request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from longread.engine import Token
from longread.server.choices import (
    Choice,
    Piece,
    Writer,
    logprobs_of,
    stops_of,
    token_text,
    top_of,
)
from longread.server.openai.answering import Answering
from longread.server.openai.kept import KeptSession
from longread.server.openai.prompts import Prompt, kept_of, prompts_of
from longread.server.openai.requests import ChatRequest, CompletionRequest
from longread.server.openai.stored import TheResponses
from longread.server.openai.template import ends_of, text_of
from longread.server.schemas import REPLIES, STREAM_OF_OBJECTS
from longread.server.service import Service, Tenant, TheService, Work, number
from longread.server.stream import streamed

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

    prompts = await prompts_of(responses, service, tenant, body, encode, whole=bool(body.echo))
    texts = bool(given) and isinstance(given[0], str) and not any(prompt.position for prompt in prompts)
    hidden = int(texts and service.tokenizer.bos_id is not None)
    kept = None if body.echo else kept_of(responses, service, tenant, body, prompts)
    return await _answered(_Completion(service, body, prompts, hidden, kept), request)


@router.post("/v1/chat/completions", responses={200: STREAM_OF_OBJECTS}, response_model=None)
async def chat(
    body: ChatRequest, request: Request, service: TheService, responses: TheResponses, tenant: Tenant
) -> Response | dict[str, Any]:
    """Answers a chat, written out as a text with the speakers' names; the model is no chat model."""
    service.check_model(body.model)

    def encode(goes_on: bool) -> list[list[int]]:
        return [service.encode(text_of(body.messages, goes_on=goes_on), bos=not goes_on, inside=goes_on)[0]]

    prompts = await prompts_of(responses, service, tenant, body, encode)
    kept = kept_of(responses, service, tenant, body, prompts)
    return await _answered(_Chat(service, body, prompts, kept), request)


async def _answered(answering: Answering, request: Request) -> Response | dict[str, Any]:
    if answering.streams:
        return await streamed(answering.events(request), named=False)
    async with Work(answering.service, request) as work:
        async for _ in answering.pieces(work):
            pass
    return answering.whole()


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


def _given(body: CompletionRequest) -> list[Any]:
    """The prompts, each a text or a list of token ids."""
    prompt = "" if body.prompt is None else body.prompt
    given: list[Any] = [prompt] if isinstance(prompt, str) else list(prompt)
    return [given] if given and isinstance(given[0], int) else given
