"""How long an acknowledged append waits for the disk: a session's database, and beside it a plain file as the least.

    python -m benchmarks.session_appends DIRECTORY [--appends 400] [--out benchmarks/results]

The plain file gets the same event as a line with a checksum, and one fsync: what engines did before there were
databases. The two take turns, so that both see the same disk. First the gate: both hold every event. Then sessions
append at once, each in a thread of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np

from longread.engine.database import create_database
from longread.record import hardware

Append = Callable[[dict[str, object]], None]
Way = Callable[[Path], Append]
SESSIONS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="on the disk that is measured")
    parser.add_argument("--appends", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--out", type=Path, help="write the page into this folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        page = run(Path(folder), options.appends, options.tokens)
    print(page)
    if options.out:
        (options.out / f"session-appends_{date.today()}.md").write_text(page + "\n", encoding="utf-8")


def run(folder: Path, appends: int, tokens: int) -> str:
    """Measures, and renders the page."""
    events = [{"at": i * tokens, "tokens": list(range(tokens)), "learn": True} for i in range(appends)]
    database = create_database(folder / "alone.db", {})
    ways: dict[str, tuple[Append, Way]] = {
        "database": (lambda event: database.add([event]), in_database),
        "plain file": (in_file(folder / "alone.jsonl"), in_file),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for event in events:
        for name, (append, _) in ways.items():
            began = time.perf_counter()
            append(event)
            times[name].append(1000 * (time.perf_counter() - began))
    if database.events() != events or len((folder / "alone.jsonl").read_text().splitlines()) != appends:
        raise SystemExit("an event is missing")
    rows = []
    for name, (_, way) in ways.items():
        middle, p99 = np.percentile(times[name], [50, 99])
        rate = at_once(way, folder, events)
        rows.append(f"| {name} | {middle:.2f} | {p99:.2f} | {max(times[name]):.2f} | {rate:.0f} |")
    return "\n".join(
        [
            f"# Appends of {tokens} tokens until they are durable",
            "",
            f"{appends} of each, in turns, on {hardware()['processor']}; then {SESSIONS} sessions at once.",
            "",
            f"| | median ms | p99 ms | longest ms | appends/s, {SESSIONS} sessions |",
            "|---|--:|--:|--:|--:|",
            *rows,
        ]
    )


def in_database(path: Path) -> Append:
    """A session's database, as an engine keeps it."""
    database = create_database(path, {})
    return lambda event: database.add([event])


def in_file(path: Path) -> Append:
    """A line of a file."""

    def append(event: dict[str, object]) -> None:
        text = json.dumps(event, separators=(",", ":")).encode()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(descriptor, b"%08x %s\n" % (zlib.crc32(text), text))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    return append


def at_once(way: Way, folder: Path, events: list[dict[str, object]]) -> float:
    """Appends per second of several sessions together."""
    ways = [way(folder / f"{way.__name__}-{i}") for i in range(SESSIONS)]
    threads = [threading.Thread(target=lambda append=append: [append(event) for event in events]) for append in ways]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return SESSIONS * len(events) / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
