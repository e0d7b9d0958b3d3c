"""What survives: closing, crashes, full disks."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longread.config import InnerConfig, UserError
from longread.engine import Busy, Engine, Limits, Sampling, persistence
from longread.engine.database import read_database
from longread.engine.lanes import largest_session
from longread.session import Session
from tests import crashing
from tests.disk import Disk
from tests.forked import Forked
from tests.test_engine_batches import INNER, M, make, text


def opened(directory: Path, **changes: Any) -> Engine:
    return Engine(make(**changes), INNER, directory=directory)


def crash(engine: Engine) -> None:
    """Leaves the engine as a killed process would leave it: nothing is saved, and no thread writes any more."""
    engine._jobs.closed = True
    engine._scheduler.command(engine._jobs.readers.clear).result()
    engine._scheduler.stop()
    engine._scheduler.join()
    for threads in (engine._jobs.mover, engine._persistence._makers, engine._persistence._writer):
        threads.shutdown(cancel_futures=True)
    if engine.directory is not None and engine._persistence.store is not None:
        files = {path: path.read_bytes() for path in engine.directory.glob("sessions/*/session.db*")}
        engine._persistence.store.release()  # as the end of a process does
        for path, content in files.items():  # which tidies up nothing
            path.write_bytes(content)


def write(engine: Engine, sid: str, count: int = 9) -> list[int]:
    return [token.id for token in engine.generate(sid, Sampling(max_tokens=count, seed=1))]


def reread(engine: Engine, *texts: list[int]) -> list[int]:
    """What a session writes that has read the texts."""
    session = Session(engine.model, INNER)
    for tokens in texts:
        session.read(tokens)
    return list(session.generate(9, seed=1))


def files(directory: Path, kind: str) -> list[Path]:
    return sorted(directory.glob(f"sessions/*/{kind}*"))


@pytest.mark.parametrize("end", [Engine.close, crash], ids=["closed", "killed"])
def test_sessions_go_on_after_a_restart(end: Callable[[Engine], None], tmp_path: Path) -> None:
    engine = opened(tmp_path)
    one, other, empty = engine.create("ann", label="x").id, engine.create(learn=False).id, engine.create().id
    engine.append(one, text(30)).result()
    written = write(engine, one)
    engine.append(one, text(3, 1)).result()
    engine.append(other, text(11)).result()
    fork = engine.fork(one).id
    engine.update(other, label="y")
    before = {info.id: info for info in engine.sessions()}
    end(engine)

    engine = opened(tmp_path)
    assert engine.lost == []
    for info in engine.sessions():
        known = before[info.id]
        assert (info.position, info.owner, info.label, info.learn) == (
            (known.position, known.owner, known.label, known.learn)
        )
    assert write(engine, one) == write(engine, fork) == reread(engine, text(30), written, text(3, 1))
    assert engine.info(one).steps == engine.info(fork).steps
    assert engine.info(empty).position == 0
    assert engine.append(empty, text(5)).result().position == 5
    assert engine.info(other).drift == 0
    engine.close()


@pytest.mark.parametrize("end", [Engine.close, crash], ids=["closed", "killed"])
def test_answers_survive(end: Callable[[Engine], None], tmp_path: Path) -> None:
    engine = opened(tmp_path)
    sid = engine.create().id
    first = engine.append(sid, text(10), expected_position=0).result()
    second = engine.append(sid, text(10, 1), expected_position=10, key="k").result()
    end(engine)
    engine = opened(tmp_path)
    again = engine.append(sid, text(10), expected_position=0).result()
    assert (again.position, again.steps) == (first.position, first.steps)
    assert again.nll[1:] == pytest.approx(first.nll[1:])
    assert engine.append(sid, text(10, 1), key="k").result().nll == pytest.approx(second.nll)
    assert engine.info(sid).position == 20
    engine.close()


def test_saving_while_writing_and_reading(tmp_path: Path) -> None:
    """A snapshot in the midst of a task, then a crash: nothing is there twice, and nothing is missing."""
    engine = opened(tmp_path)
    one, other = engine.create().id, engine.create().id
    engine.append(one, text(5)).result()
    task = engine.generate(one, Sampling(max_tokens=60, seed=1))
    next(iter(task))
    engine.save(one)
    whole = text(5000 * M)  # longer than anybody waits for
    long = engine.append(other, whole)
    next(iter(long))
    path = engine.save(other)
    position = Session.restore(path, engine.model).position
    long.cancel()
    task.result()
    read = long.result().position
    assert 0 < position <= read < len(whole)
    crash(engine)
    engine = opened(tmp_path)
    assert engine.info(one).position == 65
    assert engine.info(other).position == read
    session = Session(engine.model, INNER)
    session.read(text(5))
    list(session.generate(60, seed=1))
    assert write(engine, one) == list(session.generate(9, seed=1))
    assert write(engine, other) == reread(engine, whole[:read])
    engine.close()


def test_saving_while_an_append_is_on_its_way_to_the_disk(tmp_path: Path, disk: Disk) -> None:
    def slowly(operation: str, path: Path, call: Callable[..., Any]) -> None:
        if operation == "sync":
            threading.Event().wait(0.02)
        call()

    disk.hook = slowly
    engine = opened(tmp_path)
    sid = engine.create().id
    for seed in range(5):
        task = engine.append(sid, text(3, seed))
        engine.save(sid)
        task.result()
    crash(engine)
    engine = opened(tmp_path)
    assert engine.lost == []
    assert engine.info(sid).position == 15
    assert write(engine, sid) == reread(engine, *(text(3, seed) for seed in range(5)))
    engine.close()


def test_a_cancelled_append_stays_cancelled(tmp_path: Path) -> None:
    engine = opened(tmp_path)
    sid = engine.create().id
    task = engine.append(sid, text(3000 * M))
    next(iter(task))
    task.cancel()
    position = task.result().position
    crash(engine)
    engine = opened(tmp_path)
    assert engine.info(sid).position == position < 3000 * M
    assert write(engine, sid) == reread(engine, text(3000 * M)[:position])
    engine.close()


def test_events_end_in_snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(persistence, "SNAPSHOT_AFTER", 50)
    engine = opened(tmp_path)
    sid = engine.create().id
    for seed in range(8):
        engine.append(sid, text(30, seed)).result()
    engine.save(sid)
    assert len(files(tmp_path, "snapshot")) == 1
    crash(engine)
    (path,) = files(tmp_path, "session.db")[:1]
    shutil.copytree(path.parent, tmp_path / "copy")
    assert len(read_database(tmp_path / "copy" / path.name)[1].events) <= 2
    engine = opened(tmp_path)
    assert write(engine, sid) == reread(engine, *(text(30, seed) for seed in range(8)))
    engine.close()


def test_a_file_is_as_large_for_any_text(tmp_path: Path) -> None:
    engine = opened(tmp_path)
    sizes = set()
    for n in (16, 96):
        sid = engine.create().id
        engine.append(sid, text(n * M)).result()
        sizes.add(engine.save(sid).stat().st_size)
        assert engine.export(sid).stat().st_size in sizes
    assert len(sizes) == 1
    engine.close()


def test_an_exported_session_can_be_restored_anywhere(tmp_path: Path) -> None:
    engine = opened(tmp_path / "a")
    sid = engine.create().id
    engine.append(sid, text(30)).result()
    path = engine.export(sid)
    engine.append(sid, text(5)).result()
    other = opened(tmp_path / "b")
    for there in (engine, other):
        restored = there.restore(path, "ann", "copy")
        assert (restored.position, restored.owner, restored.label, restored.steps) == (30, "ann", "copy", 7)
        assert write(there, restored.id) == reread(engine, text(30))
    crash(other)
    other = opened(tmp_path / "b")
    assert [info.position for info in other.sessions()] == [39]
    with Engine(make(), INNER) as in_memory:
        assert write(in_memory, in_memory.restore(path).id) == reread(engine, text(30))
    engine.close()
    other.close()


@pytest.mark.parametrize("idle", [False, True])
def test_a_file_says_whether_the_session_learns(idle: bool, tmp_path: Path) -> None:
    engine = opened(tmp_path)
    sid = engine.create().id
    engine.append(sid, text(9)).result()
    engine.save(sid)
    if idle:  # on the disk, where nothing was loaded yet
        engine.close()
        engine = opened(tmp_path)
    engine.update(sid, learn=False)
    assert not Session.restore(engine.export(sid), engine.model).learn
    assert not Session.restore(engine.save(sid), engine.model).learn
    assert write(engine, engine.restore(engine.export(sid)).id) == write(engine, engine.fork(sid).id)
    engine.close()


def test_sessions_travel_through_shared_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = "memory://sessions/one.safetensors"
    with opened(tmp_path / "a") as engine, opened(tmp_path / "b") as other:
        sid = engine.create().id
        engine.append(sid, text(30)).result()
        engine.export(sid, to=address)
        restored = other.restore(address, "ann")
        assert (restored.position, restored.owner) == (30, "ann")
        assert write(other, restored.id) == reread(engine, text(30))
        with pytest.raises(UserError, match="cannot read memory://sessions/none"):
            other.restore("memory://sessions/none")
        with pytest.raises(UserError, match="nowhere://x cannot be used"):
            engine.export(sid, to="nowhere://x")
        monkeypatch.setitem(sys.modules, "fsspec", None)
        with pytest.raises(UserError, match="needs fsspec; run pip install fsspec"):
            other.restore(address)


def test_deleted_sessions_leave_nothing(tmp_path: Path) -> None:
    engine = opened(tmp_path)
    sid = engine.create().id
    engine.append(sid, text(30)).result()
    fork = engine.fork(sid).id
    engine.save(sid)
    engine.delete(sid)
    engine.close()
    assert {path.name for path in (tmp_path / "sessions").iterdir()} == {fork, "lock"}
    engine = opened(tmp_path)
    assert write(engine, fork) == reread(engine, text(30))
    engine.close()


def test_what_was_deleted_does_not_come_back_after_a_crash(tmp_path: Path) -> None:
    engine = opened(tmp_path)
    for seed in range(5):
        sid = engine.create().id
        engine.append(sid, text(30, seed)).result()
        engine.delete(sid)
        assert not (tmp_path / "sessions" / sid).exists()
    crash(engine)
    engine = opened(tmp_path)
    assert engine.sessions() == []
    engine.close()


def test_forks_share_their_file(tmp_path: Path) -> None:
    engine = opened(tmp_path)
    sid = engine.create().id
    engine.append(sid, text(30)).result()
    path = engine.save(sid)
    engine.append(sid, text(4, 1)).result()
    forks = [engine.fork(sid).id for _ in range(3)]
    assert path.stat().st_nlink == 4
    engine.append(sid, text(30, 2)).result()
    engine.save(sid)
    crash(engine)
    engine = opened(tmp_path)
    assert {engine.info(fork).position for fork in forks} == {34}
    assert write(engine, forks[1]) == reread(engine, text(30), text(4, 1))
    engine.close()


def test_a_full_disk_loses_nothing_that_was_acknowledged(tmp_path: Path, disk: Disk) -> None:
    def full(operation: str, path: Path, call: Callable[..., Any]) -> None:
        if operation == "write":
            call(3)  # as much as there is room for
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        call()

    there_is_room = disk.hook
    engine = opened(tmp_path)
    sid = engine.create().id
    engine.append(sid, text(30)).result()
    disk.hook = full
    with pytest.raises(UserError, match="No space left on device"):
        engine.append(sid, text(5)).result()
    assert engine.info(sid).position == 30
    task = engine.generate(sid, Sampling(max_tokens=5, seed=0))
    assert len(list(task)) == 5
    with pytest.raises(UserError, match="No space left on device"):
        task.result()
    assert engine.info(sid).position == 30  # what nobody can keep has not happened
    assert engine.score(sid, text(3)).result().position == 33
    disk.hook = there_is_room
    assert write(engine, sid) == reread(engine, text(30))
    crash(engine)
    engine = opened(tmp_path)
    assert engine.lost == []
    assert engine.info(sid).position == 39
    engine.close()


def test_a_snapshot_that_finds_no_room_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = opened(tmp_path)
    sid = engine.create().id
    engine.append(sid, text(30)).result()
    engine.save(sid)
    engine.append(sid, text(9, 1)).result()

    def full(*args: Any, **kwargs: Any) -> None:
        raise UserError("cannot write it: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Session, "save", full)
        with pytest.raises(UserError, match="No space left"):
            engine.save(sid)
        with pytest.raises(UserError, match="No space left"):
            engine.export(sid)
    engine.append(sid, text(9, 2)).result()
    crash(engine)
    engine = opened(tmp_path)
    assert engine.lost == []
    assert write(engine, sid) == reread(engine, text(30), text(9, 1), text(9, 2))
    engine.close()


def test_a_disk_budget_refuses_new_sessions(tmp_path: Path) -> None:
    model = make()
    limits = Limits(disk_bytes=3 * largest_session(model))
    with Engine(model, INNER, directory=tmp_path, limits=limits) as engine:
        ids = []
        for seed in range(2):
            ids.append(engine.create().id)
            engine.append(ids[-1], text(9 * M, seed)).result()
            engine.save(ids[-1])
        with pytest.raises(Busy, match="session files take"):
            engine.create()
        engine.delete(ids[0])
        for _ in range(100):
            if engine.stats()["bytes_disk"] < largest_session(model):
                break
            threading.Event().wait(0.01)
        engine.create()


def crashes(directory: Path, rounds: int, seed: int) -> dict[str, int]:
    process = Forked(crashing.main, directory, rounds, seed)
    found, errors = process.communicate()
    assert process.returncode == 0, errors
    return json.loads(found)


def test_killed_a_few_times(tmp_path: Path) -> None:
    assert crashes(tmp_path, rounds=2, seed=0)["rounds"] == 2


@pytest.mark.slow
def test_killed_a_hundred_times(tmp_path: Path) -> None:
    """Beside all that is done to sessions, directories of before are taken over."""
    found = crashes(tmp_path, rounds=100, seed=1)
    assert found["rounds"] == 100
    done = ("acknowledged", "saved", "renamed", "deleted", "old_directories")
    assert all(found.get(what, 0) > 4 for what in done), found


def test_an_engine_takes_over_inner_settings_only_for_new_sessions(tmp_path: Path) -> None:
    engine = opened(tmp_path)
    assert engine.inner == INNER
    engine.close()
    other = Engine(make(), InnerConfig(lr=0.1), directory=tmp_path)
    assert other.sessions() == []
    other.close()


@pytest.mark.slow
def test_a_session_of_a_million_tokens_is_as_large_as_one_of_16k(tmp_path: Path) -> None:
    """To the byte, in memory and on the disk, and what is kept of its newest tokens does not grow for ever."""
    shape = {"width": 8, "num_blocks": 2, "num_suffix_blocks": 1, "mini_batch_size": 256, "window_size": 128}
    engine = opened(tmp_path, **shape)
    sizes, piece = set(), 1 << 14
    for pieces in (1, 64):
        sid = engine.create().id
        for seed in range(pieces):
            engine.append(sid, text(piece, seed)).result()
            assert sum(path.stat().st_size for path in files(tmp_path, "session.db")) < 4_000_000
        info = engine.info(sid)
        assert info.position == pieces * piece
        sizes.add((info.nbytes, engine.export(sid).stat().st_size))
    assert len(sizes) == 1
    engine.close()
