"""What a request has under way in the engine, seen from asyncio, and stopped when nobody waits for it any more."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, ParamSpec, Self

from fastapi import Request

from longread.engine import Appended, Finished, Task
from longread.server.errors import ApiError, stopping
from longread.server.service import Service

P = ParamSpec("P")


class Running:
    """One engine task: iterate over its events, then take its `result`."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self._outcome: Any = None
        task.subscribe(self._deliver)

    def _deliver(self, event: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def __aiter__(self) -> AsyncIterator[Any]:
        while self._outcome is None:
            event = await self._events.get()
            if isinstance(event, Appended | Finished | BaseException):
                self._outcome = event
            else:
                yield event

    async def result(self) -> Any:
        """Waits for the outcome; raises it if it is an error."""
        async for _ in self:
            pass
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome


class Work:
    """All tasks of one request. They are cancelled when the time is up, and when the client has gone.

    Use it as an asynchronous context; leaving it cancels what still runs.
    """

    def __init__(self, service: Service, request: Request, *, survives: bool = False) -> None:
        self._request, self._survives = request, survives
        self._service, self._seconds = service, service.limits.seconds
        self._running: list[Running] = []
        self._late = self._over = False

    async def __aenter__(self) -> Self:
        self._service.works.add(self)
        self._watch = asyncio.create_task(self._wait_until_gone())
        self._clock = asyncio.get_running_loop().call_later(self._seconds, self._time_is_up)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._service.works.discard(self)
        self._clock.cancel()
        self._watch.cancel()
        if not self._survives or error is not None:
            self.cut_off()

    async def run(self, begin: Callable[P, Task], /, *args: P.args, **kwargs: P.kwargs) -> Running:
        """Begins a task and takes charge of it."""
        running = Running(await self._service.run(begin, *args, **kwargs))
        self._running.append(running)
        if self._over or self._service.ending:
            running.task.cancel()
        return running

    def cut_off(self) -> None:
        """Ends everything at the next token or mini-batch."""
        self._over = True
        for running in self._running:
            running.task.cancel()

    def check(self, ended: str, **facts: Any) -> None:
        """Raises if it was the clock, or the end of the server, that cancelled something; not for what is finished.

        Args:
            ended: what became of it and what to do, the end of the sentence.
            facts: the same for programs.
        """
        if self._late:
            raise ApiError(504, f"the request took more than {self._seconds:g} seconds; {ended}", **facts)
        if self._service.stopping:
            raise stopping(ended, **facts)

    async def _wait_until_gone(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        if not self._survives:
            self.cut_off()

    def _time_is_up(self) -> None:
        self._late = True
        self.cut_off()
