"""Text that comes in pieces, from a file or a pipe, as token ids."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import BinaryIO

from longread.config import UserError
from longread.data import NotText, decode_text
from longread.tokenizer import Tokenizer

BLOCK = 1 << 16
"""Bytes read at a time; a text is cut for the tokenizer before the last space of a block."""
LONGEST = 1 << 16
"""Characters after which a text without any space is cut all the same: memory and the wait for SIGINT stay bounded."""


def read_tokens(name: str, tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids of the text in file `name` ("-": stdin), piece by piece, with the UTF-8 bytes that each covers.

    A byte order mark at the beginning of the file is no text, as in `prepare`.

    Raises:
        UserError: the file cannot be read, is no text, or is empty.
    """
    if name == "-":
        yield from _encoded(sys.stdin.buffer, "stdin", tokenizer)
        return
    try:
        with open(name, "rb") as file:
            yield from _encoded(file, name, tokenizer)
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from None


def _encoded(file: BinaryIO, name: str, tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[int]]]:
    waiting, empty = "", True
    for text in _decoded(file, name):
        empty = False
        waiting += text
        cut = max(waiting.rfind(" "), waiting.rfind("\n"))
        if cut > 0:
            yield tokenizer.encode_with_bytes(waiting[:cut])
            waiting = waiting[cut:]
        elif len(waiting) >= LONGEST:
            yield tokenizer.encode_with_bytes(waiting)
            waiting = ""
    if empty:
        raise UserError(f"{name} is empty; give a text of at least one character")
    if waiting:
        yield tokenizer.encode_with_bytes(waiting)


def _decoded(file: BinaryIO, name: str) -> Iterator[str]:
    read = file.read1 if hasattr(file, "read1") else file.read
    try:
        yield from decode_text(iter(lambda: read(BLOCK), b""))
    except NotText:
        raise UserError(f"{name} is not UTF-8 text; convert it to a text file first") from None
