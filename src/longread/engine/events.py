"""What has happened to a session since its snapshot: an event says where, which tokens, and how they were read.

{"at": 9, "tokens": [5, 7], "learn": true}   tokens read at a position; with "wrote" if the session wrote them
{"cut": 10}                                  what was read from that position on is taken back
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Event = dict[str, Any]


def consistent(events: Sequence[Event], position: int) -> tuple[list[Event], int]:
    """The events, from the first, that lead on from `position` without a gap, and the position that they lead to."""
    good = []
    for event in events:
        try:
            if "cut" in event:
                position = min(position, int(event["cut"]))
            elif not all(type(token) is int and token >= 0 for token in event["tokens"]):
                break
            elif event["at"] != position:
                # the rest of a text, said again for a snapshot that then was not made
                if not (event.get("carried") and event["at"] + len(event["tokens"]) <= position):
                    break
            else:
                position += len(event["tokens"])
        except (KeyError, TypeError, ValueError):
            break
        good.append(event)
    return good, position


def replayed(events: Sequence[Event], position: int) -> list[tuple[list[int], Event]]:
    """Tokens to read again, in order, each with the event that they belong to."""
    read: list[tuple[int, list[int], Event]] = []
    for event in events:
        if "cut" in event:
            end = int(event["cut"])
            read = [(at, tokens[: max(0, end - at)], of) for at, tokens, of in read if at < end]
            position = min(position, end) if not read else read[-1][0] + len(read[-1][1])
        elif event["at"] == position:
            read.append((position, list(event["tokens"]), event))
            position += len(event["tokens"])
    return [(tokens, event) for _, tokens, event in read if tokens]


def furthest(events: Iterable[Event]) -> int:
    """The furthest position that any of the events speaks of, whatever lies between them."""
    return max((event["at"] + len(event["tokens"]) for event in events if "at" in event), default=0)
