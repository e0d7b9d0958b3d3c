"""What is found in an engine's directory when it starts: sessions that can go on, and what is lost of others.

Before there were databases, a session was kept in `session.json` and a journal for each snapshot. A journal has one
line for each event: a CRC-32 in hex, a blank, and JSON. A line that a crash cut off is the last one and was told to
nobody, so it is left out.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longread.config import UserError
from longread.engine.database import Contents, Database, Event, create_database, log_of, read_database, size_of
from longread.engine.interface import Lost
from longread.engine.snapshots import Saved, check_whole, snapshot_path, snapshots_in
from longread.files import close_to_others, read_json, remove_temporaries, remove_tree

DATABASE = "session.db"
JOURNAL_KIND = "engine-session"
"""Of `session.json`."""
_ID = re.compile(r"[0-9a-f]{32}")


@dataclass
class Recovered:
    """One session that can go on."""

    id: str
    facts: dict[str, Any]
    saved: Saved
    events: list[Event]
    database: Database


def recover(directory: Path, fingerprint: str) -> tuple[list[Recovered], list[Lost]]:
    """All sessions that can go on, and what cannot.

    Of a session that is damaged, what lies before the damage goes on; the damaged files stay under another name for
    whoever can repair them. Sessions in journals are put into databases.

    Raises:
        UserError: a session belongs to another model. It is not damaged: that model can go on with it. Or there is no
            room to begin.
    """
    folders = [path for path in sorted(directory.iterdir()) if path.is_dir() and not path.is_symlink()]
    read = [(folder, *_read(folder)) for folder in folders if _ID.fullmatch(folder.name)]
    models = [(contents.session or {}).get("fingerprint") for _, _, contents in read]
    if foreign := sum(isinstance(model, str) and model != fingerprint for model in models):
        raise UserError(
            f"{foreign} of {len(read)} sessions in {directory} belong to another model; "
            "start with the model that read them, or give another directory"
        )
    for folder in folders:
        if _ID.match(folder.name):  # lost ones too; a copy may have left them open
            for path in (folder, *folder.iterdir()):
                close_to_others(path)
    lost: list[Lost] = []
    found = [_recover(folder, database, contents, lost) for folder, database, contents in read]
    return [session for session in found if session is not None], lost


def set_aside(folder: Path) -> None:
    """Takes a session's files out of the way, and leaves them to whoever can repair them."""
    folder.rename(folder.with_name(f"{folder.name}.lost"))


def _read(folder: Path) -> tuple[Database | None, Contents]:
    if (folder / DATABASE).exists():
        return read_database(folder / DATABASE)
    return None, _read_journals(folder) if _has_journals(folder) else Contents()


def _recover(folder: Path, database: Database | None, contents: Contents, lost: list[Lost]) -> Recovered | None:
    remove_temporaries(folder)
    if contents == Contents():
        remove_tree(folder)  # its creation or deletion was never finished
        return None
    owner, position, told = contents.owner, 0, furthest([*contents.events, *contents.beyond])
    try:
        if contents.session is None:
            raise UserError(contents.damage or "it has no facts")
        facts, saved = contents.session["facts"], Saved.from_json(contents.session["saved"])
        owner, position = str(facts["owner"]), saved.position
        if saved.generation:
            check_whole(snapshot_path(folder, saved.generation))
    except (UserError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = str(error) if isinstance(error, UserError) else f"its facts are damaged: {error!r}"
        lost.append(Lost(folder.name, owner, max(position, told), 0, reason))
        set_aside(folder)
        return None
    events, end = consistent(contents.events, position)
    damage = contents.damage
    if damage is None and len(events) < len(contents.events):
        damage = f"what has happened to it does not go on at {end}"
    if damage is not None:
        lost.append(Lost(folder.name, owner, max(end, told), end, damage))
    if damage is not None or database is None:
        database = _rewrite(folder, contents.session, events, damaged=damage is not None)
    else:
        for path in (*_journal_files(folder), *(path for n, path in snapshots_in(folder) if n != saved.generation)):
            remove_tree(path)  # it was on its way when the process ended
    return Recovered(folder.name, facts, saved, events, database)


def _rewrite(folder: Path, session: dict[str, Any], events: list[Event], *, damaged: bool) -> Database:
    """Puts a session into a new database, which takes the place of what it was in."""
    path = folder / DATABASE
    if size_of(log_of(path)):  # it would be taken for the new one's
        raise UserError(f"{log_of(path)} cannot be taken over; free some space, or give another directory")
    if damaged:
        with contextlib.suppress(OSError):
            os.link(path, f"{path}.damaged")
    database = create_database(path, session, events)
    for old in _journal_files(folder):
        if damaged:
            old.rename(f"{old}.damaged")
        else:
            remove_tree(old)
    return database


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


def _has_journals(folder: Path) -> bool:
    """Whether a session is kept in journals."""
    return (folder / "session.json").exists()


def _journal_files(folder: Path) -> list[Path]:
    """All that is there of what a database takes the place of."""
    facts = [folder / "session.json"] if _has_journals(folder) else []
    return [*facts, *(path for _, path in _journals_in(folder))]


def _read_journals(folder: Path) -> Contents:
    """What a session's journals say, as far as they can be read."""
    found = Contents()
    try:
        found.session = read_json(folder / "session.json", kind=JOURNAL_KIND)
        generation = int(found.session["saved"]["generation"])
    except (UserError, KeyError, TypeError, ValueError, AttributeError) as error:
        found.session = None
        found.damage = str(error) if isinstance(error, UserError) else f"session.json is damaged: {error!r}"
        generation = 0
    for number, path in _journals_in(folder):
        events, beyond, damage = _read_journal(path)
        if number >= generation and found.damage is None:
            found.events += events
            found.damage = damage
        else:
            beyond += events
        found.beyond += beyond
    return found


def _read_journal(path: Path) -> tuple[list[Event], list[Event], str | None]:
    """The events of a journal up to a damage, those beyond it, and the damage."""
    try:
        lines = [_event_of_line(line) for line in path.read_bytes().split(b"\n")]
    except OSError as error:
        return [], [], f"cannot read {path}: {error.strerror}"
    good = lines.index(None) if None in lines else len(lines)
    beyond = [event for event in lines[good:] if event is not None]
    damage = f"line {good + 1} of {path} is damaged" if beyond else None
    return [event for event in lines[:good] if event is not None], beyond, damage


def _event_of_line(line: bytes) -> Event | None:
    crc, _, text = line.partition(b" ")
    try:
        if len(crc) != 8 or int(crc, 16) != zlib.crc32(text):
            return None
        event = json.loads(text)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None


def _journals_in(folder: Path) -> list[tuple[int, Path]]:
    found = ((re.fullmatch(r"journal-(\d+)\.jsonl", path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in found if match)
