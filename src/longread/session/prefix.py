"""How far a session has come in a text, so that the same text can be gone on with later, and no other by mistake."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MOST_FIGURES = 2**16
_DIGITS = 20
_MOST = 2**53
_COUNTS = ("position", "num_bytes", "segment_position", "segment_bytes")


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
