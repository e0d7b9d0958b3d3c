"""Tenants: the keys that open the server to each, and what one of them, and one request, may take.

Only hashes of keys are kept in memory.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from longread.config import UserError

LOCAL = "local"
"""The tenant of a server without keys."""
SHORTEST = 16


class Keys:
    """Keys and the tenants that they open. A tenant may have several keys, so that one can be replaced by another.

    Args:
        pairs: (tenant, key); none at all: everybody is one tenant, for a server that only this machine reaches.

    Raises:
        UserError: a name or a key is not usable, or a key stands twice.
    """

    def __init__(self, pairs: Iterable[tuple[str, str]] = ()) -> None:
        self._tenants: list[tuple[bytes, str]] = []
        for tenant, key in pairs:
            if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", tenant):
                raise UserError(
                    f"tenant {tenant!r} is no name; use up to 64 letters, digits, dots, dashes, underscores"
                )
            if len(key) < SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
                raise UserError(
                    f"a key of tenant {tenant} is not usable; give {SHORTEST} or more printable characters, no spaces"
                )
            if self.tenant(key) is not None:
                raise UserError(f"a key of tenant {tenant} stands there twice; remove one of the two lines")
            self._tenants.append((_hashed(key), tenant))

    def __bool__(self) -> bool:
        return bool(self._tenants)

    def tenant(self, key: str) -> str | None:
        """Whose key this is; takes as long for a wrong key as for a right one."""
        given, found = _hashed(key), None
        for known, tenant in self._tenants:
            if hmac.compare_digest(given, known):
                found = tenant
        return found


def read_keys(path: str | Path) -> Keys:
    """Keys from a file of lines "tenant key"; empty lines and lines that begin with # are left out.

    Raises:
        UserError: the file cannot be read, other users may read it, or a line is not of this form.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read the keys in {path}: {error.strerror}; give another file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; write lines of a tenant and a key") from None
    if mode & 0o077:
        raise UserError(f"other users may read or change {path}; run chmod 600 on it")
    pairs = []
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2:
            raise UserError(f"line {number} of {path} is not a tenant and a key; write two words")
        pairs.append((words[0], words[1]))
    if not pairs:
        raise UserError(f"{path} has no keys; write lines of a tenant and a key")
    return Keys(pairs)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerLimits:
    """Of each tenant and each request; the engine has limits of its own, for all tenants together."""

    body_bytes: int = 32 * 2**20
    """Of one request body; a session file has `session_file_bytes`."""
    session_file_bytes: int = 16 * 2**30
    """Of one session that is uploaded."""
    tokens: int = 2**22
    """That one request may make the model read or write, all its prompts and choices together."""
    choices: int = 128
    """Prompts of one completion request, times `n`."""
    seconds: float = 3600.0
    """That one request may take; what has been read by then stays read."""
    stall_seconds: float = 60.0
    """That a client may go without sending what it announced, or without taking what it asked for."""
    concurrent: int = 32
    """Requests of one tenant at a time."""
    per_minute: int = 6000
    """Requests of one tenant in a minute; a minute's worth may come at once."""
    sessions: int = 1000
    """Sessions of one tenant; a frozen twin counts."""
    tenant_bytes: int | None = None
    """State of all sessions of one tenant together; None: what the engine has."""
    responses: int = 1000
    """Responses of one tenant that can be gone on from; a new one takes the place of the one not used longest."""
    response_seconds: float = 30 * 86400.0
    """That a response or a conversation is kept without being used."""
    conversations: int = 1000
    """Of one tenant."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"{field.name} is {value}; it must be positive and finite")


def _hashed(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
