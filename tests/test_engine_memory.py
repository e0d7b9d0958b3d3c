"""A device without memory: what leaves a lane goes elsewhere, and one failure ends nobody else's work."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from longread.config import UserError
from longread.engine import Busy, Engine, Limits, Sampling, persistence
from longread.engine.lanes import Lanes
from longread.engine.pieces import TextPieces
from longread.engine.records import Job, Reader, RecordsLock, Task
from longread.inner_loop.places import Places
from longread.session import Session
from tests.test_engine import read, write
from tests.test_engine_batches import INNER, after, assert_same, make, text

each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@each_device
def test_a_writer_that_the_device_cannot_hold_twice_goes_to_the_host(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(make().to(device), INNER) as plain:
        sid = plain.create().id
        read(plain, sid, text(9))
        expected = write(plain, sid) + write(plain, sid)
    state_of = Lanes.state

    def short(lanes: Lanes, job: object, device: torch.device | None = None) -> object:
        if device is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return state_of(lanes, job, device)  # type: ignore[arg-type]

    read_group, tiers = TextPieces.read, set()

    def reading(pieces: TextPieces, jobs: list[Job], *rest: Any) -> None:
        tiers.update(job.reader.tier for job in jobs)
        read_group(pieces, jobs, *rest)

    monkeypatch.setattr(Lanes, "state", short)
    monkeypatch.setattr(TextPieces, "read", reading)
    with Engine(make().to(device), INNER) as engine:
        sid = engine.create().id
        read(engine, sid, text(9))
        first = write(engine, sid)
        assert engine.info(sid).tier == "host"
        assert first + write(engine, sid) == expected
    assert tiers == {"device"}  # for an inner step too it comes back first


def test_a_lane_that_cannot_be_moved_becomes_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails between two lanes must not give one session what another remembers."""
    model = make()
    readers = [Reader(str(i), "", "", learn=True, recent=deque()) for i in range(2)]
    lock = RecordsLock()
    lanes, jobs = Lanes(model, 2, lock), [Job(Task(), reader, ()) for reader in readers]
    with lock:
        lanes.resize(2)
        for i, job in enumerate(jobs):
            job.reader.rest(after(model, 9, i))
            lanes.enter(job)

    def short(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Places, "put", short)
    with lock:
        with pytest.raises(torch.OutOfMemoryError):
            lanes.first(jobs[1:])
        with pytest.raises(LookupError):
            lanes.leave(jobs[0])
        lanes.leave(jobs[1])
    assert_same(jobs[1].reader.state, after(model, 9, 1))  # type: ignore[arg-type]


def test_lanes_that_are_lost_end_their_tasks_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def gone(lanes: Lanes, job: object, device: object = None) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with Engine(make(), INNER) as engine:
        lost, kept = engine.create().id, engine.create().id
        for sid in (lost, kept):
            read(engine, sid, text(9))
        with monkeypatch.context() as patch:
            patch.setattr(Lanes, "state", gone)
            with pytest.raises(UserError, match="is lost at position"):
                engine.generate(lost, Sampling(max_tokens=3)).result(60)
        assert [info.id for info in engine.sessions()] == [kept]
        assert len(write(engine, kept)) == 10
    assert "lanes are given up" in caplog.text
    assert "a turn of the engine failed" not in caplog.text


def test_a_snapshot_is_written_after_the_copy_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No graph can be captured beside a copy, and checksums and a disk take seconds."""
    inside, saved, save = threading.Event(), [], Session.save

    @contextlib.contextmanager
    def copying(device: torch.device) -> Iterator[None]:
        inside.set()
        yield
        inside.clear()

    def saving(session: Session, *args: Any, **options: Any) -> None:
        saved.append(inside.is_set())
        save(session, *args, **options)

    monkeypatch.setattr(persistence, "beside", copying)
    monkeypatch.setattr(Session, "save", saving)
    with Engine(make(), INNER, directory=tmp_path) as engine:
        sid = engine.create().id
        read(engine, sid, text(9))
        engine.save(sid)
    assert saved == [False]


def test_one_failure_among_lanes_of_their_own_ends_one_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the others have read in the same round is booked."""
    model = make()
    with Engine(model, INNER) as engine:  # float64: each lane by itself
        ids = [engine.create().id for _ in range(3)]
        for i, sid in enumerate(ids):
            read(engine, sid, text(9, i))
        read_one = Lanes.read_one

        def failing(lanes: Lanes, job: Job) -> None:
            if job.reader.id == ids[1] and job.reader.position == 10:
                raise torch.OutOfMemoryError("CUDA out of memory")
            read_one(lanes, job)

        monkeypatch.setattr(Lanes, "read_one", failing)
        tasks = [engine.generate(sid, Sampling(max_tokens=5, temperature=0)) for sid in ids]
        with pytest.raises(Busy, match="no memory left"):
            tasks[1].result(60)
        for task in (tasks[0], tasks[2]):
            task.result(60)
        assert [engine.info(sid).position for sid in ids] == [14, 10, 14]
        for i, sid in enumerate(ids):
            session = Session(model, INNER)
            session.read(text(9, i))
            list(session.generate((5, 1, 5)[i], temperature=0))
            assert engine.score(sid, [1, 2]).result(60).nll == session.score([1, 2]).tolist()


@each_device
def test_a_session_comes_from_the_disk_through_the_host(device: str, tmp_path: Path) -> None:
    """Only moves between tiers touch the device from another thread."""
    with Engine(make().to(device), INNER, directory=tmp_path, limits=Limits(host_bytes=2**20)) as engine:
        sid = engine.create().id
        read(engine, sid, text(9))
        engine.save(sid)
        copy = engine.restore(engine.export(sid)).id
        assert engine.info(copy).tier == "host"
        assert write(engine, copy) == write(engine, sid)
