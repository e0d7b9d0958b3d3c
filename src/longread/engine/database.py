"""What an engine must not forget of one session: a SQLite database of its own, so that damage to one stays with it.

    session   one row: whose it is and what its snapshot holds; `after` is the newest event of those that it holds
    event     a row for each event after that, numbered without a gap

An event is what has happened to a session since its snapshot: where, which tokens, and how they were read.

    {"at": 9, "tokens": [5, 7], "learn": true}   tokens read at a position; with "wrote" if the session wrote them
    {"cut": 10}                                  what was read from that position on is taken back

A row is JSON with a CRC-32. A commit is one fsync of the write-ahead log (journal_mode=WAL, synchronous=FULL). When
SQLite opens a log, it leaves out what is damaged and does not say so. So a log here never has frames of an older one
behind its own, and what was left out is looked at: whole frames without a commit were being written when the process
ended, anything else is damage.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import sqlite3
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longread.config import UserError
from longread.engine.log_check import is_damaged
from longread.files import atomic_files, make_durable, writing

Event = dict[str, Any]
_UNREADABLE = (sqlite3.Error, UnicodeDecodeError)
"""What is raised about a damaged database: messages of SQLite quote it, and need be no text then."""
MOST_LOG_BYTES = 2**20
"""Of a write-ahead log, after which its pages go into the database; a longer one takes longer to read at a start."""
_TABLES = """
PRAGMA page_size=1024;
PRAGMA auto_vacuum=FULL;
CREATE TABLE session (after INTEGER PRIMARY KEY, body TEXT NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE event (number INTEGER PRIMARY KEY, body TEXT NOT NULL, crc INTEGER NOT NULL);
"""
_MAGIC, _WAL = b"SQLite format 3\0", b"\2\2"
_OWNER = re.compile(rb'"owner":("(?:[^"\\]|\\.)*")')
_TOKENS = re.compile(rb'\{"at":\d+,"tokens":\[[\d,]*\]')

_NOT_DAMAGE = {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_BUSY}
_Row = tuple[int, str, int]


@dataclass
class Contents:
    """What was found of a session, as far as it can be read."""

    session: dict[str, Any] | None = None
    owner: str = ""
    """Where `session` cannot be read, but this."""
    events: list[Event] = field(default_factory=list)
    """From the first on, up to a damage."""
    beyond: list[Event] = field(default_factory=list)
    """Others."""
    damage: str | None = None


class Database:
    """A database that `create_database` has made. Methods may be called from any thread.

    Args:
        after: the newest event that its snapshot holds.
        last: the newest event.
    """

    def __init__(self, path: Path, *, after: int = 0, last: int = 0) -> None:
        self.path, self.last = path, last
        self._after, self._log = after, log_of(path)
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None

    def add(self, events: Sequence[Event]) -> None:
        """Makes events durable. After a `UserError` none of them has happened."""
        with self._transaction() as connection:
            rows = [_row(self.last + i, event) for i, event in enumerate(events, 1)]
            connection.executemany("INSERT INTO event VALUES (?, ?, ?)", rows)
            self.last += len(events)

    def replace(self, session: dict[str, Any], after: int | None = None) -> None:
        """Makes the session's row durable, and forgets events up to `after`, which its snapshot holds; None: none.

        After a `UserError` all is as it was.
        """
        with self._transaction() as connection:
            self._after = self._after if after is None else after
            connection.execute("DELETE FROM session")
            connection.execute("INSERT INTO session VALUES (?, ?, ?)", _row(self._after, session))
            connection.execute("DELETE FROM event WHERE number <= ?", (self._after,))
        if after is not None:
            self.close()  # without events there may long be none

    def events(self) -> list[Event]:
        """All that are durable. Raises `UserError` where they cannot be read."""
        found = Contents()
        with self._lock:
            try:
                _read(self._opened(), found)
            except _UNREADABLE as error:
                found.damage = f"{self.path} is damaged: {error}"
        if found.damage is not None:
            raise UserError(found.damage)
        return found.events

    def close(self) -> None:
        """Lets go of the files; what comes next opens them again."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All that is done in the block, or nothing of it."""
        with self._lock, writing(self.path):
            before, numbers = 0, (self._after, self.last)
            try:
                connection = self._opened()
                before = size_of(self._log)
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                connection.execute("COMMIT")
            except _UNREADABLE as error:
                self._after, self.last = numbers
                self._take_back(before)
                full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
                number = errno.ENOSPC if full else errno.EIO
                raise OSError(number, os.strerror(number)) from error
            if size_of(self._log) > MOST_LOG_BYTES:
                self._empty_log(connection)

    def _empty_log(self, connection: sqlite3.Connection) -> None:
        """Puts into the database what the log holds, which was durable before."""
        try:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except _UNREADABLE:
            self.close()  # it is tried again before anything else is written

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            connection = _connect(self.path, "mode=rw")
            try:
                for pragma in ("synchronous=FULL", "wal_autocheckpoint=0"):
                    connection.execute(f"PRAGMA {pragma}")
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # makes the log, or empties one of before
                make_durable(self.path.parent)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _take_back(self, size: int) -> None:
        """After a commit that failed: it might be whole in the log, and would count after a crash."""
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
            with contextlib.suppress(OSError):
                os.truncate(self._log, size)


def create_database(path: Path, session: dict[str, Any], events: Sequence[Event] = ()) -> Database:
    """Makes the database of a session, whole and durable or not at all; or replaces one that nobody has open."""
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as memory:
        memory.executescript(_TABLES)
        memory.execute("INSERT INTO session VALUES (?, ?, ?)", _row(0, session))
        rows = (_row(i, event) for i, event in enumerate(events, 1))
        memory.executemany("INSERT INTO event VALUES (?, ?, ?)", rows)
        data = bytearray(memory.serialize())
    data[18:20] = _WAL  # the versions of the format for those who write and read; in memory there is no log
    with atomic_files(path, private=True) as (temporary,):
        temporary.write_bytes(data)
    return Database(path, last=len(events))


def read_database(path: Path) -> tuple[Database, Contents]:
    """A database of before, which nobody has open, and what it says. A log that is damaged is kept aside.

    Raises:
        UserError: it is not the database's fault that it cannot be read.
    """
    found, log, logged, after = Contents(), log_of(path), b"", 0
    try:
        logged = log.read_bytes() if size_of(log) else b""
        with path.open("rb") as file:
            head = file.read(20)
        if (head[:16], head[18:]) != (_MAGIC, _WAL):
            raise sqlite3.DatabaseError("it does not begin as a database")
        if is_damaged(logged):
            found.damage = f"{log} is damaged"
            _read_traces(logged, found)
            with contextlib.suppress(OSError):
                os.link(log, f"{log}.damaged")  # SQLite removes it when it is done
        with contextlib.closing(_connect(path, "mode=rw" if logged else "immutable=1")) as connection:
            after = _read(connection, found)
    except OSError as error:
        found.damage = f"{path} cannot be read: {error.strerror}"
    except _UNREADABLE as error:
        if getattr(error, "sqlite_errorcode", None) in _NOT_DAMAGE:
            raise UserError(f"cannot read {path}: {error}; close other programs, or free some space") from None
        found.damage = f"{path} is damaged: {error}"
    if found.session is None:
        with contextlib.suppress(OSError):
            _read_traces(path.read_bytes() + logged, found)
    return Database(path, after=after, last=after + len(found.events)), found


def log_of(path: Path) -> Path:
    """The write-ahead log of a database."""
    return Path(f"{path}-wal")


def size_of(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _connect(path: Path, how: str) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?{how}"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA locking_mode=EXCLUSIVE")  # the directory is locked: no file of shared memory is needed
    return connection


def _row(number: int, body: dict[str, Any]) -> _Row:
    text = json.dumps(body, separators=(",", ":"))
    return number, text, zlib.crc32(f"{number} {text}".encode())


def _body(row: _Row) -> dict[str, Any] | None:
    number, text, crc = row
    body = json.loads(text) if crc == zlib.crc32(f"{number} {text}".encode()) else None
    return body if isinstance(body, dict) else None


def _read(connection: sqlite3.Connection, found: Contents) -> int:
    """Fills `found`; returns the number after which its events begin."""
    (checked,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if checked != "ok":
        found.damage = f"the database is damaged: {checked}"
    after = -1
    for row in connection.execute("SELECT after, body, crc FROM session"):
        found.session = _body(row)
        after = row[0] if isinstance(row[0], int) else after  # nothing where the names of types are damaged
    if found.session is None:
        found.damage = found.damage or "the row of the session is damaged"
    number = after
    for row in connection.execute("SELECT number, body, crc FROM event ORDER BY number"):
        event = _body(row)
        if event is None or row[0] != number + 1:
            found.damage = found.damage or f"event {number + 1} is damaged"
        if event is not None:
            whole = row[0] == number + 1
            (found.events if whole else found.beyond).append(event)
            number += whole
    return after


def _read_traces(data: bytes, found: Contents) -> None:
    """Looks for rows in the bytes of what is no longer a database, or no longer a log."""
    for owner in _OWNER.findall(data):
        with contextlib.suppress(ValueError):
            found.owner = json.loads(owner)
    for event in _TOKENS.findall(data):
        with contextlib.suppress(ValueError):
            found.beyond.append(json.loads(event + b"}"))
