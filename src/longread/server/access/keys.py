"""API keys: who a request belongs to. Only hashes of keys are kept in memory."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
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


def _hashed(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
