"""What sessions may take where nobody says so: a share of what is free; the rest goes to the disk, or is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longread.config import UserError
from longread.engine import Busy, Engine, Limits, largest_session, memory, persistence
from longread.engine.records import KEPT_ANSWERS, KEPT_LOSSES
from longread.session import Session
from tests.forked import Forked
from tests.test_engine import read, write
from tests.test_engine_batches import INNER, M, make, text


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets how many sessions the free memory of this machine would hold."""

    def sessions(count: float) -> int:
        size = int(count * largest_session(make()))
        monkeypatch.setattr(memory, "free_bytes", lambda device: size if device == torch.device("cpu") else None)
        return size

    return sessions


@pytest.mark.parametrize(
    ("device", "host", "expected"),
    [
        (None, None, (70, 0)),
        (20, None, (20, 50)),
        (None, 30, (40, 30)),
        (None, 90, (2, 90)),
        (90, None, (90, 0)),
        (20, 30, (20, 30)),
    ],
)
def test_the_budget_is_a_share_of_what_is_free(
    device: int | None, host: int | None, expected: tuple[int, int], free: Any
) -> None:
    free(100)
    model = make()
    size = largest_session(model)
    given = Limits(**{name: n and n * size for name, n in (("device_bytes", device), ("host_bytes", host))})
    assert [n / size for n in memory.budget(model, given)] == pytest.approx(expected, abs=0.01)


def test_on_a_gpu_memory_that_pytorch_holds_unused_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where weights lay before they were cast."""
    for name, size in (("memory_reserved", 70), ("memory_allocated", 40), ("mem_get_info", (50, 200))):
        monkeypatch.setattr(torch.cuda, name, lambda device, size=size: size)
    model: Any = SimpleNamespace(device=torch.device("cuda"))
    assert memory.budget(model, Limits(host_bytes=0)) == (int(memory.SHARE * 80), 0)


def test_a_machine_that_is_nearly_full_holds_one_session(free: Any) -> None:
    free(0.1)
    with Engine(make(), INNER) as engine:
        sid = engine.create().id
        read(engine, sid, text(5 * M))
        assert len(write(engine, sid)) == 10


def test_without_a_directory_what_does_not_fit_is_refused(free: Any) -> None:
    free(10)
    with Engine(make(), INNER) as engine:
        ids = [engine.create().id for _ in range(7)]
        for make_one in (engine.create, lambda: engine.fork(ids[0])):
            with pytest.raises(Busy, match=r"7 sessions fill the \d+ bytes there are; delete one, or try again later"):
                make_one()
        engine.delete(ids[0])
        engine.create()


def test_with_a_directory_they_go_to_the_disk_and_come_back(free: Any, tmp_path: Path) -> None:
    room = 0.7 * free(10)
    model, count = make(), 20
    with Engine(model, INNER, directory=tmp_path) as engine:
        ids = [engine.create().id for _ in range(count)]
        for i, sid in enumerate(ids):
            read(engine, sid, text(3 * M + i, i))
            settled(engine)
            stats = engine.stats()
            assert stats["bytes_device"] + stats["bytes_host"] <= room
        assert engine.stats()["sessions_disk"] >= count - 7
        for i, sid in list(enumerate(ids))[::7]:
            session = Session(model, INNER)
            session.read(text(3 * M + i, i))
            assert write(engine, sid, 3) == list(session.generate(3, seed=1))


def test_sessions_that_have_read_nothing_take_no_room_anywhere(free: Any, tmp_path: Path) -> None:
    free(10)
    with Engine(make(), INNER, directory=tmp_path) as engine:
        ids = [engine.create(learn=i % 2 == 0).id for i in range(40)]
        settled(engine)
        assert engine.stats()["sessions_disk"] >= 25
        assert not list(tmp_path.rglob("snapshot-*"))
    with Engine(make(), INNER, directory=tmp_path) as engine:
        assert [engine.info(sid).learn for sid in ids] == [i % 2 == 0 for i in range(40)]
        assert {engine.info(sid).nbytes for sid in ids} == {engine.create().nbytes}
        read(engine, ids[0], text(9))


def test_a_full_disk_loses_no_session_and_refuses_new_ones(
    free: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(10)
    model, tries, now = make(), [], [100.0]

    def full(session: Session, *_: Any, **__: Any) -> None:
        tries.append(session.position)
        raise UserError("cannot write: no space left on device")

    monkeypatch.setattr(memory.time, "monotonic", lambda: now[0])
    with Engine(model, INNER, directory=tmp_path) as engine:
        ids = [engine.create().id for _ in range(12)]
        settled(engine)
        with monkeypatch.context() as patch:
            patch.setattr(persistence.Session, "save", full)
            for i, sid in enumerate(ids):
                read(engine, sid, text(3 * M, i))
            settled(engine)
            assert len(tries) == 1, "the disk is left alone for a while"
            with pytest.raises(Busy, match="12 sessions fill the memory for them, and the disk takes none; delete one"):
                engine.create()
            for i, sid in enumerate(ids):
                read(engine, sid, text(M, 100 + i))
        now[0] += memory.REFUSED_SECONDS
        engine.create()
        settled(engine)
        assert engine.stats()["sessions_disk"] >= 5
        for i, sid in enumerate(ids):
            session = Session(model, INNER)
            session.read(text(3 * M, i))
            session.read(text(M, 100 + i))
            assert write(engine, sid, 3) == list(session.generate(3, seed=1))


def test_answers_that_are_kept_are_small() -> None:
    """A list of Python's floats takes 32 bytes for each."""
    assert KEPT_ANSWERS * KEPT_LOSSES * 32 <= 2**19


def status(name: str) -> int:
    """Bytes of a line of /proc."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(lines[name].removesuffix("kB")) * 1024


def read_in_turn(directory: Path) -> None:
    """Prints the size of a session, and by how much the process grows while it reads for sixty."""
    model = make(torch.float32, width=64, mlp_hidden=1024)
    size = largest_session(model)
    memory.free_bytes = lambda device: 10 * size
    with Engine(model, INNER, directory=directory) as engine:
        ids = [engine.create().id for _ in range(60)]
        for sid in ids[:8]:
            engine.append(sid, text(9)).result()
        before = status("VmRSS")
        for sid in ids + ids[:9]:
            engine.append(sid, text(9)).result()
        print(size, status("VmHWM") - before)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says how much memory a process takes")
def test_many_sessions_take_the_memory_of_few(tmp_path: Path) -> None:
    process = Forked(read_in_turn, tmp_path)
    said, errors = process.communicate(300)
    assert process.returncode == 0, errors
    size, grown = map(int, said.split())
    assert grown < 7 * size + 35 * 2**20 < 40 * size, "and not 60 sessions"


def settled(engine: Engine) -> None:
    """Waits until nothing moves between tiers."""
    moving = True
    while moving:
        engine._jobs.mover.submit(lambda: None).result()
        engine._scheduler.command(lambda: None).result()  # what is too much moves in the turn after it
        between = engine._scheduler.command(lambda: any(reader.moving for reader in engine._jobs.readers.values()))
        moving = between.result()
