"""Who is in an engine: who may come in, who is found, who takes after whom."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Sequence

from longread.config import UserError
from longread.engine.interface import Busy, Limits, UnknownSession
from longread.engine.persistence import Persistence
from longread.engine.reader import Reader
from longread.engine.worker import Worker


class Members:
    """The readers of a worker. Methods are for the engine's thread."""

    def __init__(self, worker: Worker, keeping: Persistence, limits: Limits) -> None:
        self._worker, self._keeping, self._limits = worker, keeping, limits
        self.closed = False
        """Whether nobody may come in any more."""

    @property
    def present(self) -> list[Reader]:
        """All sessions; not the forks that live as long as a task."""
        return [reader for reader in self._worker.readers.values() if not reader.deleted]

    @property
    def tasks(self) -> int:
        """Under way or waiting."""
        return sum(not job.replay for reader in self._worker.readers.values() for job in reader.jobs)

    def find(self, session_id: str, owner: str | None = None) -> Reader:
        """A session by its id; `owner` None: whoever it belongs to."""
        reader = self._worker.readers.get(session_id)
        if reader is None or reader.deleted or (owner is not None and reader.owner != owner):
            raise unknown(session_id)
        return reader

    def bare(self, owner: str, label: str, learn: bool) -> Reader:
        """A reader that has read nothing and is nowhere yet."""
        window = self._worker.model.config.window_size
        return Reader(secrets.token_hex(16), owner, label, learn, deque(maxlen=window))

    def new(self, owner: str, label: str, learn: bool) -> Reader:
        """The same for a session, if there is room for one more. Raises `Busy`."""
        limits, count = self._limits, len(self.present)
        if self.closed:
            raise closing()
        if limits.max_sessions is not None and count >= limits.max_sessions:
            most = limits.max_sessions
            raise Busy(f"there are {count} sessions of at most {most}; delete one, or try again later", 30)
        self._keeping.check_room(self._worker.tiers.largest, limits.disk_bytes)
        self._check_memory(count)
        return self.bare(owner, label, learn)

    def _check_memory(self, count: int) -> None:
        """Raises `Busy` where `count` sessions fill the memory and cannot go to a disk."""
        tiers, readers = self._worker.tiers, self._worker.readers.values()
        room, remedy = tiers.device_bytes + tiers.host_bytes, "delete one, or try again later"
        if self._keeping.store is None and (count + 1) * tiers.largest > room:
            raise Busy(f"{count} sessions fill the {room} bytes there are; {remedy}", 30)
        used = tiers.usage(readers)
        if tiers.disk_refuses and used["device"] + used["host"] + tiers.largest > room:
            raise Busy(f"{count} sessions fill the memory for them, and the disk takes none; {remedy}", 30)

    def twin(self, origin: Reader, twin: Reader) -> Reader:
        """Gives `twin` what `origin` has read."""
        state, tier = self._keeping.state_and_tier(origin)
        if state is not None:
            twin.rest(state)
        twin.nbytes, twin.tier = origin.nbytes, tier
        twin.recent.extend(origin.recent)
        twin.position, twin.drift, twin.losses = origin.position, origin.drift, origin.losses.copy()
        twin.steps, twin.rolled_back = origin.steps, origin.rolled_back
        return twin

    def lose(self, reader: Reader, reason: str) -> None:
        """Gives up a session whose files turn out to be damaged."""
        if reader.deleted:
            return
        position = reader.info().position
        reader.deleted, reader.durable = True, False
        self._worker.readers.pop(reader.id, None)
        jobs = list(reader.jobs)
        reader.jobs.clear()
        for job in jobs:
            job.task._finish(UserError(f"session {reader.id} is lost at position {position}: {reason}"))
        if self._keeping.store is not None:
            self._keeping.store.give_up(reader.id, reader.owner, position, reason)

    def check_waiting(self) -> None:
        """Raises `Busy` where there are as many tasks as there may be."""
        if self.closed:
            raise closing()
        most, now = self._limits.max_waiting, self.tasks
        if most is not None and now >= most:
            raise Busy(f"{now} tasks are under way or waiting, of at most {most}; try again later")

    def check_tokens(self, tokens: Sequence[int]) -> None:
        """Raises `UserError` for the first that is not in the vocabulary; for any thread."""
        V = self._worker.model.config.vocab_size
        for token in tokens:
            if not 0 <= token < V:
                raise UserError(f"token id {token} is not in the vocabulary of {V}; use the model's tokenizer")


def unknown(session_id: str) -> UnknownSession:
    """What to say of an id that nobody has."""
    return UnknownSession(f"there is no session {session_id!r}; list the sessions, or create one")


def closing() -> Busy:
    """What to say at the end."""
    return Busy("the engine is closing; try again when it is back", retry_after=10.0)
