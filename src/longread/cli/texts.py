"""Text that comes in pieces, from a file or a pipe, as token ids."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import BinaryIO

from longread.config import UserError
from longread.data import NotText, decode_text
from longread.tokenizer import StreamEncoder, Tokenizer

BLOCK = 1 << 16
"""Bytes read at a time."""


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
    encoder, empty = StreamEncoder(tokenizer), True
    for text in _decoded(file, name):
        empty = False
        ids, byte_lengths = encoder.push(text)
        if ids:
            yield ids, byte_lengths
    if empty:
        raise UserError(f"{name} is empty; give a text of at least one character")
    ids, byte_lengths = encoder.close()
    if ids:
        yield ids, byte_lengths


def _decoded(file: BinaryIO, name: str) -> Iterator[str]:
    read = file.read1 if hasattr(file, "read1") else file.read
    try:
        yield from decode_text(iter(lambda: read(BLOCK), b""))
    except NotText:
        raise UserError(f"{name} is not UTF-8 text; convert it to a text file first") from None
