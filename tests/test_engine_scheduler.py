"""Nobody waits for what the device is doing: it is held inside a piece of text, and the rest goes on."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from longread.config import UserError
from longread.engine import (
    Busy,
    Engine,
    Limits,
    OverQuota,
    Progress,
    Quota,
    Sampling,
    Token,
    largest_session,
    pieces,
    scheduler,
)
from longread.engine.jobs import Shares
from longread.engine.memory import leaving
from longread.engine.records import Reader, RecordsLock
from longread.engine.store import Store
from longread.session import Session
from tests.held import Held
from tests.test_engine import write
from tests.test_engine_batches import INNER, M, make, text
from tests.test_engine_files import crash, opened

LONG = 5 * pieces.STEPS * M
"""Tokens of five pieces."""


@pytest.fixture(params=["memory", "disk"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    with Engine(make(), INNER, directory=tmp_path if request.param == "disk" else None) as made:
        yield made


def held_reading(engine: Engine, patch: pytest.MonkeyPatch, **options: Any) -> tuple[str, Any, Held]:
    """A session that reads, and the device held in the middle of its second piece."""
    sid = engine.create(**options).id
    patch.setattr(pieces, "read", held := Held(pieces.read, call=2))
    task = engine.append(sid, text(LONG))
    assert held.entered.wait(120)
    return sid, task, held


def test_what_computes_nothing_is_answered_while_the_device_is_busy(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle = engine.create("ann").id
    engine.append(idle, text(30)).result(120)
    before = engine.info(idle)
    assert before.drift > 0
    sid, task, held = held_reading(engine, monkeypatch, owner="bob")
    try:
        position = engine.info(sid).position
        assert 0 < position < LONG
        assert engine.info(idle) == before
        assert engine.update(sid, label="a book").label == "a book"
        assert engine.update(idle, learn=False).learn is False
        created = engine.create("ann", label="new")
        fork, twin = engine.fork(idle), engine.fork(sid)
        assert (fork.position, fork.drift, twin.position, twin.owner) == (30, before.drift, position, "bob")
        assert {info.id for info in engine.sessions()} == {idle, sid, created.id, fork.id, twin.id}
        assert engine.losses(sid).end == position
        assert engine.stats()["sessions"] == 5
        assert engine.timings()["waiting"].count == 2
        with pytest.raises(UserError, match="not in the vocabulary"):
            engine.append(idle, [-1])
        waiting = engine.append(created.id, text(3))
        engine.delete(fork.id)
        engine.delete(idle)
        assert not task.done
        assert not waiting.done
    finally:
        held.go()
    assert task.result(120).position == LONG
    assert waiting.result(120).position == 3
    session = Session(engine.model, INNER)
    session.read(text(LONG)[:position])
    assert write(engine, twin.id) == list(session.generate(10, seed=1))


def test_a_file_is_restored_while_the_device_is_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path) as engine:
        sid = engine.create().id
        engine.append(sid, text(30)).result(120)
        path = engine.export(sid)
        with monkeypatch.context() as patch:
            _, task, held = held_reading(engine, patch)
            try:
                restored = engine.restore(path, "ann")
                assert (restored.position, restored.owner) == (30, "ann")
                assert restored.drift == pytest.approx(engine.info(sid).drift)
            finally:
                held.go()
        task.result(120)


def test_a_disk_is_not_waited_for_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions that are created, forked and restored wait for their own files alone."""
    with opened(tmp_path) as engine:
        one, other = engine.create("ann").id, engine.create("ann").id
        for sid in (one, other):
            engine.append(sid, text(9)).result(120)
        path = engine.export(one)
        calls = [engine.create, lambda: engine.fork(one), lambda: engine.restore(path)]
        calls += [engine.create, lambda: engine.fork(other), lambda: engine.restore(path)]
        together = threading.Barrier(len(calls), timeout=120)
        create = Store.create

        def creating(*args: Any, **options: Any) -> None:
            together.wait()  # which breaks unless all are here at once
            create(*args, **options)

        monkeypatch.setattr(Store, "create", creating)
        with ThreadPoolExecutor(len(calls)) as threads:
            infos = [future.result() for future in [threads.submit(call) for call in calls]]
        assert [info.position for info in infos] == [0, 9, 9] * 2
    with opened(tmp_path) as engine:
        assert sorted(info.position for info in engine.sessions()) == [0, 0, 9, 9, 9, 9, 9, 9]


