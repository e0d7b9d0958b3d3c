"""A journal: what has happened to a session since its newest file, one checked line for each event.

A line is a CRC-32 in hex, a blank, and JSON. Lines are made durable before anybody is told of the event. A line that
was cut off by a crash is the last one and was told to nobody, so it is left out when the journal is read.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

from longread.config import UserError
from longread.files import owner_only, writing

Event = dict[str, Any]


def add_events(path: Path, events: list[Event]) -> int:
    """Appends lines and makes them durable; returns their bytes. After a `UserError` the file is as it was before."""
    lines = b"".join(_line(event) for event in events)
    with writing(path):
        descriptor = owner_only(path, os.O_WRONLY | os.O_CREAT)
        try:
            size = os.lseek(descriptor, 0, os.SEEK_END)
            try:
                view = memoryview(lines)
                while view:
                    view = view[os.write(descriptor, view) :]
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)
    return len(lines)


def read_events(path: Path) -> list[Event]:
    """The events of a journal; none if there is no such file.

    Raises:
        UserError: a line that others follow is damaged; `events` of the error are those before it.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DamagedJournal(f"cannot read {path}: {error.strerror}", []) from None
    events: list[Event] = []
    lines = data.split(b"\n")
    for number, line in enumerate(lines):
        event = _event(line)
        if event is not None:
            events.append(event)
        elif any(_event(later) is not None for later in lines[number + 1 :]):
            raise DamagedJournal(f"line {number + 1} of {path} is damaged", events)
        else:
            break
    return events


def reached(path: Path) -> int:
    """The furthest position that any line of a journal speaks of, whatever lies between the lines."""
    with contextlib.suppress(OSError):
        events = [event for line in path.read_bytes().split(b"\n") if (event := _event(line)) is not None]
        return max((event["at"] + len(event["tokens"]) for event in events if "at" in event), default=0)
    return 0


class DamagedJournal(UserError):
    """What can no longer be read, and the `events` that can."""

    def __init__(self, message: str, events: list[Event]) -> None:
        super().__init__(message)
        self.events = events


def _line(event: Event) -> bytes:
    text = json.dumps(event, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _event(line: bytes) -> Event | None:
    crc, _, text = line.partition(b" ")
    try:
        if len(crc) != 8 or int(crc, 16) != zlib.crc32(text):
            return None
        event = json.loads(text)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None
