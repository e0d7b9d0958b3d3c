"""A session continues its text: what it writes it has also read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from longread.engine import Sampling, Token, UnknownSession, WrongPosition
from longread.server.catalog import Catalog, Entry
from longread.server.choices import Piece, Writer, token_text, top_of
from longread.server.service import Running, Service, Work, number
from longread.server.stream import Event


class SessionWriting:
    """One continuation by a session.

    A stop text shows only once its last token has been read. So with stop texts a fork that nobody sees writes, and the
    session reads what is kept of that; its twin reads it in any case.
    """

    def __init__(
        self,
        service: Service,
        catalog: Catalog,
        tenant: str,
        session: str,
        sampling: Sampling,
        stops: Sequence[str],
        *,
        logprobs: bool,
    ) -> None:
        self._service, self._catalog, self._tenant, self._session = service, catalog, tenant, session
        self._sampling, self._stops, self._logprobs = sampling, stops, logprobs
        self._begun = time.perf_counter()
        self._writer = Writer(service.tokenizer, stops)
        self._tokens: list[Token] = []
        self._reason, self._start = "cancelled", 0

    async def events(self, work: Work) -> AsyncGenerator[Event, None]:
        """Pieces of text as they become certain."""
        async with self._catalog.turn(self._session):
            entry = await self._catalog.get(self._tenant, self._session)
            await self._begin(entry)
            try:
                engine = self._service.engine
                if self._stops:
                    running = await work.run(engine.complete, [], self._sampling, session_id=self._session)
                else:
                    running = await work.run(engine.generate, self._session, self._sampling)
                self._catalog.under_way(self._session, running.task)
                async for piece in self._written(running):
                    yield "token", self._shown(piece)
            finally:
                await asyncio.shield(self._read(entry))
        self._service.meters.tokens.labels("written").inc(len(self._tokens))
        if self._reason == "cancelled":
            text, count = self._writer.text, len(self._ids)
            facts = {"start": self._start, "position": self._start + count, "tokens": count, "text": text}
            work.check(f"the {count} tokens that were written stay, so go on from there", **facts)

    def done(self) -> dict[str, Any]:
        """The continuation, once it is over."""
        seconds = time.perf_counter() - self._begun
        return {
            "session": self._session,
            "text": self._writer.text,
            "tokens": self._ids,
            "finish_reason": self._reason,
            "start": self._start,
            "position": self._start + len(self._ids),
            "seconds": seconds,
            "tokens_per_second": len(self._ids) / max(seconds, 1e-9),
            "logprobs": self._entries(self._tokens),
        }

    @property
    def _ids(self) -> list[int]:
        """What has been written, up to where the text ends."""
        return self._writer.ids if self._writer.stopped else [token.id for token in self._tokens]

    async def _begin(self, entry: Entry) -> None:
        """A session that has read nothing begins a text: with BOS, if there is one."""
        self._start = entry.info.position
        if self._start == 0 and self._service.tokenizer.bos_id is not None:
            for session in (self._session, entry.twin):
                if session is not None:
                    await self._append(session, [self._service.tokenizer.bos_id], 0)
            self._start = 1

    async def _written(self, running: Running) -> AsyncGenerator[Piece, None]:
        async for event in running:
            if isinstance(event, Token) and not self._writer.stopped:
                piece = self._writer.push(event)
                self._tokens += piece.tokens
                if piece.stopped:
                    running.task.cancel()
                yield piece
        outcome = await running.result()
        rest = self._writer.close()
        self._tokens += rest.tokens
        self._reason = "stop" if self._writer.stopped else outcome.reason
        if rest.text or rest.tokens:
            yield rest

    async def _read(self, entry: Entry) -> None:
        """What was written is read by those who did not write it."""
        ids = self._ids
        if self._stops and ids:
            await self._append(self._session, ids, self._start, wrote=True)
        if entry.twin is not None and ids:
            try:
                await self._append(entry.twin, ids, self._start, wrote=True)
            except (UnknownSession, WrongPosition):
                await self._catalog.drop_twin(entry)

    async def _append(self, session: str, ids: list[int], position: int, *, wrote: bool = False) -> None:
        append = self._service.engine.append
        await Running(await self._service.run(append, session, ids, expected_position=position, wrote=wrote)).result()

    def _shown(self, piece: Piece) -> dict[str, Any]:
        return {
            "text": piece.text,
            "tokens": [token.id for token in piece.tokens],
            "position": self._start + len(self._tokens),
            "logprobs": self._entries(piece.tokens),
        }

    def _entries(self, tokens: Sequence[Token]) -> list[dict[str, Any]] | None:
        if not self._logprobs:
            return None
        return [
            self._named(token.id, token.logprob)
            | {"top": [self._named(i, logprob) for i, logprob in top_of(token)[: self._sampling.logprobs]]}
            for token in tokens
        ]

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": token_text(self._service.tokenizer, token), "id": token, "logprob": number(logprob)}


async def watched(continuing: SessionWriting, work: Work) -> AsyncGenerator[Event, None]:
    """The continuation as a stream."""
    async with work:
        async for event in continuing.events(work):
            yield event
    yield "done", continuing.done()


async def whole(continuing: SessionWriting, work: Work) -> dict[str, Any]:
    """The continuation in one piece."""
    async with work:
        async for _ in continuing.events(work):
            pass
    return continuing.done()
