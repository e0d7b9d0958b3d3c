"""How many bytes of a text each of its tokens covers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import Any

from longread.tokenizer.definition import parts


def byte_level_tokens(definition: dict[str, Any], vocabulary: dict[str, int]) -> dict[int, bytes] | None:
    """The bytes that each token id is, when every character of a token stands for one byte; None for other kinds."""
    if "ByteLevel" not in [step["type"] for step in parts(definition.get("decoder"))]:
        return None
    byte_of = byte_alphabet()
    found = {}
    for token, i in vocabulary.items():
        spelled = [byte_of.get(character) for character in token]
        found[i] = token.encode() if None in spelled else bytes(spelled)  # type: ignore[arg-type]
    return found


def byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for.

    Printable bytes of Latin-1 stand for themselves; the others, in order, for the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def byte_lengths(text: str, offsets: Sequence[tuple[int, int]], own: Sequence[int] | None) -> list[int]:
    """Bytes of `text` that each token covers, from where it begins and ends in it, in characters.

    Args:
        offsets: of each token.
        own: the bytes of each token itself. They count wherever those of neighbours that share characters sum to what
            these cover, that is, wherever nothing was changed before the tokens were made.

    What lies between two tokens counts for the second, what lies behind the last for the last. Otherwise, tokens with
    one end share a character (byte fallback: one byte each), so each after the first counts one byte.
    """
    bytes_before = [0, *accumulate(len(character.encode()) for character in text)]
    reached = list(accumulate((end for _, end in offsets), max))
    counts = _shared([bytes_before[end] for end in reached])
    if own is not None:
        begin = 0
        for end in range(1, len(offsets) + 1):
            if end < len(offsets) and not is_border(offsets, reached, end):
                continue
            before = reached[begin - 1] if begin else 0
            first = min(start for start, _ in offsets[begin:end])
            if sum(own[begin:end]) == bytes_before[reached[end - 1]] - bytes_before[max(first, before)]:
                counts[begin:end] = own[begin:end]
                counts[begin] += bytes_before[max(first, before)] - bytes_before[before]
            begin = end
    if counts:
        counts[-1] += bytes_before[-1] - bytes_before[reached[-1]]
    return counts


def is_border(offsets: Sequence[tuple[int, int]], reached: Sequence[int], i: int) -> bool:
    """Whether no character is shared by token `i` and those before it, and both sides cover some.

    `reached`: how far the tokens up to each go.
    """
    return offsets[i][0] >= reached[i - 1] and offsets[i][1] > reached[i - 1] and offsets[i - 1][1] == reached[i - 1]


def _shared(reached: Sequence[int]) -> list[int]:
    counts: list[int] = []
    start = 0
    for end, run in groupby(reached):
        others = len(list(run)) - 1
        sharing = min(others, end - start)
        counts += [end - start - sharing] + [1] * sharing + [0] * (others - sharing)
        start = end
    return counts
