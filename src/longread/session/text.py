"""Texts of sessions: where one is cut that is read in pieces, how far one has been read, and the one that is written.

A product of few rows is not rounded as the same rows in a product of many. So two readings of one text are the same,
bit for bit, only if both are cut at the same places: a reading that stopped and went on and one that was never
disturbed, one of the command line and one from Python.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

from torch import Tensor

from longread.config import ModelConfig
from longread.tokenizer import StreamDecoder, Tokenizer

LONGEST_PIECE = {"cpu": 1024, "cuda": 16_384}
"""Tokens. On a CPU shorter ones cost time, a sixth more at 128; on a GPU long ones are read as CUDA graphs."""
MOST_WORK = 8e9
"""Parameters times tokens of a piece on a CPU, where it is longer than a mini-batch: about a second on two cores."""
MOST_FIGURES = 2**16
_DIGITS = 20
_MOST = 2**53
_COUNTS = ("position", "num_bytes", "segment_position", "segment_bytes")


def next_cut(position: int, config: ModelConfig, device: str) -> int:
    """Where a piece ends that begins at `position`: M, 2M, 4M, …, then at every multiple of the longest piece."""
    longest, size = LONGEST_PIECE.get(device, LONGEST_PIECE["cpu"]), config.mini_batch_size
    if device == "cpu":
        longest = min(longest, int(MOST_WORK / config.num_parameters))
    while size * 2 <= longest:
        if position < size:
            return size
        size *= 2
    return (position // size + 1) * size


def piece_lengths(position: int, num_tokens: int, config: ModelConfig, device: str) -> list[int]:
    """Tokens of each piece, where so many are read from a position on; of the last, what is left."""
    lengths, end = list[int](), position + num_tokens
    while position < end:
        cut = min(next_cut(position, config, device), end)
        lengths.append(cut - position)
        position = cut
    return lengths or [0]


@dataclass(frozen=True)
class TextPrefix:
    """The beginning of a text, of which a session has read every byte and nothing else.

    A text may consist of several segments (files, say), each encoded by itself. In a session file it takes as many
    bytes for a short text as for a long one.
    """

    position: int
    """Of the session, after these bytes."""
    num_bytes: int
    """UTF-8 bytes of the text that have been read."""
    sha256: str
    """Of these bytes, in hex."""
    whole: bool
    """Whether the text ended there."""
    segment_position: int
    """Of the session, where the segment began that is being read."""
    segment_bytes: int
    """Bytes of the text before that segment."""
    figures: str = ""
    """Of whoever reads, about these bytes, for going on with them: at most `MOST_FIGURES` characters of ASCII."""

    def as_metadata(self) -> dict[str, str]:
        """The entries of a session file."""
        return {name: fixed_width(getattr(self, name)) for name in _COUNTS} | {
            "sha256": self.sha256,
            "whole": f"{self.whole:d}",
            "figures": self.figures,
        }

    @classmethod
    def from_metadata(cls, entries: Mapping[str, Any]) -> TextPrefix:
        """What `as_metadata` gave. Raises `ValueError`, `KeyError` or `TypeError` with the reason on anything else."""
        counts = {name: count_of(entries, name) for name in _COUNTS}
        sha256, whole, figures = entries["sha256"], entries["whole"], entries["figures"]
        if not (isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)) or whole not in ("0", "1"):
            raise ValueError(f"sha256 is {sha256!r:.80} and whole {whole!r:.60}")
        if not (isinstance(figures, str) and figures.isascii() and len(figures) <= MOST_FIGURES):
            raise ValueError(f"figures are {figures!r:.60}")
        if counts["segment_position"] > counts["position"] or counts["segment_bytes"] > counts["num_bytes"]:
            raise ValueError("a segment begins after what has been read")
        return cls(sha256=sha256, whole=whole == "1", figures=figures, **counts)


def fixed_width(count: int) -> str:
    """A count as it stands in a session file, whose size must not depend on it."""
    return f"{count:{_DIGITS}}"


def count_of(entries: Mapping[str, Any], name: str) -> int:
    """A count that was written by `fixed_width`. Raises `ValueError` or `KeyError` with the reason."""
    text = entries[name]
    if not isinstance(text, str) or len(text) != _DIGITS or not text.strip().isdecimal() or int(text) > _MOST:
        raise ValueError(f"{name} is {text!r:.60}, not a number")
    return int(text)


class _Rewindable(Protocol):
    """What is needed of a `Session` here: its file uses this one."""

    @property
    def recent(self) -> list[int]: ...
    def fork(self) -> Self: ...
    def go_back(self, before: Self) -> None: ...
    def read(self, text: Sequence[int]) -> Tensor: ...


_Session = TypeVar("_Session", bound=_Rewindable)


def text_of(
    ids: Generator[int, None, None], tokenizer: Tokenizer, sessions: Sequence[_Session], *, stops: Sequence[str] = ()
) -> Generator[str, None, None]:
    """The text of what `sessions` write together: `ids` of `Session.generate`, none of which has been taken yet.

    However it ends, the sessions have read what was given here and nothing else: no part of a stop text and, where it
    ends early, nothing that was waiting to become a character or a stop text. Whoever could not show the newest piece
    throws the reason in, and that piece has not been given.
    """
    before = [session.fork() for session in sessions]
    decoder = StreamDecoder(tokenizer, before=sessions[0].recent, stops=stops)
    taken: list[int] = []
    ends = [0]  # characters that are certain before each of these and after the last
    given, sound, whole = "", False, False
    try:
        for text in _pieces(ids, decoder, taken, ends):
            given, sound = given + text, True
            try:
                yield text
            except GeneratorExit:
                raise
            except BaseException:
                given = given[: len(given) - len(text)]
                raise
            sound = False
        sound, whole = True, not decoder.stopped
    finally:
        ids.close()
        known = ends.index(max(end for end in ends if end <= len(given)))
        shown = [*taken[:known], *tokenizer.encode_inside(given[ends[known] :])[0]]
        if not whole and not (sound and shown == taken):  # unsound: interrupted in the middle of a token
            for session, begun in zip(sessions, before, strict=True):
                session.go_back(begun)
                session.read(shown)


def _pieces(
    ids: Iterable[int], decoder: StreamDecoder, taken: list[int], ends: list[int]
) -> Generator[str, None, None]:
    """The text as it becomes certain; keeps account of the ids that were taken for it."""
    for token in ids:
        text = decoder.push(token)
        taken.append(token)
        ends.append(decoder.decoded)
        if text:
            yield text
        if decoder.stopped:
            return
    if text := decoder.close():
        yield text
