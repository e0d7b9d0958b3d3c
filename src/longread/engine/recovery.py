"""What is found in an engine's directory when it starts: sessions that can go on, and what is lost of others."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longread.config import UserError
from longread.engine.database import Contents, Database, create_database, log_of, read_database, size_of
from longread.engine.events import Event, consistent, furthest
from longread.engine.interface import Lost
from longread.engine.journals import has_journals, journal_files, read_journals
from longread.engine.snapshots import Saved, check_whole, snapshot_path, snapshots_in
from longread.files import close_to_others, remove_temporaries, remove_tree

DATABASE = "session.db"
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
    return None, read_journals(folder) if has_journals(folder) else Contents()


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
        for path in (*journal_files(folder), *(path for n, path in snapshots_in(folder) if n != saved.generation)):
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
    for old in journal_files(folder):
        if damaged:
            old.rename(f"{old}.damaged")
        else:
            remove_tree(old)
    return database
