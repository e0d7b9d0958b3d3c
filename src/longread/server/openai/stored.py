"""Responses as tenants have them: found, gone on from, kept for a while, forgotten; never anybody else's."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections import Counter
from collections.abc import Awaitable, Collection, Iterator, Sequence
from typing import Annotated

from longread.engine import Busy, SessionInfo, UnknownSession
from longread.server.catalog import RESPONSE_LABEL, Catalog
from longread.server.errors import ApiError
from longread.server.openai.history import RESPONSE, History, Json, StoredConversation, StoredResponse
from longread.server.service import Service, of_app

MOST_EVICTED = 8
"""Responses of a tenant that go at once for a new one of theirs where the engine is full."""


class Responses:
    """The responses and conversations of all tenants. The session of each response is a session of the engine."""

    def __init__(self, service: Service, catalog: Catalog) -> None:
        self._service, self._catalog = service, catalog
        self._in_use: Counter[str] = Counter()

    @property
    def history(self) -> History:
        """What is kept of them beside the sessions."""
        return self._service.history

    def remove_orphans(self) -> None:
        """Deletes sessions whose response was never answered, because the server was killed."""
        self._catalog.remove_orphans({StoredResponse.session_of(one) for one in self.history.ids()})

    async def get(self, tenant: str, response_id: str, param: str | None = None) -> StoredResponse:
        """One response; `param` is the argument that names it. Raises `ApiError`, for foreign ones too."""
        await self._expire()
        found = await self._service.run(self.history.response, tenant, response_id)
        if found is None or not response_id.startswith(RESPONSE):
            raise self._no_response(param)
        return found

    async def conversation(self, tenant: str, conversation_id: str, param: str | None = None) -> StoredConversation:
        """One conversation. Raises `ApiError`, for foreign ones too."""
        await self._expire()
        found = await self._service.run(self.history.conversation, tenant, conversation_id)
        if found is None:
            days = self._service.limits.response_seconds / 86400
            message = f"there is no such conversation; it may have been deleted, or not used for {days:g} days"
            code = "conversation_not_found"
            raise ApiError(404, f"{message}, so start one with POST /v1/conversations", param=param, code=code)
        return found

    async def start(self, conversation: StoredConversation, items: Sequence[Json]) -> None:
        """Keeps a new conversation, if the tenant may have one more."""
        async with self._catalog.making(conversation.owner):
            most = self._service.limits.conversations
            count = await self._service.run(self.history.count, conversation.owner)
            if count >= most:
                message = f"there are {count} conversations, and {most} may be; delete some"
                raise ApiError(429, message, code="insufficient_quota", retry_after=60)
            await self._service.run(self.history.start, conversation, items)

    async def delete(self, response: StoredResponse) -> None:
        """Forgets a response and its session; those that went on from it stay."""
        await self._service.run(self.history.remove, [response.id])
        await self.drop(response.session)

    async def newest(self, conversation_id: str) -> tuple[StoredResponse | None, int]:
        """The response of a conversation that one more goes on from, and its position; None: all is read again."""
        while (found := await self._service.run(self.history.newest, conversation_id)) is not None:
            with contextlib.suppress(UnknownSession):
                return found, (await self._service.run(self._service.engine.info, found.session)).position
            await self._service.run(self.history.unheard, found.id)  # its session was lost
        return None, 0

    @contextlib.contextmanager
    def using(self, response: StoredResponse | None) -> Iterator[None]:
        """Holds a response: it does not expire meanwhile."""
        if response is not None:
            self._in_use[response.id] += 1
        try:
            yield
        finally:
            if response is not None:
                self._in_use[response.id] -= 1

    async def named(self, tenant: str, name: str) -> tuple[str, int]:
        """The session of the tenant that a request names, or that of the response it names, and its position."""
        if not name.startswith(RESPONSE):
            info = (await self._catalog.get(tenant, name)).info
            return info.id, info.position
        response = await self.get(tenant, name, "session")
        return response.session, await self.position(response, "session")

    async def position(self, response: StoredResponse, param: str) -> int:
        """Of the session of a response. Raises `ApiError` if that is lost."""
        try:
            return (await self._service.run(self._service.engine.info, response.session)).position
        except UnknownSession:
            raise self._no_response(param) from None

    async def longest(self, tenant: str, tokens: Sequence[int], learn: bool) -> StoredResponse | None:
        """The response of a tenant whose session has read most of what `tokens` begin with, and nothing else."""
        await self._expire()
        found = await self._service.run(functools.partial(self.history.longest, tenant, tokens, learn=learn))
        if found is None:
            return None
        await self._service.run(self.history.touch, found)
        return await self._service.run(self.history.response, tenant, found)

    async def session(self, tenant: str, origin: str | None, learn: bool | None) -> SessionInfo:
        """A new session that goes on from one of a response, or from nothing.

        The tenant's responses that were not used longest go for it, where there are too many.

        Raises `ApiError` if the session of `origin` is lost, `Busy` if there is no room.
        """
        limits, run = self._service.limits, self._service.run
        async with self._catalog.making(tenant):
            await self._evict(tenant, keep=limits.responses - 1)
            if limits.tenant_bytes is not None:
                await self._free(tenant, limits.tenant_bytes)
            for left in reversed(range(MOST_EVICTED)):
                try:
                    return await self._owned(run(self._make, tenant, origin, learn))
                except UnknownSession:
                    raise self._no_response("previous_response_id") from None
                except Busy:
                    if not left or not await self._evict(tenant, keep=0, most=1):
                        raise
            raise AssertionError

    def _make(self, tenant: str, origin: str | None, learn: bool | None) -> SessionInfo:
        engine = self._service.engine
        if origin is None:
            return engine.create(tenant, learn=self._service.learns(learn), label=RESPONSE_LABEL)
        made = engine.fork(origin, RESPONSE_LABEL)
        return made if learn in (None, made.learn) else engine.update(made.id, learn=learn)

    async def _owned(self, making: Awaitable[SessionInfo]) -> SessionInfo:
        """The session that is being made; none is left if nobody waits for it any more."""
        made = asyncio.ensure_future(making)
        try:
            return await asyncio.shield(made)
        except asyncio.CancelledError:
            made.add_done_callback(lambda made: made.exception() or asyncio.ensure_future(self.drop(made.result().id)))
            raise

    async def keep(self, response: StoredResponse, items: Sequence[Json], base: StoredResponse | None) -> None:
        """Makes a response durable, whose session is; or drops the session."""
        try:
            await self._service.run(self.history.add, response, items, None if base is None else base.id)
        except Exception:
            await self.drop(response.session)
            raise

    async def drop(self, session: str) -> None:
        """Deletes the session of a response that nothing came of."""
        with contextlib.suppress(UnknownSession):
            await self._service.run(self._service.engine.delete, session)

    async def _expire(self) -> None:
        before = time.time() - self._service.limits.response_seconds
        await self._forget(await self._service.run(self.history.expired, before))

    async def _evict(self, tenant: str, *, keep: int, most: int | None = None) -> int:
        """Forgets responses of a tenant, those not used longest, until so many are left; says how many."""
        there = await self._service.run(self.history.oldest, tenant)
        surplus = max(0, len(there) - keep)
        return await self._forget(there, surplus if most is None else min(surplus, most))

    async def _free(self, tenant: str, most: int) -> None:
        """Forgets responses of a tenant until their sessions, and the others, are smaller than they may be."""
        infos = await self._service.run(self._service.engine.sessions, tenant)
        sizes = {info.id: info.nbytes for info in infos}
        taken, gone = sum(sizes.values()), []
        for one in await self._service.run(self.history.oldest, tenant):
            if taken < most:
                break
            if not self._in_use[one]:
                gone.append(one)
                taken -= sizes.get(StoredResponse.session_of(one), 0)
        await self._forget(gone)
        if taken >= most:
            message = f"the sessions hold {taken} bytes, and {most} may be; delete some"
            raise ApiError(429, message, code="insufficient_quota", retry_after=60)

    async def _forget(self, response_ids: Collection[str], most: int | None = None) -> int:
        gone = [one for one in response_ids if not self._in_use[one]][:most]
        if gone:
            await self._service.run(self.history.remove, gone)
            for one in gone:
                await self.drop(StoredResponse.session_of(one))
        return len(gone)

    def _no_response(self, param: str | None) -> ApiError:
        limits = self._service.limits
        kept = f"kept for {limits.response_seconds / 86400:g} days without use, and at most {limits.responses}"
        message = f"there is no such response: it was deleted, or has expired (responses are {kept}), or never was"
        code = "response_not_found" if param is None else "previous_response_not_found"
        return ApiError(404, f"{message}; send the whole conversation as input", param=param, code=code)


TheResponses = Annotated[Responses, of_app("responses")]
