"""Sessions as they were kept before there were databases: `session.json`, and a journal for each snapshot.

A journal has one line for each event: a CRC-32 in hex, a blank, and JSON. A line that a crash cut off is the last one
and was told to nobody, so it is left out.
"""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path

from longread.config import UserError
from longread.engine.database import Contents
from longread.engine.events import Event
from longread.files import read_json

KIND = "engine-session"


def has_journals(folder: Path) -> bool:
    """Whether a session is kept in this way."""
    return (folder / "session.json").exists()


def journal_files(folder: Path) -> list[Path]:
    """All that is there of what a database takes the place of."""
    facts = [folder / "session.json"] if has_journals(folder) else []
    return [*facts, *(path for _, path in _numbered(folder))]


def read_journals(folder: Path) -> Contents:
    """What a session's files say, as far as they can be read."""
    found = Contents()
    try:
        found.session = read_json(folder / "session.json", kind=KIND)
        generation = int(found.session["saved"]["generation"])
    except (UserError, KeyError, TypeError, ValueError, AttributeError) as error:
        found.session = None
        found.damage = str(error) if isinstance(error, UserError) else f"session.json is damaged: {error!r}"
        generation = 0
    for number, path in _numbered(folder):
        events, beyond, damage = _read(path)
        if number >= generation and found.damage is None:
            found.events += events
            found.damage = damage
        else:
            beyond += events
        found.beyond += beyond
    return found


def _read(path: Path) -> tuple[list[Event], list[Event], str | None]:
    """The events of a journal up to a damage, those beyond it, and the damage."""
    try:
        lines = [_event(line) for line in path.read_bytes().split(b"\n")]
    except OSError as error:
        return [], [], f"cannot read {path}: {error.strerror}"
    good = lines.index(None) if None in lines else len(lines)
    beyond = [event for event in lines[good:] if event is not None]
    damage = f"line {good + 1} of {path} is damaged" if beyond else None
    return [event for event in lines[:good] if event is not None], beyond, damage


def _event(line: bytes) -> Event | None:
    crc, _, text = line.partition(b" ")
    try:
        if len(crc) != 8 or int(crc, 16) != zlib.crc32(text):
            return None
        event = json.loads(text)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    found = ((re.fullmatch(r"journal-(\d+)\.jsonl", path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in found if match)
