"""gzip, wherever bytes of a text come from."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Iterator

from longread.data.text import NotText

_GZIP, _GZIP_BITS = b"\x1f\x8b", 31
_MOST_BYTES = 1 << 20  # at a time


def unpacked(blocks: Iterable[bytes], *, packed: bool = False) -> Iterator[bytes]:
    """The blocks, without the gzip around them if they begin as gzip does; `packed`: they must.

    Raises `NotText` after what could be unpacked.
    """
    rest, start = iter(blocks), b""
    while len(start) < len(_GZIP) and (block := next(rest, None)) is not None:
        start += block
    if not start.startswith(_GZIP):
        if packed and start:
            raise _damaged()
        yield from itertools.chain([start] if start else [], rest)
        return
    unpacker, size = zlib.decompressobj(_GZIP_BITS), 0
    for block in itertools.chain([start], rest):
        while block:
            if unpacker.eof:  # a file may hold several, with zeros behind them
                if not (block := block.lstrip(b"\0")):
                    break
                unpacker = zlib.decompressobj(_GZIP_BITS)
            try:
                data = unpacker.decompress(block, _MOST_BYTES)
            except zlib.error:
                raise _damaged(size) from None
            size += len(data)
            block = unpacker.unconsumed_tail or unpacker.unused_data
            if data:
                yield data
    if data := unpacker.flush():
        yield data
    if not unpacker.eof:
        raise _damaged(size + len(data))


def _damaged(byte: int = 0) -> NotText:
    return NotText("is damaged: it is not whole gzip data", "pack it again", byte=byte, kind="damaged")
