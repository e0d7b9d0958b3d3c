"""Sessions as tenants see them: with labels, with frozen twins that read along, and never anybody else's.

A twin is a session of its own that does not learn. Which session it belongs to is kept in the labels that the engine
stores, as JSON, so that it survives whatever the sessions survive.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import weakref
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from longread.engine import Curve, Quota, SessionInfo, Task, UnknownSession
from longread.server.errors import without_paths
from longread.server.service import Service, number, of_app


@dataclass(frozen=True)
class Entry:
    """One session, and its twin if it has one."""

    info: SessionInfo
    label: str
    twin: str | None
    parent: str | None
    """The session that it was forked from, whether that is still there or not."""

    def shown(self) -> dict[str, Any]:
        """As JSON."""
        info = self.info
        return {
            "id": info.id,
            "object": "session",
            "label": self.label,
            "parent": self.parent,
            "position": info.position,
            "learn": info.learn,
            "compare": self.twin is not None,
            "nbytes": info.nbytes,
            "drift": number(info.drift),
            "steps": info.steps,
            "rolled_back": info.rolled_back,
            "tier": info.tier,
            "created": info.created,
            "used": info.used,
        }


class Catalog:
    """The sessions of all tenants; every call names the tenant, and a foreign session is one that does not exist."""

    def __init__(self, service: Service) -> None:
        self._service, self._engine = service, service.engine
        self._making: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._tasks: dict[str, Task] = {}
        self._turns: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    def making(self, tenant: str) -> asyncio.Lock:
        """Held while a response or conversation of a tenant is made, so that several cannot exceed a limit together."""
        return self._making[tenant]

    def turn(self, session: str) -> asyncio.Lock:
        """Held by whoever reads or writes with a session: where it begins is then where it stands."""
        return self._turns.setdefault(session, asyncio.Lock())

    def under_way(self, session: str, task: Task) -> None:
        """Remembers what a session is doing, for `cancel`."""
        self._tasks = {known: old for known, old in self._tasks.items() if not old.done} | {session: task}

    def cancel(self, session: str) -> None:
        """Ends what a session is doing, at the next mini-batch or token."""
        if session in self._tasks:
            self._tasks[session].cancel()

    def remove_orphans(self, known: Collection[str] = ()) -> None:
        """Deletes what a crash left: twins and forks that no session knows, and that are not among the `known`."""
        entries = [_entry(info) for info in self._engine.sessions()]
        wanted = {entry.twin for entry in entries if entry is not None} | set(known)
        for info in self._engine.sessions():
            if _entry(info) is None and info.id not in wanted:
                self._engine.delete(info.id)

    async def all(self, tenant: str) -> list[Entry]:
        """The tenant's sessions, the most recently used first."""
        infos = await self._service.run(self._engine.sessions, tenant)
        entries = [entry for info in infos if (entry := _entry(info)) is not None]
        return sorted(entries, key=lambda entry: entry.info.used, reverse=True)

    def lost(self, tenant: str) -> list[dict[str, Any]]:
        """What the engine could not restore of the tenant's sessions, and of nobody knows whose without keys."""
        owners = {tenant} if self._service.keys else {tenant, ""}
        return [
            {
                "id": lost.id,
                "position": lost.position,
                "restored": lost.restored,
                "reason": without_paths(lost.reason, self._service.directories),
            }
            for lost in self._engine.lost
            if lost.owner in owners
        ]

    async def get(self, tenant: str, session: str) -> Entry:
        """One session. Raises `UnknownSession`."""
        entry = _entry(await self._service.run(self._engine.info, session, tenant))
        if entry is None:
            raise UnknownSession("a twin is no session of its own")
        return entry

    async def losses(self, tenant: str, session: str) -> tuple[Curve, Curve | None]:
        """The losses that a session keeps, and those of its twin."""
        entry = await self.get(tenant, session)
        own, frozen = await self._service.run(self._engine.losses, session), None
        if entry.twin is not None:
            with contextlib.suppress(UnknownSession):
                frozen = await self._service.run(self._engine.losses, entry.twin)
        return own, frozen

    async def create(self, tenant: str, *, label: str, learn: bool | None, compare: bool) -> Entry:
        """A new session; `learn` None: as the model was trained to.

        Raises `OverQuota` when the tenant has as many as it may, `Busy` when there is no room.
        """
        learn = self._service.learn if learn is None else learn
        return await self._service.run(self._create, tenant, label, learn, compare)

    def _create(self, tenant: str, label: str, learn: bool, compare: bool) -> Entry:
        twin = None
        if compare:
            twin = self._engine.create(tenant, learn=False, label=_written("", hidden=True), quota=self._quota(2)).id
        with self._or_delete(twin):
            return _known(self._engine.create(tenant, learn=learn, label=_written(label, twin), quota=self._quota()))

    async def fork(self, tenant: str, session: str, label: str | None) -> Entry:
        """Another session that has read the same, its twin included."""
        entry = await self.get(tenant, session)
        return await self._service.run(self._fork, entry, entry.label if label is None else label)

    def _fork(self, entry: Entry, label: str) -> Entry:
        twin = None
        if entry.twin is not None:
            with contextlib.suppress(UnknownSession):
                twin = self._engine.fork(entry.twin, _written("", hidden=True), quota=self._quota(2)).id
        with self._or_delete(twin):
            parent = entry.info.id
            return _known(self._engine.fork(parent, _written(label, twin, parent), quota=self._quota()))

    async def restore(self, tenant: str, path: Path, label: str) -> Entry:
        """The session in a file. Raises `UserError` if the file holds none that fits."""
        restore = self._engine.restore
        return _known(await self._service.run(restore, path, tenant, _written(label), quota=self._quota()))

    async def update(self, tenant: str, session: str, *, label: str | None, learn: bool | None) -> Entry:
        """Changes what is given."""
        entry = await self.get(tenant, session)
        written = None if label is None else _written(label, entry.twin, entry.parent)
        return _known(await self._service.run(self._engine.update, session, label=written, learn=learn))

    async def delete(self, tenant: str, session: str) -> None:
        """Forgets a session and its twin."""
        entry = await self.get(tenant, session)
        await self._service.run(self._engine.delete, session)
        if entry.twin is not None:
            with contextlib.suppress(UnknownSession):
                await self._service.run(self._engine.delete, entry.twin)

    async def drop_twin(self, entry: Entry) -> None:
        """Gives up a twin that has not read the same."""
        if entry.twin is None:
            return
        await self._service.run(self._engine.update, entry.info.id, label=_written(entry.label, None, entry.parent))
        with contextlib.suppress(UnknownSession):
            await self._service.run(self._engine.delete, entry.twin)

    def _quota(self, room: int = 1) -> Quota:
        limits = self._service.limits
        return Quota(sessions=limits.sessions, nbytes=limits.tenant_bytes, room=room, uncounted=RESPONSE_LABEL)

    @contextlib.contextmanager
    def _or_delete(self, twin: str | None) -> Iterator[None]:
        try:
            yield
        except BaseException:
            if twin is not None:
                self._engine.delete(twin)
            raise


TheCatalog = Annotated[Catalog, of_app("catalog")]


def _written(label: str, twin: str | None = None, parent: str | None = None, *, hidden: bool = False) -> str:
    return json.dumps({"label": label, "twin": twin, "parent": parent, "hidden": hidden})


RESPONSE_LABEL = _written("response", hidden=True)
"""Of the session of a response, which is none of the tenant's own."""


def _entry(info: SessionInfo) -> Entry | None:
    """None for a twin. A label that this server did not write, a library's for instance, is a label."""
    try:
        found = json.loads(info.label)
        label, hidden = str(found["label"]), found["hidden"] is True
        twin, parent = (value if isinstance(value, str) else None for value in (found["twin"], found.get("parent")))
    except (ValueError, TypeError, KeyError, AttributeError):
        return Entry(info, info.label, None, None)
    return None if hidden else Entry(info, label, twin, parent)


def _known(info: SessionInfo) -> Entry:
    entry = _entry(info)
    if entry is None:
        raise UnknownSession("a twin is no session of its own")
    return entry
