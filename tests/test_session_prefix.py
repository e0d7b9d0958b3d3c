"""What a session file says of the text that was read: what is possible is taken, and nothing else."""

from __future__ import annotations

import dataclasses

import pytest

from longread.session.text import MOST_FIGURES, TextPrefix, count_of, fixed_width

PREFIX = TextPrefix(
    position=9, num_bytes=30, sha256="0a" * 32, whole=False, segment_position=4, segment_bytes=12, figures="f"
)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"segment_position": 9},
        {"segment_bytes": 30},
        {"whole": True, "figures": ""},
        {"figures": "x" * 2**16},
        {"position": 2**53},
    ],
    ids=str,
)
def test_it_comes_back(changes: dict) -> None:
    prefix = dataclasses.replace(PREFIX, **changes)
    assert TextPrefix.from_metadata(prefix.as_metadata()) == prefix


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"segment_position": 10}, "a segment begins after"),
        ({"segment_bytes": 31}, "a segment begins after"),
        ({"figures": "x" * (MOST_FIGURES + 1)}, "figures are"),
        ({"figures": "é"}, "figures are"),
        ({"sha256": "0A" * 32}, "sha256 is"),
        ({"position": 2**53 + 1}, "position is"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(changes: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        TextPrefix.from_metadata(dataclasses.replace(PREFIX, **changes).as_metadata())


def test_counts_are_written_in_one_width() -> None:
    assert len(fixed_width(0)) == len(fixed_width(2**53)) == 20
    assert count_of({"n": fixed_width(2**53)}, "n") == 2**53