@pytest.mark.parametrize("directory", [False, True])
def test_limits_are_exact_when_all_come_at_once(directory: bool, tmp_path: Path) -> None:
    many, most, quota = 24, 7, Quota(sessions=3)
    place = tmp_path if directory else None
    with Engine(make(), INNER, directory=place, limits=Limits(max_sessions=most)) as engine:
        start = threading.Barrier(many, timeout=120)
        ann = engine.create("ann", quota=quota).id

        def come(i: int) -> str:
            start.wait()
            try:
                if i % 3 == 0:
                    engine.fork(ann, quota=quota)
                else:
                    engine.create("bob" if i % 3 == 1 else "eve")
            except OverQuota:
                return "quota"
            except Busy:
                return "busy"
            return "in"

        with ThreadPoolExecutor(many) as threads:
            outcomes = list(threads.map(come, range(many)))
        assert len(engine.sessions()) == 1 + outcomes.count("in") == most
        assert len(engine.sessions("ann")) <= 3


def test_an_owner_may_have_so_much_and_others_have_room() -> None:
    with Engine(make(), INNER) as engine:
        nbytes = engine.create("ann", quota=Quota(sessions=3, room=3)).nbytes
        with pytest.raises(OverQuota, match="there are 1 sessions, and 3 may be; delete some"):
            engine.create("ann", quota=Quota(sessions=3, room=3))
        with pytest.raises(OverQuota, match=r"the sessions hold \d+ bytes, and 1 may be; delete some"):
            engine.create("ann", quota=Quota(nbytes=1))
        assert engine.create("ann", quota=Quota(nbytes=nbytes + 1)).nbytes == nbytes
        assert engine.create("bob", quota=Quota(sessions=1)).owner == "bob"


