"""The files of an engine's sessions, from which it goes on after any end, `kill -9` included.

    <directory>/<id>/session.db                whose it is, which snapshot counts, and what has happened since
    <directory>/<id>/snapshot-<n>.safetensors  a session file, as `longread.session.Session.save` writes it
    <directory>/lock                           locked as long as somebody uses the directory

A snapshot counts from the moment in which the database names it. The events that it holds go in the same transaction,
what happens while it is written stays, and the snapshot before it goes afterwards. A session that has no snapshot yet
begins with its first event.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import resource
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longread.config import UserError
from longread.engine.database import Database, Event, create_database, size_of
from longread.engine.interface import Lost
from longread.engine.recovery import DATABASE, Recovered, recover, set_aside
from longread.engine.snapshots import Saved, snapshot_path, snapshots_in
from longread.files import make_durable, make_private, owner_only, remove_tree, writing

NOTHING = Saved()
_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
MOST_OPEN = 1024 if _FILES == resource.RLIM_INFINITY else max(16, min(_FILES // 8, 1024))
"""Databases that are open at once; each takes two of the files that a process may have, and others need some too."""


@dataclass(frozen=True)
class Begun:
    """A snapshot that is being made, and counts when it is committed."""

    generation: int
    path: Path
    after: int
    """Number of the newest event that it holds."""


@dataclass
class _Files:
    database: Database
    saved: Saved
    begun: int
    """Snapshots that have been begun."""
    nbytes: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock)


@dataclass
class Store:
    """One directory, which belongs to this store alone. Its methods may be called from any thread.

    What a method has been asked for is durable when it returns; after a `UserError`, nothing of it has happened. The
    lock is the operating system's, on an open file: it ends with `release` or with the process, however that ends, and
    leaves nothing to clean up.

    Raises:
        UserError: another store, of this process or of another, uses the directory; or it cannot be used at all.
    """

    directory: Path
    fingerprint: str
    lost: list[Lost] = field(default_factory=list)
    _files: dict[str, _Files] = field(default_factory=dict)
    _open: OrderedDict[Database, None] = field(default_factory=OrderedDict)
    """Those that hold files open, the least recently used first."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _claim: int | None = None
    """Descriptor of the locked file."""

    def __post_init__(self) -> None:
        try:
            make_private(self.directory)
            claim = owner_only(self.directory / "lock", os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(claim)
                raise
        except BlockingIOError:
            raise UserError(
                f"{self.directory} is in use by another server; stop that one, or give another directory"
            ) from None
        except OSError as error:
            raise UserError(
                f"cannot keep sessions in {self.directory}: {error.strerror}; give another directory"
            ) from None
        self._claim = claim

    def release(self) -> None:
        """Lets others use the directory. Nothing may be called after this."""
        for files in self._files.values():
            files.database.close()
        claim, self._claim = self._claim, None
        if claim is not None:
            os.close(claim)

    @property
    def nbytes(self) -> int:
        """Bytes of all files of all sessions."""
        return sum(files.nbytes for files in list(self._files.values()))

    def folder(self, session_id: str) -> Path:
        """Where a session's files are."""
        return self.directory / session_id

    def snapshot_path(self, session_id: str) -> Path:
        """The session file that counts."""
        return snapshot_path(self.folder(session_id), self.saved(session_id).generation)

    def has_snapshot(self, session_id: str) -> bool:
        """Whether there is a session file; a new session has none."""
        return self.saved(session_id).generation > 0

    def saved(self, session_id: str) -> Saved:
        """What the snapshot that counts holds."""
        return self._files[session_id].saved

    def create(
        self,
        session_id: str,
        facts: Mapping[str, Any],
        saved: Saved = NOTHING,
        *,
        snapshot: Callable[[Path], object] | None = None,
        events: Sequence[Event] = (),
    ) -> None:
        """A new session.

        Args:
            saved: what its snapshot holds.
            snapshot: makes the session file at the path it is given.
            events: what has happened since.
        """
        folder = self.folder(session_id)
        try:
            with writing(folder):
                make_private(folder)
                make_durable(self.directory)
                if snapshot is not None:
                    snapshot(snapshot_path(folder, saved.generation))
            database = create_database(folder / DATABASE, self._row(facts, saved), events)
        except BaseException:
            remove_tree(folder)
            raise
        self._take(session_id, database, saved)

    def describe(self, session_id: str, facts: Mapping[str, Any]) -> None:
        """Replaces the facts of a session; its snapshot stays."""
        files = self._files[session_id]
        with files.lock:
            files.database.replace(self._row(facts, files.saved))
        self._used(session_id)

    def log(self, session_id: str, events: Sequence[Event]) -> None:
        """Adds what has happened to a session."""
        self._files[session_id].database.add(events)
        self._used(session_id)

    def begin(self, session_id: str) -> Begun:
        """Begins a snapshot, of all that has been logged by now; `commit` lets it count once its file is written."""
        files = self._files[session_id]
        with files.lock:
            files.begun += 1
            return Begun(files.begun, snapshot_path(self.folder(session_id), files.begun), files.database.last)

    def commit(self, session_id: str, facts: Mapping[str, Any], saved: Saved, begun: Begun) -> None:
        """Lets a snapshot that has been written count, and removes what is older."""
        files = self._files[session_id]
        saved = dataclasses.replace(saved, generation=begun.generation)
        with files.lock:
            if begun.generation > files.saved.generation:  # a newer one holds more
                files.database.replace(self._row(facts, saved), begun.after)
                files.saved = saved
            for number, path in snapshots_in(self.folder(session_id)):
                if number < files.saved.generation:
                    remove_tree(path)
        self._used(session_id)

    def link(self, origin: str, session_id: str, facts: Mapping[str, Any], events: Sequence[Event]) -> None:
        """Makes the files of a fork: those of `origin`, which take no further room, and `events` after them."""
        files = self._files[origin]
        with files.lock:
            saved, path = files.saved, self.snapshot_path(origin)
            snapshot = (lambda to: _link(path, to)) if saved.generation else None
            self.create(session_id, facts, saved, snapshot=snapshot, events=[*files.database.events(), *events])
        self._used(origin)

    def reopen(self, session_id: str) -> tuple[Saved, list[Event]]:
        """What is durable of a session now."""
        files = self._files[session_id]
        with files.lock:
            return files.saved, files.database.events()

    def remove(self, session_id: str) -> None:
        """Deletes a session's files."""
        self._forget(session_id)
        folder = self.folder(session_id)
        with writing(folder):
            (folder / DATABASE).unlink(missing_ok=True)  # first: what is left half-way is no session
            try:
                if folder.exists():
                    make_durable(folder)
            finally:
                remove_tree(folder)

    def give_up(self, session_id: str, owner: str, position: int, reason: str) -> None:
        """Reports that a session is lost; its files stay, under another name, for whoever can repair them."""
        self.lost.append(Lost(session_id, owner, position, 0, reason))
        self._forget(session_id)
        set_aside(self.folder(session_id))

    def recover(self) -> list[Recovered]:
        """All sessions that can go on, to begin with; `lost` says what cannot. Raises what `recover` raises."""
        found, self.lost[:] = recover(self.directory, self.fingerprint)
        for session in found:
            self._take(session.id, session.database, session.saved)
        return found

    def _take(self, session_id: str, database: Database, saved: Saved) -> None:
        begun = max([saved.generation, *(number for number, _ in snapshots_in(self.folder(session_id)))])
        self._files[session_id] = _Files(database, saved, begun)
        self._weigh(session_id)

    def _forget(self, session_id: str) -> None:
        files = self._files.pop(session_id, None)
        if files is not None:
            with self._lock:
                self._open.pop(files.database, None)
            files.database.close()

    def _used(self, session_id: str) -> None:
        """Closes the databases that have not been used for longest, where too many are open."""
        files, idle = self._files.get(session_id), []
        with self._lock:
            if files is not None:
                self._open[files.database] = None
                self._open.move_to_end(files.database)
            while len(self._open) > MOST_OPEN:
                idle.append(self._open.popitem(last=False)[0])
        for database in idle:
            database.close()
        self._weigh(session_id)

    def _weigh(self, session_id: str) -> None:
        files = self._files.get(session_id)
        if files is not None:
            with contextlib.suppress(OSError):  # it may be being deleted
                files.nbytes = sum(size_of(path) for path in self.folder(session_id).iterdir())

    def _row(self, facts: Mapping[str, Any], saved: Saved) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint, "facts": dict(facts), "saved": saved.as_json()}


def _link(path: Path, copy: Path) -> None:
    """Gives a file a second name, or where that cannot be, a durable copy."""
    try:
        os.link(path, copy)
    except OSError:
        with path.open("rb") as file, open(copy, "wb", opener=owner_only) as new:
            shutil.copyfileobj(file, new)
        make_durable(copy)
