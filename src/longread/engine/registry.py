"""Which sessions an engine has: which may be added, which are found, and which begin as others are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from longread.config import UserError
from longread.engine.interface import Busy, Limits, OverQuota, Quota, UnknownSession
from longread.engine.jobs import Jobs, closing
from longread.engine.persistence import Persistence
from longread.engine.records import Reader
from longread.inner_loop import begin


class Registry:
    """The sessions of an engine, and those that are just being made: every limit counts both."""

    def __init__(self, jobs: Jobs, persistence: Persistence, limits: Limits) -> None:
        self._jobs, self._persistence, self._limits = jobs, persistence, limits
        self._lock = jobs.lock
        self._coming: set[Reader] = set()
        self._nothing = begin(jobs.model)  # a value, which all share that have read nothing

    @property
    def present(self) -> list[Reader]:
        """All sessions; not the forks that live as long as a task."""
        return [reader for reader in list(self._jobs.readers.values()) if not reader.deleted]

    def find(self, session_id: str, owner: str | None = None) -> Reader:
        """A session by its id; `owner` None: whoever it belongs to."""
        reader = self._jobs.readers.get(session_id)
        if reader is None or reader.deleted or (owner is not None and reader.owner != owner):
            raise unknown(session_id)
        return reader

    def when_restored(self, session_id: str) -> Reader:
        """The same once its events have been read again; waits for that, with the lock let go meanwhile."""
        while (reader := self.find(session_id)).restoring:
            if self._jobs.closed:
                raise closing()
            self._lock.wait()
        return reader

    @contextlib.contextmanager
    def joining(self, owner: str, label: str, learn: bool, quota: Quota | None) -> Iterator[Reader]:
        """The record of a session that is in the engine afterwards, or never was if this fails.

        Meanwhile it has its place, so that many may come at once and no limit is passed. Raises `Busy`, `OverQuota`.
        """
        with self._lock:
            self._check_room()
            if quota is not None:
                self._check_quota(owner, quota)
            reader = self._jobs.bare(owner, label, learn)
            reader.rest(self._nothing)
            self._coming.add(reader)
        try:
            yield reader
        except BaseException:
            with self._lock:
                self._coming.discard(reader)
            raise
        with self._lock:
            self._coming.discard(reader)
            self._jobs.readers[reader.id] = reader
            self._lock.notify()  # it may be one more than fits

    def _check_room(self) -> None:
        """Raises `Busy` where there is no room for one more."""
        limits, count = self._limits, len(self.present) + len(self._coming)
        if self._jobs.closed:
            raise closing()
        if limits.max_sessions is not None and count >= limits.max_sessions:
            most = limits.max_sessions
            raise Busy(f"there are {count} sessions of at most {most}; delete one, or try again later", 30)
        tiers, coming = self._jobs.tiers, len(self._coming) + 1
        self._persistence.check_room(coming * tiers.largest, limits.disk_bytes)
        room, remedy = tiers.device_bytes + tiers.host_bytes, "delete one, or try again later"
        if self._persistence.store is None and (count + 1) * tiers.largest > room:
            raise Busy(f"{count} sessions fill the {room} bytes there are; {remedy}", 30)
        used = tiers.usage(self._jobs.readers.values())
        if tiers.disk_refuses and used["device"] + used["host"] + coming * tiers.largest > room:
            raise Busy(f"{count} sessions fill the memory for them, and the disk takes none; {remedy}", 30)

    def _check_quota(self, owner: str, quota: Quota) -> None:
        own = [reader for reader in (*self.present, *self._coming) if reader.owner == owner]
        count = sum(reader.label != quota.uncounted for reader in own)
        if quota.sessions is not None and count + quota.room > quota.sessions:
            raise OverQuota(f"there are {count} sessions, and {quota.sessions} may be; delete some")
        taken = sum(reader.nbytes for reader in own)
        if quota.nbytes is not None and taken >= quota.nbytes:
            raise OverQuota(f"the sessions hold {taken} bytes, and {quota.nbytes} may be; delete some")

    def copy_reader(self, origin: Reader, copy: Reader) -> Reader:
        """Gives `copy` what `origin` has read."""
        state, tier = self._persistence.state_and_tier(origin)
        copy.state = None
        if state is not None:
            copy.rest(state)
        copy.nbytes, copy.tier = origin.nbytes, tier
        copy.recent.extend(origin.recent)
        copy.position, copy.losses = origin.position, origin.losses.copy()
        copy.drift, copy.drift_steps = origin.drift, origin.drift_steps
        copy.steps, copy.rolled_back = origin.steps, origin.rolled_back
        return copy

    def lose(self, reader: Reader, reason: str) -> None:
        """Gives up a session whose files turn out to be damaged."""
        if reader.deleted:
            return
        position = reader.info().position
        reader.deleted, reader.durable = True, False
        self._jobs.readers.pop(reader.id, None)
        jobs = list(reader.jobs)
        reader.jobs.clear()
        for job in jobs:
            job.ready = False
            job.task._finish(UserError(f"session {reader.id} is lost at position {position}: {reason}"))
        if self._persistence.store is not None:
            self._persistence.store.give_up(reader.id, reader.owner, position, reason)


def unknown(session_id: str) -> UnknownSession:
    """What to say of an id that nobody has."""
    return UnknownSession(f"there is no session {session_id!r}; list the sessions, or create one")
