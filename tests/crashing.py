"""Kills an engine again and again, and checks what the next finds: `python -m tests.crashing DIRECTORY ROUNDS SEED`.

A process that only forks holds no threads, so each round costs no start of Python. A worker writes down what it is
about to do and what has been acknowledged; it is killed in the midst of it; a checker opens the same directory. Now and
then the directory becomes one as it was before there were databases, and the next worker is killed while it takes it
over, or later.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longread.engine import Engine, Limits, Sampling
from longread.engine.lanes import largest_session
from longread.session import Session
from tests.journals import as_journals
from tests.test_engine_batches import INNER, M, V, make

PROBE = list(range(8))
LONGEST = 300
"""Tokens of a session that goes on: a check reads all of them again, so that rounds would take longer and longer."""


class Notes:
    """Lines that survive the process that writes them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("a", buffering=1)

    def add(self, **line: Any) -> None:
        self.file.write(json.dumps(line) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        """All notes, the oldest first."""
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def known(self) -> tuple[dict[str, list[int]], dict[str, list[dict]], set[str]]:
        """Acknowledged tokens, what was begun after them, and sessions whose deletion was begun."""
        tokens: dict[str, list[int]] = {}
        begun: dict[str, list[dict]] = {}
        deleted = set()
        for line in self.lines():
            sid = line["id"]
            if line["what"] == "delete":
                deleted.add(sid)
            elif line["what"] in ("deleted", "rename", "renamed", "saved"):
                continue
            elif line["what"] == "has":
                tokens[sid], begun[sid] = line["tokens"], []
            elif line["what"] == "acknowledged":
                tokens[sid] = tokens.get(sid, []) + line["tokens"]
                begun[sid] = begun[sid][1:]
            else:
                begun.setdefault(sid, []).append(line)
        return tokens, begun, deleted

    def labels(self) -> dict[str, list[str]]:
        """What each session may be called: as was acknowledged, or as was begun after that."""
        labels: dict[str, list[str]] = {}
        for line in self.lines():
            if line["what"] == "rename":
                labels.setdefault(line["id"], [""]).append(line["label"])
            elif line["what"] == "renamed":
                labels[line["id"]] = [line["label"]]
        return labels


def open_engine(directory: Path) -> Engine:
    model = make()
    size = largest_session(model)
    limits = Limits(device_bytes=3 * size, host_bytes=size, max_batch=2)  # so that sessions come and go
    return Engine(model, INNER, directory=directory, limits=limits)


def work(directory: Path, seed: int) -> None:
    """Does this and that until it is killed."""
    rng = random.Random(seed)
    notes, engine = Notes(directory / "notes"), open_engine(directory)
    tokens, _, deleted = notes.known()
    ids = [sid for sid in tokens if sid not in deleted]
    for sid in [sid for sid in ids if len(tokens[sid]) > LONGEST]:
        ids.remove(sid)
        delete(notes, engine, sid)
    while len(ids) < 4:
        ids.append(engine.create().id)
        notes.add(what="has", id=ids[-1], tokens=[])
    running: dict[str, tuple[Any, list[int]]] = {}
    while True:
        sid = rng.choice(ids)
        kind = rng.choices(("append", "generate", "save", "rename", "fork", "cancel"), (5, 5, 2, 2, 1, 1))[0]
        if sid in running and kind != "save":  # which may come in the midst of anything
            finish(notes, sid, running)
        if kind in ("append", "cancel"):
            text = [rng.randrange(V) for _ in range(rng.choice((1, M, 5, 40, 120)))]
            notes.add(what="append", id=sid, tokens=text)
            running[sid] = engine.append(sid, text, expected_position=engine.info(sid).position), text
            if kind == "cancel":
                running[sid][0].cancel()
                time.sleep(0.005)
        elif kind == "generate" and engine.info(sid).position:
            settings = {"max_tokens": rng.choice((1, 7, 30)), "seed": rng.randrange(99)}
            notes.add(what="generate", id=sid, **settings)
            running[sid] = engine.generate(sid, Sampling(**settings)), []
        elif kind == "save":
            engine.save(sid)
            notes.add(what="saved", id=sid)
        elif kind == "rename":
            label = f"label {rng.randrange(10**6)}"
            notes.add(what="rename", id=sid, label=label)
            engine.update(sid, label=label)
            notes.add(what="renamed", id=sid, label=label)
        elif kind == "fork" and len(ids) < 7:
            known = notes.known()[0][sid]
            fork = engine.fork(sid)
            if fork.position == len(known):
                notes.add(what="has", id=fork.id, tokens=known)
                ids.append(fork.id)
            else:
                engine.delete(fork.id)
        elif len(ids) > 6:
            gone = ids.pop(rng.randrange(len(ids)))
            if gone in running:
                finish(notes, gone, running)
            delete(notes, engine, gone)


def delete(notes: Notes, engine: Engine, sid: str) -> None:
    """Deletes a session, and writes down before and after that it does."""
    notes.add(what="delete", id=sid)
    engine.delete(sid)
    notes.add(what="deleted", id=sid)


def finish(notes: Notes, sid: str, running: dict[str, tuple[Any, list[int]]]) -> None:
    """Waits for a task and writes down what it acknowledges."""
    task, text = running.pop(sid)
    written = [event.id for event in task if hasattr(event, "id")]
    start = task.result().position - len(task.result().nll if text else written)
    notes.add(what="acknowledged", id=sid, tokens=text[: task.result().position - start] if text else written)


def check(directory: Path) -> None:
    """Every session holds what was acknowledged, and beyond it at most what was begun."""
    notes, engine = Notes(directory / "notes"), open_engine(directory)
    if engine.lost:
        raise AssertionError(f"lost: {engine.lost}")
    tokens, begun, deleted = notes.known()
    while engine.restoring:
        time.sleep(0.005)
    there = {info.id: info for info in engine.sessions()}
    for line in notes.lines():
        if line["what"] == "deleted" and line["id"] in there:
            raise AssertionError(f"{line['id']} was deleted, and is there")
    for sid, labels in notes.labels().items():
        if sid not in deleted and there[sid].label not in labels:
            raise AssertionError(f"{sid} is called {there[sid].label!r}, not {labels}")
    for sid, known in tokens.items():
        if sid in deleted:
            continue
        position = there[sid].position
        if position < len(known):
            raise AssertionError(f"{sid} is at {position}; {len(known)} were acknowledged")
        session = Session(engine.model, INNER)
        session.read(known)
        held = list(known)
        for pending in begun[sid]:
            if len(held) < position and pending["what"] == "append":
                more = pending["tokens"][: position - len(held)]
                session.read(more)
                held += more
            elif len(held) < position:
                count = min(pending["max_tokens"], position - len(held))
                held += list(session.generate(count, seed=pending["seed"]))
        if len(held) != position:
            raise AssertionError(f"{sid} is at {position}, which leads beyond what was begun, {len(held)}")
        expected = session.score(PROBE).tolist()
        found = engine.score(sid, PROBE).result().nll
        if any(abs(a - b) > 1e-9 for a, b in zip(found, expected, strict=True) if a == a):
            raise AssertionError(f"{sid} at {position} does not hold what it has read")
        notes.add(what="has", id=sid, tokens=held)


def forked(function: Callable[..., None], *args: Any) -> int:
    """Runs a function in a process of its own."""
    pid = os.fork()
    if pid:
        return pid
    try:
        function(*args)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def await_growth(path: Path, size: int) -> None:
    """Returns when a file is so long, or after some seconds."""
    end = time.monotonic() + 20
    while time.monotonic() < end and (not path.exists() or path.stat().st_size < size):
        time.sleep(0.002)


def main(directory: str, rounds: str, seed: str) -> None:
    """Raises `SystemExit` at the first round after which something is wrong."""
    path, rng = Path(directory), random.Random(int(seed))
    path.mkdir(parents=True, exist_ok=True)
    old, notes = 0, path / "notes"
    for number in range(int(rounds)):
        before = notes.stat().st_size if notes.exists() else 0
        pid = forked(work, path, rng.randrange(10**6))
        if rng.random() < 0.3:
            time.sleep(rng.uniform(0.02, 0.5))  # perhaps while it opens the directory
        else:
            await_growth(notes, before + rng.randrange(4000))
            time.sleep(rng.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        _, status = os.waitpid(forked(check, path), 0)
        if status:
            raise SystemExit(f"round {number}, seed {seed}: something acknowledged is missing")
        if rng.random() < 0.2:
            os.waitpid(forked(as_journals, path), 0)
            old += 1
    counts = Counter(line["what"] for line in Notes(path / "notes").lines())
    sessions = len(list((path / "sessions").iterdir()))
    print(json.dumps({"rounds": int(rounds), "sessions": sessions, "old_directories": old} | counts))


if __name__ == "__main__":
    main(*sys.argv[1:])
