"""A session that reads and writes for one request, and stays for others to go on from."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from longread.engine import Appended
from longread.server.errors import ApiError
from longread.server.openai.history import StoredResponse
from longread.server.openai.prefix import TokenPrefix
from longread.server.openai.stored import Responses
from longread.server.service import Service, Work


class KeptSession:
    """A session of its own, which is deleted on leaving unless it was kept. Use it as an asynchronous context.

    Args:
        origin: the session that it goes on from; None: it has read nothing.
        prefix: what that has read, where it is known.
        learn: whether it learns; None: as that did, or as the model was trained to.
    """

    def __init__(
        self,
        responses: Responses,
        service: Service,
        tenant: str,
        *,
        origin: str | None,
        prefix: TokenPrefix | None,
        learn: bool | None,
    ) -> None:
        self._responses, self._service, self.tenant = responses, service, tenant
        self._origin, self._prefix, self._learn = origin, prefix, learn
        self._kept = False
        self.id, self.position = "", 0

    async def __aenter__(self) -> Self:
        made = await self._responses.session(self.tenant, self._origin, self._learn)
        self.id, self.position = made.id, made.position
        if self._origin is None:
            self._prefix = TokenPrefix(made.learn)
        elif self._prefix is not None and self._prefix.learn != made.learn:
            self._prefix = None
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._kept:
            await asyncio.shield(self._responses.drop(self.id))

    async def read(self, work: Work, ids: Sequence[int], *, wrote: bool = False) -> None:
        """Reads what comes next; `wrote`: a fork of it wrote that."""
        if not ids:
            return
        append = self._service.engine.append
        running = await work.run(append, self.id, ids, expected_position=self.position, wrote=wrote)
        outcome: Appended = await running.result()
        if outcome.cancelled:
            work.check("nothing of it is kept, so ask again, for less if it was too long")
            raise ApiError(503, "the answer was cancelled", code="cancelled", retry_after=1)
        self.position = outcome.position
        if self._prefix is not None:
            self._prefix = self._prefix.extended(ids)

    async def keep(
        self, response: StoredResponse, items: Sequence[dict[str, Any]] = (), base: StoredResponse | None = None
    ) -> None:
        """Makes durable whose session this is: a response that went on from `base`."""
        self._kept = True  # or dropped by whoever keeps it, also if nobody waits for that
        await asyncio.shield(self._responses.keep(replace(response, prefix=self._prefix), items, base))
