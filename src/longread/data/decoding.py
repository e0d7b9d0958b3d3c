"""Bytes to text, in one way for whatever the library reads as a text file."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator

BYTE_ORDER_MARK = "\ufeff"


class NotText(ValueError):
    """The bytes are no text; the message says why."""


def decode_text(blocks: Iterable[bytes]) -> Iterator[str]:
    """The UTF-8 text of `blocks`, in pieces that are not empty, as soon as each is there.

    A byte order mark at the very beginning says how the file is encoded and is dropped: it is no part of the text, and
    no byte of it is counted. Everything else stays as it is, carriage returns and later marks included. Raises
    `NotText` at a NUL byte and at what is not valid UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    begun = False
    for block in blocks:
        if b"\0" in block:
            raise NotText("it holds a NUL byte")
        text = _decoded(decoder, block)
        if text and not begun:
            begun, text = True, text.removeprefix(BYTE_ORDER_MARK)
        if text:
            yield text
    _decoded(decoder, b"", final=True)


def _decoded(decoder: codecs.IncrementalDecoder, block: bytes, final: bool = False) -> str:
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError:
        raise NotText("it is not valid UTF-8") from None
