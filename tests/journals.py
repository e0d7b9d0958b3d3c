"""Sessions of an engine as they were kept before there were databases."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

from longread.engine.database import read_database
from longread.files import write_json


def as_journals(directory: Path) -> None:
    """Rewrites the directory of an engine that has ended."""
    for path in directory.glob("sessions/*/session.db"):
        _, contents = read_database(path)
        if contents.session is None or contents.damage is not None:
            raise ValueError(f"{path}: {contents.damage}")
        number = contents.session["saved"]["generation"]
        lines = [json.dumps(event, separators=(",", ":")).encode() for event in contents.events]
        journal = b"".join(b"%08x %s\n" % (zlib.crc32(line), line) for line in lines)
        if journal:
            (path.parent / f"journal-{number}.jsonl").write_bytes(journal)
        write_json(path.parent / "session.json", contents.session, kind="engine-session")
        path.unlink()
