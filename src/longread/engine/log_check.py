"""Whether a write-ahead log of SQLite is damaged: SQLite leaves such frames out without a word.

The format is that of https://www.sqlite.org/fileformat2.html#the_write_ahead_log: a checksum goes on from frame to
frame. It is linear, so what each frame adds to it can be computed for all at once.
"""

from __future__ import annotations

import functools
import struct
import sys
from array import array

import torch
from torch import Tensor

_HEADER, _HEAD = 32, 24
"""Bytes before all frames, and before the page in each."""
_MASK = 2**32 - 1


def is_damaged(log: bytes) -> bool:
    """Whether a log holds frames that were not written as they are; one at the end of which a part is there is none."""
    if len(log) <= _HEADER:
        return False
    magic, _, page_size = struct.unpack(">3I", log[:12])
    order = "big" if magic & 1 else "little"
    a, b = struct.unpack(">2I", log[24:_HEADER])
    if _added(_words(log[:24], order).view(1, -1)).tolist() != [[a, b]]:
        return True
    starts = range(_HEADER, len(log) - _HEAD - page_size + 1, _HEAD + page_size)
    covered = b"".join(log[at : at + 8] + log[at + _HEAD : at + _HEAD + page_size] for at in starts)
    added = _added(_words(covered, order).view(len(starts), -1)).tolist() if starts else []
    (aa, ab), (ba, bb) = _powers(1 + page_size // 8)[-1].tolist()
    for at, (more_a, more_b) in zip(starts, added, strict=True):
        a, b = (aa * a + ab * b + more_a) & _MASK, (ba * a + bb * b + more_b) & _MASK
        if log[at + 8 : at + _HEAD] != log[16:24] + struct.pack(">2I", a, b):
            return any(log[at:])  # or the file had become longer, and nothing had been written there
    return False


def _words(data: bytes, order: str) -> Tensor:
    """The numbers of 32 bits in it."""
    words = array("I", data)
    if order != sys.byteorder:
        words.byteswap()
    return torch.frombuffer(words, dtype=torch.int32).long() & _MASK


def _added(words: Tensor) -> Tensor:
    """What rows of words, [n, 2k], add to the checksum (0, 0), [n, 2]."""
    x, y = words[:, ::2], words[:, 1::2]
    steps = torch.stack((x, x + y), dim=-1)  # with (x, y), the checksum (a, b) becomes (a + b + x, a + 2b + x + y)
    weights = _powers(steps.shape[1])[:-1].flip(0).mT.reshape(-1, 2)
    return (steps.flatten(1) @ weights) & _MASK  # what is beyond 64 bits is lost, and matters for no lower bit


@functools.cache
def _powers(count: int) -> Tensor:
    """Of the matrix that the checksum is multiplied with for each pair of words, modulo 2^32, [count + 1, 2, 2]."""
    step, powers = torch.tensor([[1, 1], [1, 2]]), [torch.eye(2, dtype=torch.long)]
    for _ in range(count):
        powers.append((step @ powers[-1]) & _MASK)
    return torch.stack(powers)
