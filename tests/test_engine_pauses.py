"""A long piece of text stands still now and then, and the others have their turns as if it were many short ones."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from longread.engine import Busy, Engine, Limits, Progress, Sampling, Token, pieces, scheduler
from longread.engine.lanes import Lanes
from longread.inner_loop import reading
from longread.session import Session
from tests.test_engine import write
from tests.test_engine_batches import INNER, M, make, text
from tests.test_engine_files import crash, opened

ENDLESS = Sampling(max_tokens=100_000, seed=1)
LONG = pieces.STEPS * M


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(make(), INNER, limits=Limits(batch_invariant=False)) as made:
        yield made


class Standing:
    """The second piece that is read from now on stands still until it is let go, and others have turn after turn."""

    def __init__(self, patch: pytest.MonkeyPatch, call: int = 2) -> None:
        self.entered, self._let = threading.Event(), threading.Event()
        plain, calls = pieces.read, itertools.count(1)

        def read(*args: Any, pause: Callable[[], None] | None = None, **options: Any) -> Any:
            if pause is not None and next(calls) == call:
                self.entered.set()
                while not self._let.is_set():
                    pause()
                    self._let.wait(0.001)  # so that the others' threads come to the lock
            return plain(*args, pause=pause, **options)

        patch.setattr(pieces, "read", read)

    def __enter__(self) -> None:
        assert self.entered.wait(120)

    def __exit__(self, *error: object) -> None:
        self._let.set()


def book(engine: Engine, owner: str = "") -> tuple[str, Any]:
    sid = engine.create(owner).id
    return sid, engine.append(sid, text(3 * LONG))


def is_as_alone(engine: Engine, sid: str, task: Any) -> None:
    """The book was read to its end, and its session is what it is without others."""
    session = Session(engine.model, INNER)
    expected = session.read(text(3 * LONG)).tolist()
    assert task.result(120).nll[1:] == pytest.approx(expected[1:], abs=1e-9)
    assert write(engine, sid) == list(session.generate(10, seed=1))


def test_others_write_fork_and_begin_while_a_piece_stands_still(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inner steps that are due are taken too, and a prompt of somebody else is read and answered."""
    writer, new = engine.create("ann").id, engine.create("bob").id
    for sid in (writer, new):
        engine.append(sid, text(9)).result(120)
    standing = Standing(monkeypatch)
    sid, task = book(engine)
    with standing:
        position = engine.info(sid).position
        assert position == LONG
        expected = Session(engine.model, INNER)
        expected.read(text(9))
        assert write(engine, new, 3 * M) == list(expected.generate(3 * M, seed=1))
        writing = engine.generate(writer, ENDLESS)
        next(iter(writing))
        fork = engine.fork(writer)  # between two tokens
        assert fork.position > 9
        answered = engine.complete(text(5 * M, 2), Sampling(max_tokens=2, temperature=0), owner="eve")
        assert answered.result(120).position == 5 * M + 2
        twin = engine.fork(sid)
        assert twin.position == engine.info(sid).position == position
        with ThreadPoolExecutor(1) as threads:
            changed = threads.submit(engine.update, sid, learn=False)  # of what is being read: after the piece
            for _ in range(3):
                next(event for event in writing if isinstance(event, Token))
            assert not changed.done()
            standing.__exit__()
            assert changed.result(120).position == 2 * LONG
        engine.update(sid, learn=True)
        writing.cancel()
    assert task.result(120).position == 3 * LONG
    session = Session(engine.model, INNER)
    session.read(text(LONG))
    assert write(engine, twin.id) == list(session.generate(10, seed=1))


