"""Responses, conversations and their items on the disk: what the sessions of an engine do not know of themselves.

The session that has read a response and all before it is the engine's; its id is part of the response's. Whatever a
method has written is durable when it returns, and whoever is not the owner finds nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longread.config import UserError
from longread.files import owner_only
from longread.server.openai.prefix import NO_PREFIX, TokenPrefix, chain_of

RESPONSE, COMPLETION = "resp_", "completion_"
"""How ids begin of what was answered: what can be asked for, and what is only there for prompts that begin with it."""
_VERSION = 1
_TABLES = """
CREATE TABLE responses (id TEXT PRIMARY KEY, owner TEXT NOT NULL, used REAL NOT NULL, instructions TEXT,
    conversation TEXT, heard INTEGER, body TEXT NOT NULL, items TEXT NOT NULL,
    learn INTEGER, position INTEGER, digest BLOB, tail TEXT) WITHOUT ROWID;
CREATE INDEX responses_used ON responses (owner, used);
CREATE INDEX responses_read ON responses (owner, learn, position);
CREATE INDEX responses_heard ON responses (conversation, heard);
CREATE TABLE conversations (id TEXT PRIMARY KEY, owner TEXT NOT NULL, created INTEGER NOT NULL, used REAL NOT NULL,
    metadata TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE items (conversation TEXT NOT NULL REFERENCES conversations ON DELETE CASCADE, number INTEGER NOT NULL,
    id TEXT NOT NULL, body TEXT NOT NULL, PRIMARY KEY (conversation, number), UNIQUE (conversation, id)) WITHOUT ROWID;
"""
_PREFIX = "learn, position, digest, tail"
_RESPONSES = f"SELECT id, owner, body, items, instructions, conversation, heard, {_PREFIX} FROM responses"  # noqa: S608

Json = dict[str, Any]


@dataclass(frozen=True)
class StoredResponse:
    """A response, and what the next one needs to know."""

    id: str
    owner: str
    body: Json
    """As it is sent."""
    items: list[Json]
    """That were given to it; not those before."""
    instructions: str | None
    """The newest that its session has read."""
    conversation: str | None = None
    heard: int | None = None
    """Number of the newest item of the conversation that its session has read; None: it cannot be gone on from there,
    as something that it has read was taken out."""
    prefix: TokenPrefix | None = None
    """All that its session has read, where that is known."""

    @property
    def session(self) -> str:
        """Of the engine; it has read this and all before."""
        return self.session_of(self.id)

    @staticmethod
    def session_of(response_id: str) -> str:
        """The id of the session of a response: what is behind its kind."""
        return response_id.rpartition("_")[2]


@dataclass(frozen=True)
class StoredConversation:
    """A conversation without its items."""

    id: str
    owner: str
    created: int
    metadata: dict[str, str]


class History:
    """One database, of a server that has its directory for itself. Methods may be called from any thread.

    Args:
        path: None: in memory only.

    Raises:
        UserError: the file cannot be used, or is of a later version.
    """

    def __init__(self, path: Path | None) -> None:
        self._lock = threading.Lock()
        self._path = path
        if path is not None:
            try:
                os.close(owner_only(path, os.O_RDWR | os.O_CREAT))  # so that nobody else may read what it holds
            except OSError as error:
                raise UserError(f"cannot keep responses in {path}: {error.strerror}; give another directory") from None
        try:
            self._database = sqlite3.connect(path or ":memory:", check_same_thread=False, isolation_level=None)
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
                self._database.execute(f"PRAGMA {pragma}")
            (version,) = self._database.execute("PRAGMA user_version").fetchone()
            if not version:
                self._database.executescript(f"BEGIN; {_TABLES} PRAGMA user_version={_VERSION}; COMMIT;")
        except sqlite3.Error as error:
            raise UserError(f"{path} is no database of responses ({error}); move it away to begin a new one") from None
        if version > _VERSION:
            raise UserError(f"{path} has version {version}, not {_VERSION}; serve it with a later Longread")

    def close(self) -> None:
        """Nothing may be called after this."""
        with self._lock:
            self._database.close()

    @contextlib.contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        """A transaction, whole or not at all."""
        with self._reading() as database:
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
                database.execute("COMMIT")
            finally:
                if database.in_transaction:
                    database.execute("ROLLBACK")

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        try:
            with self._lock:
                yield self._database
        except sqlite3.Error as error:
            raise UserError(f"cannot use {self._path}: {error}; try again later") from OSError(str(error))

    # responses

    def add(self, response: StoredResponse, items: Sequence[Json] = (), base: str | None = None) -> None:
        """Keeps a response, and puts items at the end of its conversation, if it has one; `base` has been used."""
        now = time.time()
        with self._changing() as database:
            heard = None
            if response.conversation is not None:
                heard = _append(database, response.conversation, items)
                database.execute("UPDATE conversations SET used = ? WHERE id = ?", (now, response.conversation))
            database.execute("UPDATE responses SET used = ? WHERE id = ?", (now, base))
            later = now + 1e-6  # than what it went on from
            row = (response.id, response.owner, later, response.instructions, response.conversation, heard)
            texts = (_text(response.body), _text(response.items))
            database.execute(
                "INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*row, *texts, *(NO_PREFIX if response.prefix is None else response.prefix.row())),
            )

    def response(self, owner: str, response_id: str) -> StoredResponse | None:
        """One response."""
        return self._one(f"{_RESPONSES} WHERE id = ? AND owner = ?", response_id, owner)

    def newest(self, conversation_id: str) -> StoredResponse | None:
        """The response of a conversation whose session has read most of it, and nothing that is not in it."""
        newest = "WHERE conversation = ? AND heard IS NOT NULL ORDER BY heard DESC LIMIT 1"
        return self._one(f"{_RESPONSES} {newest}", conversation_id)

    def unheard(self, response_id: str) -> None:
        """A response cannot be gone on from in its conversation any more."""
        with self._changing() as database:
            database.execute("UPDATE responses SET heard = NULL WHERE id = ?", (response_id,))

    def _one(self, query: str, *values: str) -> StoredResponse | None:
        with self._reading() as database:
            row = database.execute(query, values).fetchone()
        if row is None:
            return None
        response_id, owner, body, items, instructions, conversation, heard, *prefix = row
        told = (json.loads(body), json.loads(items), instructions, conversation, heard)
        return StoredResponse(response_id, owner, *told, TokenPrefix.of_row(*prefix))

    def longest(self, owner: str, tokens: Sequence[int], *, learn: bool) -> str | None:
        """The response of an owner whose session has read most of what `tokens` begin with, and nothing else."""
        query = (
            f"SELECT id, {_PREFIX} FROM responses WHERE owner = ? AND learn = ? AND position <= ? "  # noqa: S608
            "ORDER BY position DESC"
        )
        with self._reading() as database:
            rows = database.execute(query, (owner, learn, len(tokens))).fetchall()
        chain = chain_of(tokens) if rows else []
        for response_id, *columns in rows:
            prefix = TokenPrefix.of_row(*columns)
            if prefix is not None and prefix.begins(tokens, chain):
                return str(response_id)
        return None

    def touch(self, response_id: str) -> None:
        """A response has been used."""
        with self._changing() as database:
            database.execute("UPDATE responses SET used = ? WHERE id = ?", (time.time(), response_id))

    def remove(self, response_ids: Collection[str]) -> None:
        """Forgets responses."""
        with self._changing() as database:
            database.executemany("DELETE FROM responses WHERE id = ?", [(one,) for one in response_ids])

    def ids(self) -> list[str]:
        """All responses of all tenants."""
        with self._reading() as database:
            return [one for (one,) in database.execute("SELECT id FROM responses")]

    def oldest(self, owner: str) -> list[str]:
        """The owner's responses, the one that was not used longest first."""
        with self._reading() as database:
            return [
                one for (one,) in database.execute("SELECT id FROM responses WHERE owner = ? ORDER BY used", (owner,))
            ]

    def expired(self, before: float) -> list[str]:
        """Responses that were last used before a time; conversations that were are gone."""
        with self._changing() as database:
            database.execute("DELETE FROM conversations WHERE used < ?", (before,))
            return [one for (one,) in database.execute("SELECT id FROM responses WHERE used < ?", (before,))]

    # conversations

    def start(self, conversation: StoredConversation, items: Sequence[Json]) -> None:
        """Keeps a new conversation."""
        row = (conversation.id, conversation.owner, conversation.created, time.time(), _text(conversation.metadata))
        with self._changing() as database:
            database.execute("INSERT INTO conversations VALUES (?, ?, ?, ?, ?)", row)
            _append(database, conversation.id, items)

    def conversation(self, owner: str, conversation_id: str) -> StoredConversation | None:
        """One conversation."""
        query = "SELECT id, owner, created, metadata FROM conversations WHERE id = ? AND owner = ?"
        with self._reading() as database:
            row = database.execute(query, (conversation_id, owner)).fetchone()
        return None if row is None else StoredConversation(row[0], row[1], row[2], json.loads(row[3]))

    def count(self, owner: str) -> int:
        """Conversations of an owner."""
        with self._reading() as database:
            (count,) = database.execute("SELECT count(*) FROM conversations WHERE owner = ?", (owner,)).fetchone()
        return int(count)

    def describe(self, conversation_id: str, metadata: dict[str, str]) -> None:
        """Changes what is noted of a conversation."""
        with self._changing() as database:
            change = "UPDATE conversations SET metadata = ?, used = ? WHERE id = ?"
            database.execute(change, (_text(metadata), time.time(), conversation_id))

    def end(self, conversation_id: str) -> None:
        """Forgets a conversation and its items; its responses stay."""
        with self._changing() as database:
            database.execute("DELETE FROM conversations WHERE id = ?", (conversation_id,))

    def append(self, conversation_id: str, items: Sequence[Json]) -> None:
        """More items at the end of a conversation."""
        with self._changing() as database:
            _append(database, conversation_id, items)
            database.execute("UPDATE conversations SET used = ? WHERE id = ?", (time.time(), conversation_id))

    def items(self, conversation_id: str, after: int = 0) -> list[Json]:
        """Items of a conversation, oldest first, those with a number above `after`."""
        query = "SELECT body FROM items WHERE conversation = ? AND number > ? ORDER BY number"
        with self._reading() as database:
            return [json.loads(body) for (body,) in database.execute(query, (conversation_id, after))]

    def take_out(self, conversation_id: str, item_id: str) -> bool:
        """Removes an item; whoever has read it is not gone on from any more. Says whether there was one."""
        with self._changing() as database:
            query = "DELETE FROM items WHERE conversation = ? AND id = ? RETURNING number"
            row = database.execute(query, (conversation_id, item_id)).fetchone()
            if row is not None:
                change = "UPDATE responses SET heard = NULL WHERE conversation = ? AND heard >= ?"
                database.execute(change, (conversation_id, *row))
        return row is not None


def _append(database: sqlite3.Connection, conversation_id: str, items: Sequence[Json]) -> int:
    """Puts items at the end; gives the number of the last."""
    query = "SELECT coalesce(max(number), 0) FROM items WHERE conversation = ?"
    (last,) = database.execute(query, (conversation_id,)).fetchone()
    rows = [(conversation_id, last + i, item["id"], _text(item)) for i, item in enumerate(items, start=1)]
    database.executemany("INSERT INTO items VALUES (?, ?, ?, ?)", rows)
    return int(last) + len(rows)


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
