"""Text that comes in pieces, from a file or a pipe, as token ids; and the options that say how bytes become text."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from longread.data import TextFormat
    from longread.tokenizer import Tokenizer

BLOCK = 1 << 16
"""Bytes read at a time."""


def add_text_format(parser: argparse.ArgumentParser, *, markup: bool = True) -> None:
    """The options of a command that reads texts; `markup` where HTML is refused without being asked for."""
    parser.add_argument(
        "--encoding", metavar="NAME", help="of the texts (default: as their byte order mark says, or UTF-8)"
    )
    parser.add_argument(
        "--errors",
        choices=("strict", "replace"),
        default="strict",
        help="bytes that are no text: strict refuses them (default), replace makes U+FFFD of them",
    )
    parser.add_argument(
        "--keep-line-ends", action="store_true", help="leave carriage returns (default: CRLF and CR become LF)"
    )
    if markup:
        parser.add_argument("--markup", action="store_true", help="read HTML and RTF with their tags")


def format_of(options: argparse.Namespace) -> TextFormat:
    """What `add_text_format` was told. Raises `UserError` for an encoding that does not exist."""
    from longread.data import TextFormat

    markup = getattr(options, "markup", True)
    return TextFormat(options.encoding, options.errors, options.keep_line_ends, markup)


def read_tokens(
    name: str, tokenizer: Tokenizer, text_format: TextFormat | None = None
) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids of the text in file `name` ("-": stdin), piece by piece, with the UTF-8 bytes that each covers.

    Raises:
        UserError: the file cannot be read, is no text, or is empty. What stands before has been given then.
    """
    from longread.data import TextFile

    file = TextFile(name, text_format)
    yield from _tokens(file, file.shown_name, tokenizer)


def _encoded(file: BinaryIO, name: str, tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[int]]]:
    """As `read_tokens`, of a file that is open."""
    from longread.data import decode_text

    read = file.read1 if hasattr(file, "read1") else file.read
    yield from _tokens(decode_text(iter(lambda: read(BLOCK), b"")), name, tokenizer)


def _tokens(pieces: Iterable[str], name: str, tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[int]]]:
    from longread.config import UserError
    from longread.tokenizer import StreamEncoder

    encoder, empty = StreamEncoder(tokenizer), True
    for text in pieces:
        empty = False
        ids, byte_lengths = encoder.push(text)
        if ids:
            yield ids, byte_lengths
    if empty:
        raise UserError(f"{name} is empty; give a text of at least one character")
    ids, byte_lengths = encoder.close()
    if ids:
        yield ids, byte_lengths
