"""What is read for a prompt, all of it or what a session has not read yet; and a session that reads and writes for one
request and stays for others to go on from.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

from longread.engine import Appended
from longread.server.errors import ApiError
from longread.server.openai.history import StoredResponse
from longread.server.openai.prefix import TokenPrefix
from longread.server.openai.stored import Responses
from longread.server.service import Service, Work


@dataclass(frozen=True)
class Prompt:
    """One prompt of a request."""

    ids: list[int]
    """That are read."""
    session: str | None = None
    """That has read what is before them, and stays as it is."""
    position: int = 0
    """Of that session."""
    prefix: TokenPrefix | None = None
    """All that the session has read, where that is known."""


async def reusing(responses: Responses, service: Service, tenant: str, ids: list[int], learn: bool | None) -> Prompt:
    """A prompt that goes on from the session of the tenant that has read most of it, if one has."""
    found = await responses.longest(tenant, ids, service.learns(learn))
    if found is None or found.prefix is None:
        return Prompt(ids)
    position = found.prefix.position
    return Prompt(ids[position:], found.session, position, found.prefix)


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
