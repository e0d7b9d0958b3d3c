"""The tokenizer that needs no training: one token a byte."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from longread.tokenizer.contract import Cut, Tokenizer, utf8
from longread.tokenizer.definition import BYTES, FILE_NAME, write_json


class ByteTokenizer(Tokenizer):
    """One token a byte: ids 0 … 255, and 256 for BOS."""

    vocab_size = 257
    bos_id = 256
    fingerprint = hashlib.sha256(json.dumps(BYTES).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(utf8(text))

    def encode_with_bytes(self, text: str) -> tuple[list[int], list[int]]:
        ids = self.encode(text)
        return ids, [1] * len(ids)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in self._checked(ids) if i != self.bos_id).decode("utf-8", errors="replace")

    def save(self, directory: Path) -> None:
        write_json(directory / FILE_NAME, BYTES)

    def last_cut(self, text: str, known: int) -> Cut | None:
        return Cut(len(text), len(text), [], 0)

    def bytes_of(self, token: int) -> bytes | None:
        self._checked([token])
        return b"" if token == self.bos_id else bytes([token])
