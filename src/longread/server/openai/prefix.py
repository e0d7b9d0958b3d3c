"""Whether a prompt begins with what a session has read, token for token, said in constant size."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

BLOCK = 256
"""Tokens that are hashed together."""
NO_PREFIX = (None,) * 4
"""The columns where nothing is known."""


@dataclass(frozen=True)
class TokenPrefix:
    """All the tokens that a session has read: a chain of SHA-256 over whole blocks, and what comes after them."""

    learn: bool
    """Whether the session learned from all of them; from none otherwise."""
    position: int = 0
    digest: bytes = b""
    tail: tuple[int, ...] = ()

    @classmethod
    def of_row(cls, learn: int | None, position: int, digest: bytes, tail: str) -> TokenPrefix | None:
        """What `row` gave; None where nothing is known."""
        return None if learn is None else cls(bool(learn), position, digest, tuple(json.loads(tail)))

    def row(self) -> tuple[bool, int, bytes, str]:
        """As columns of a database."""
        return self.learn, self.position, self.digest, json.dumps(self.tail)

    def extended(self, tokens: Sequence[int]) -> TokenPrefix:
        """These and more."""
        pending, digest = [*self.tail, *tokens], self.digest
        whole = len(pending) // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            digest = _chained(digest, pending[start : start + BLOCK])
        return TokenPrefix(self.learn, self.position + len(tokens), digest, tuple(pending[whole:]))

    def begins(self, tokens: Sequence[int], chain: Sequence[bytes]) -> bool:
        """Whether `tokens`, whose `chain_of` is given, begin with these."""
        blocks = self.position // BLOCK
        if self.position > len(tokens) or chain[blocks] != self.digest:
            return False
        return tuple(tokens[blocks * BLOCK : self.position]) == self.tail


def chain_of(tokens: Sequence[int]) -> list[bytes]:
    """The digests of no block, of one, of two, and so on."""
    chain = [b""]
    for start in range(0, len(tokens) // BLOCK * BLOCK, BLOCK):
        chain.append(_chained(chain[-1], tokens[start : start + BLOCK]))
    return chain


def _chained(digest: bytes, block: Sequence[int]) -> bytes:
    return hashlib.sha256(digest + array("q", block).tobytes()).digest()
