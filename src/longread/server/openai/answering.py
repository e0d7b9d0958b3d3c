"""A request for completions or for a chat, and what has come of it: what the two have in common."""

from __future__ import annotations

import contextlib
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any, ClassVar

from fastapi import Request

from longread.server.choices import Choice, Piece, merged, sampling_of
from longread.server.errors import ApiError
from longread.server.openai.history import COMPLETION, StoredResponse
from longread.server.openai.kept import KeptSession
from longread.server.openai.prompts import Prompt
from longread.server.openai.requests import OpenAIRequest
from longread.server.service import Service, Work
from longread.server.stream import Event


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
