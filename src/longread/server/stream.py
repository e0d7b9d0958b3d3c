"""Answers that come in pieces: server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator
from typing import Any

from fastapi.responses import Response

from longread.server.errors import as_api_error, logger

BEAT = 15.0
"""Seconds of silence after which a comment shows the client, and every proxy between, that somebody works."""
Event = tuple[str | None, Any]
"""Its name, None for OpenAI's unnamed ones, and what is sent as JSON; a text is sent as it is."""


class EventStream(Response):
    """Sends events as they come; an error becomes the last event."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[Event, None], first: list[Event], *, named: bool) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._first, self._named = events, first, named

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

        async def put(data: bytes) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": True})

        async with contextlib.aclosing(self._events):
            try:
                for event in self._first:
                    await put(_written(event))
                async for data in self._written():
                    await put(data)
            except OSError:  # the client takes nothing any more, or has gone
                return
            except Exception as error:
                answer = as_api_error(error, scope["app"].state.service.directories)
                if answer.status_code == 500:
                    logger.exception("a stream failed")
                await put(_written(("error" if self._named else None, answer.body)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _written(self) -> AsyncGenerator[bytes, None]:
        coming: asyncio.Task[Event] | None = None
        try:
            while True:
                coming = coming or asyncio.ensure_future(anext(self._events))
                done, _ = await asyncio.wait({coming}, timeout=BEAT)
                if not done:
                    yield b": still at work\n\n"
                    continue
                try:
                    event = coming.result()
                except StopAsyncIteration:
                    return
                coming = None
                yield _written(event)
        finally:
            if coming is not None and not coming.done():
                coming.cancel()
                with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration):
                    await coming


async def streamed(events: AsyncGenerator[Event, None], *, named: bool = True) -> EventStream:
    """A stream once its first event is there; what goes wrong before that is an ordinary answer with its status."""
    try:
        first = [await anext(events)]
    except StopAsyncIteration:
        first = []
    return EventStream(events, first, named=named)


def _written(event: Event) -> bytes:
    name, data = event
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, allow_nan=False)
    return (f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode()