def test_who_could_not_come_in_takes_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(make(), INNER, directory=tmp_path, limits=Limits(max_sessions=2)) as engine:
        sid = engine.create().id

        def full(*args: Any, **options: Any) -> None:
            raise UserError("cannot write: no space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(Store, "create", full)
            for make_one in (engine.create, lambda: engine.fork(sid)):
                with pytest.raises(UserError, match="no space left"):
                    make_one()
        assert [info.id for info in engine.sessions()] == [sid]
        engine.create()
        with pytest.raises(Busy, match="there are 2 sessions of at most 2"):
            engine.create()


def lengths(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of every piece that is read: sequences and tokens."""
    found: list[tuple[int, int]] = []
    read = pieces.read

    def reading(model: Any, state: Any, tokens: Any, **options: Any) -> Any:
        found.append((len(tokens), len(tokens[0])))
        return read(model, state, tokens, **options)

    monkeypatch.setattr(pieces, "read", reading)
    return found


@pytest.mark.parametrize(
    ("device", "apart"), [("cpu", True), ("cpu", False), pytest.param("cuda", False, marks=pytest.mark.gpu)]
)
def test_pieces_that_cannot_stand_still_are_short_while_somebody_writes(
    device: str, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One mini-batch, whoever reads; long ones come back when the writer has gone."""
    monkeypatch.setattr(pieces, "SHORT", M)
    monkeypatch.setattr(scheduler, "QUIET", 0.0)
    with Engine(make().to(device), INNER, limits=Limits(batch_invariant=apart)) as engine:
        writer, *readers = (engine.create().id for _ in range(3))
        engine.append(writer, text(9)).result(120)
        found = lengths(monkeypatch)
        writing = engine.generate(writer, Sampling(max_tokens=100_000))
        next(iter(writing))
        reading = [engine.append(sid, text(2 * pieces.STEPS * M, i)) for i, sid in enumerate(readers)]
        for task in reading:
            task.result(120)
        assert max(tokens for _, tokens in found) == (M if device == "cuda" else pieces.STEPS * M)
        writing.cancel()
        writing.result(120)
        found.clear()
        engine.append(readers[0], text(2 * pieces.STEPS * M)).result(120)
        assert max(tokens for _, tokens in found) >= pieces.STEPS * M


def test_a_prompt_that_is_read_alone_is_read_in_long_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(make(), INNER, limits=Limits(batch_invariant=False)) as engine:
        found = lengths(monkeypatch)
        engine.complete(text(2 * pieces.STEPS * M), Sampling(max_tokens=1)).result(120)
        assert max(tokens for _, tokens in found) == pieces.STEPS * M


class Clock:
    """Every piece of text takes a second, and nothing else takes any time."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now, self.order, self.begin = 0.0, list[int](), threading.Event()
        read = pieces.read

        def reading(model: Any, state: Any, tokens: Any, **options: Any) -> Any:
            self.begin.wait(120)
            self.now += 1
            self.order.append(int(tokens[0, 0]))
            return read(model, state, tokens, **options)

        patch.setattr(pieces, "read", reading)
        patch.setattr(scheduler.time, "perf_counter", lambda: self.now)


def test_owners_share_the_device_and_not_their_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three texts of one owner and one of another: each owner gets every other piece."""
    monkeypatch.setattr(pieces, "STEPS", 2)
    with Engine(make(), INNER) as engine, monkeypatch.context() as patch:
        clock = Clock(patch)
        texts = [("ann", 1), ("ann", 2), ("ann", 3), ("bob", 4)]
        ids = [engine.create(owner).id for owner, _ in texts]
        engine.append(engine.create("eve").id, [0])  # in which the device is held until all others wait
        tasks = [engine.append(sid, [name] * (8 * pieces.STEPS * M)) for sid, (_, name) in zip(ids, texts, strict=True)]
        clock.begin.set()
        for task in tasks:
            task.result(120)
    order = clock.order[clock.order.index(0) + 1 :]
    shared = order[: 2 * order.count(4)]
    assert order.count(4) == 8
    assert abs(shared.count(4) - len(shared) / 2) <= 1
    own = [name for name in order if name != 4]
    assert own[:6] == [1, 2, 3, 1, 2, 3]  # those of one owner in the order in which they came


def test_an_owner_who_was_away_gets_no_credit() -> None:
    shares = Shares()
    shares.come("ann", ())
    shares.charge(["ann"] * 2, 10.0)
    shares.come("bob", ["ann"])
    assert shares.had("bob") == shares.had("ann") == 10.0
    shares.charge(["ann", "bob", "bob"], 3.0)
    assert (shares.had("ann"), shares.had("bob")) == (11.0, 12.0)
    shares.come("eve", ["bob"])
    assert shares.had("eve") == 12.0
    assert shares.had("ann") == 0.0, "and is forgotten"


def record(owner: str, used: float, nbytes: int = 1) -> Reader:
    return Reader(f"{owner}{used:g}", owner, "", learn=True, recent=deque(), used=used, nbytes=nbytes)


def test_who_holds_most_gives_way() -> None:
    """Not whoever has only one session, however long ago it was used."""
    readers = [record("ann", i) for i in range(10, 16)] + [record("bob", 1), record("bob", 2), record("eve", 0)]
    names = [reader.id for reader in leaving(readers)]
    assert names[:4] == ["ann10", "ann11", "ann12", "ann13"]
    assert names[-1] in ("eve0", "ann15", "bob2")
    assert names.index("eve0") >= 6
    assert [reader.id for reader in leaving([record("ann", i) for i in (3, 1, 2)])] == ["ann1", "ann2", "ann3"]


def test_a_tenant_with_many_sessions_does_not_push_anothers_out() -> None:
    model = make()
    size = largest_session(model)
    with Engine(model, INNER, limits=Limits(device_bytes=6 * size, host_bytes=2**30)) as engine:
        bob = engine.create("bob").id
        engine.append(bob, text(9 * M)).result(120)
        for seed in range(12):
            engine.append(engine.create("ann").id, text(9 * M, seed)).result(120)
        assert engine.info(bob).tier == "device"
        assert {info.tier for info in engine.sessions("ann")} == {"device", "host"}


def test_long_texts_of_one_owner_do_not_keep_anothers_off_the_device() -> None:
    """Two fit there; both stand back in turn, and go on afterwards."""
    model = make()
    with Engine(model, INNER, limits=Limits(device_bytes=2 * largest_session(model), host_bytes=2**30)) as engine:
        ids = [engine.create("ann").id for _ in range(2)]
        long = [engine.append(sid, text(2000 * M)) for sid in ids]
        for task in long:
            next(iter(task))
        assert engine.append(engine.create("bob").id, text(5 * M)).result(120).position == 5 * M
        assert not any(task.done for task in long)
        for task in long:
            seen = max(engine.info(sid).position for sid in ids)
            while next(iter(task)).position <= seen:  # both go on
                pass
            task.cancel()
        for sid, task in zip(ids, long, strict=True):
            session = Session(model, INNER)
            session.read(text(2000 * M)[: task.result(120).position])
            assert write(engine, sid) == list(session.generate(10, seed=1))


def test_endless_writers_of_one_owner_do_not_keep_anothers_out_of_the_lanes() -> None:
    with Engine(make(), INNER, limits=Limits(max_batch=2)) as engine:
        ids = [engine.create(owner).id for owner in ("ann", "ann", "bob")]
        for sid in ids:
            engine.append(sid, text(9)).result(120)
        endless = [engine.generate(sid, Sampling(max_tokens=100_000, seed=1)) for sid in ids[:2]]
        for task in endless:
            next(iter(task))
        session = Session(engine.model, INNER)
        session.read(text(9))
        assert write(engine, ids[2], 5) == list(session.generate(5, seed=1))
        assert not any(task.done for task in endless)
        for task in endless:
            task.cancel()
        for task in endless:
            assert task.result(120).reason == "cancelled"


def test_the_lock_lets_others_in_while_something_is_computed() -> None:
    lock, inside = RecordsLock(), threading.Event()

    def come() -> None:
        with lock:
            inside.set()

    with lock:
        thread = threading.Thread(target=come)
        thread.start()
        with lock.released():
            assert inside.wait(120)
        thread.join()


def test_events_come_in_order_whatever_is_asked_meanwhile(engine: Engine) -> None:
    sid = engine.create().id
    task = engine.append(sid, text(LONG))
    positions, asked = [], []
    for event in task:
        assert isinstance(event, Progress)
        positions.append(event.position)
        asked.append(engine.info(sid).position)
    assert positions == sorted(positions)
    assert asked == sorted(asked)
    assert all(seen >= told for seen, told in zip(asked, positions, strict=True))
    tokens = [event for event in engine.generate(sid, Sampling(max_tokens=3 * M, seed=0)) if isinstance(event, Token)]
    assert [token.position for token in tokens] == list(range(LONG + 1, LONG + 3 * M + 1))


def test_forks_of_a_session_that_goes_on_survive(tmp_path: Path) -> None:
    """Forked while it reads, is saved and goes on: each fork has read what it had when it was made, after a crash."""
    engine = opened(tmp_path)
    sid = engine.create().id
    task = engine.append(sid, text(400 * M))
    forks = {}
    with ThreadPoolExecutor(4) as threads:
        saving = [threads.submit(engine.save, sid) for _ in range(3)]
        for _ in range(6):
            fork = engine.fork(sid)
            forks[fork.id] = fork.position
        for saved in saving:
            saved.result(120)
    task.cancel()
    task.result(120)
    crash(engine)
    with opened(tmp_path) as engine:
        assert engine.lost == []
        for fork_id, position in forks.items():
            assert engine.info(fork_id).position == position
            assert engine.append(fork_id, text(3)).result(120).position == position + 3