def test_a_text_that_nobody_wants_any_more_ends_while_it_stands_still(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it was before the piece; of two that are read together only when neither is wanted."""
    standing = Standing(monkeypatch)
    sid, task = book(engine)
    with standing:
        task.cancel()
        result = task.result(120)  # though nobody lets the piece go
    assert (result.position, result.cancelled, len(result.nll)) == (LONG, True, LONG)
    session = Session(engine.model, INNER)
    session.read(text(LONG))
    assert write(engine, sid) == list(session.generate(10, seed=1))


def test_a_session_that_is_deleted_while_its_text_stands_still(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    standing = Standing(monkeypatch)
    sid, task = book(engine)
    with standing:
        engine.delete(sid)
        assert task.result(120).cancelled
    assert engine.sessions() == []


def test_what_fails_in_a_pause_does_not_harm_the_text(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writer = engine.create().id
    engine.append(writer, text(9)).result(120)
    standing = Standing(monkeypatch)
    sid, task = book(engine)

    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with standing:
        with monkeypatch.context() as patch:
            patch.setattr(Lanes, "read", full)
            with pytest.raises(Busy, match="no memory left"):
                engine.generate(writer, ENDLESS).result(120)
        with monkeypatch.context() as patch:
            patch.setattr(scheduler.Slices, "write", full)  # an error that belongs to nobody
            with pytest.raises(torch.OutOfMemoryError):
                engine.generate(writer, ENDLESS).result(120)
        assert len(write(engine, writer)) == 10
    is_as_alone(engine, sid, task)
    assert "a turn of the engine failed" in caplog.text


def test_a_text_that_fails_does_not_harm_who_wrote_in_its_pauses(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, tokens = engine.create().id, list[int]()
    engine.append(writer, text(9)).result(120)
    writing = engine.generate(writer, Sampling(max_tokens=2 * LONG, seed=1))
    writing.subscribe(lambda event: tokens.append(event.id) if isinstance(event, Token) else None)
    rescue_is_asked = pieces.TextPieces._may_be_broken

    def broken(*args: Any) -> bool:
        if len(tokens) > LONG:
            raise torch.OutOfMemoryError("out of memory")
        return rescue_is_asked(*args)

    monkeypatch.setattr(pieces.TextPieces, "_may_be_broken", broken)
    sid = engine.create().id
    with pytest.raises(Busy, match="no memory left"):
        engine.append(sid, text(10 * LONG)).result(120)
    writing.result(120)
    session = Session(engine.model, INNER)
    session.read(text(9))
    assert tokens == list(session.generate(2 * LONG, seed=1))


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("learn", [True, False])
def test_a_writer_has_a_token_for_each_mini_batch_that_is_read(
    learn: bool, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long either takes: neither writing nor reading is starved by the other."""
    order, begun = list[str](), threading.Event()
    inner_step = reading.inner_step

    def step(*args: Any, **options: Any) -> Any:
        order.append("step")
        return inner_step(*args, **options)

    monkeypatch.setattr(reading, "inner_step", step)
    with Engine(make(num_blocks=8), INNER, limits=Limits(batch_invariant=apart)) as engine:
        writer, reader = engine.create(learn=learn).id, engine.create("bob").id
        engine.append(writer, text(9)).result(120)
        writing = engine.generate(writer, ENDLESS)
        writing.subscribe(lambda event: (order.append("token"), begun.set()))
        assert begun.wait(120)
        read = engine.append(reader, text(20 * M))
        read.subscribe(lambda event: order.append("piece") if isinstance(event, Progress) else None)
        read.result(120)
        writing.cancel()
        writing.result(120)
    assert order.count("piece") == 3  # of 8, 8 and 4 mini-batches
    both = " ".join(order[order.index("piece") : len(order) - order[::-1].index("piece")])
    assert both.count("token") == 8 + 4
    if not learn:  # all steps are the reader's
        assert max(part.count("step") for part in both.split("token")) <= 2


def test_what_was_written_and_read_in_pauses_survives_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        engine = opened(tmp_path)
        writer = engine.create().id
        engine.append(writer, text(9)).result(120)
        standing = Standing(patch)
        sid, _ = book(engine)
        with standing:
            written = write(engine, writer, 3 * M)
            engine.save(sid)
        crash(engine)
    with opened(tmp_path) as engine:
        assert engine.lost == []
        assert engine.info(writer).position == 9 + 3 * M
        assert engine.info(sid).position == 3 * LONG
        session = Session(engine.model, INNER)
        session.read(text(3 * LONG))
        assert write(engine, sid) == list(session.generate(10, seed=1))
        other = Session(engine.model, INNER)
        other.read(text(9))
        assert written == list(other.generate(3 * M, seed=1))
        assert write(engine, writer) == list(other.generate(10, seed=1))
