"""Inner steps of sessions that write: each in its lane and by itself, whatever else happens at that moment."""

from __future__ import annotations

import itertools
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longread.engine import Busy, Engine, Limits, Sampling, pieces
from longread.engine.lanes import Lanes
from longread.engine.records import Job
from longread.inner_loop.places import Places
from longread.session import Session
from tests.held import Held
from tests.test_engine_batches import INNER, NETWORKS, M, make, text

each_way = pytest.mark.parametrize("apart", [True, False])


def greedy(n: int) -> Sampling:
    return Sampling(max_tokens=n, temperature=0)


def session_after(engine: Engine, n: int, seed: int) -> Session:
    session = Session(engine.model, INNER)
    session.read(text(n, seed))
    return session


@each_way
def test_who_takes_a_step_stays_in_its_lane(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    moves = Counter[str]()

    def counted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **options: Any) -> Any:
            moves[name] += 1
            return method(*args, **options)

        return called

    for name in ("enter", "leave", "step"):
        monkeypatch.setattr(Lanes, name, counted(name, getattr(Lanes, name)))
    lengths = (2 * M, 2 * M + 1, 3 * M)
    with Engine(make(), INNER, limits=Limits(batch_invariant=apart)) as engine:
        ids = [engine.create().id for _ in lengths]
        for i, (sid, n) in enumerate(zip(ids, lengths, strict=True)):
            engine.append(sid, text(n, i)).result(120)
        tasks = [engine.generate(sid, greedy(3 * M + 1)) for sid in ids]
        for i, (sid, n, task) in enumerate(zip(ids, lengths, tasks, strict=True)):
            session = session_after(engine, n, i)
            assert [token.id for token in task] == list(session.generate(3 * M + 1, temperature=0))
            assert engine.info(sid).steps == session.steps
            assert engine.info(sid).drift == pytest.approx(session.drift(), rel=1e-10)
        assert engine.stats()["steps"] == sum((n + 3 * M) // M for n in lengths)
    assert moves == {"enter": 3, "leave": 3, "step": 4 + 3 + 4}


def test_who_waits_for_its_step_may_be_told_to_learn_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its token is drawn, and the step of another is under way; it reads that token in a lane all the same."""
    monkeypatch.setattr(pieces, "HOLD", 0.0)  # one step in a turn
    draw, step = Held(Lanes.likeliest), Held(Lanes.step)
    monkeypatch.setattr(Lanes, "likeliest", lambda *args: draw(*args))
    monkeypatch.setattr(Lanes, "step", lambda *args: step(*args))
    with Engine(make(), INNER, limits=Limits(batch_invariant=False)) as engine:
        first, second = (engine.create().id for _ in range(2))
        engine.append(first, text(2 * M - 2, 0)).result(120)
        engine.append(second, text(2 * M - 1, 1)).result(120)
        tasks = [engine.generate(first, greedy(2 * M))]
        assert draw.entered.wait(120)
        tasks.append(engine.generate(second, greedy(2 * M)))  # a turn later
        draw.go()
        assert step.entered.wait(120)  # both are due
        thread = threading.Thread(target=engine.update, args=(second,), kwargs={"learn": False})
        thread.start()
        while not engine._scheduler._commands:
            time.sleep(0.001)
        step.go()
        thread.join(120)
        one, other = session_after(engine, 2 * M - 2, 0), session_after(engine, 2 * M - 1, 1)
        assert [token.id for token in tasks[0]] == list(one.generate(2 * M, temperature=0))
        written = other.generate(2 * M, temperature=0)
        expected = [next(written)]
        other.learn = False
        assert [token.id for token in tasks[1]] == [*expected, *written]
        for sid, session in ((first, one), (second, other)):
            assert engine.info(sid).steps == session.steps
            assert engine.score(sid, [1, 2]).result(120).nll == pytest.approx(session.score([1, 2]).tolist(), rel=1e-9)


@each_way
def test_a_step_that_fails_ends_one_task(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its session stays where it was, and can go on."""
    step, lengths = Lanes.step, (2 * M - 1, 2 * M - 1, 2 * M)
    with Engine(make(), INNER, limits=Limits(batch_invariant=apart)) as engine:
        ids = [engine.create().id for _ in lengths]
        for i, (sid, n) in enumerate(zip(ids, lengths, strict=True)):
            engine.append(sid, text(n, i)).result(120)

        def failing(lanes: Lanes, job: Job, *rest: Any) -> bool:
            if job.reader.id == ids[1]:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return step(lanes, job, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(Lanes, "step", failing)
            tasks = [engine.generate(sid, greedy(2 * M)) for sid in ids]
            with pytest.raises(Busy, match="no memory left"):
                tasks[1].result(120)
            for i in (0, 2):
                session = session_after(engine, lengths[i], i)
                assert [token.id for token in tasks[i]] == list(session.generate(2 * M, temperature=0))
        assert engine.info(ids[1]).position == 2 * M
        session = session_after(engine, lengths[1], 1)
        assert len(list(session.generate(1, temperature=0))) == 1
        assert [token.id for token in engine.generate(ids[1], greedy(2 * M))] == list(
            session.generate(2 * M, temperature=0)
        )


@each_way
def test_a_step_whose_token_cannot_be_read_is_taken_back(
    apart: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In memory, as on the disk after a crash: there no step is kept without the token that is its last target."""
    real = Places.read

    def failing(places: Places, tokens: Tensor) -> None:
        if len(stepped) == 2:
            stepped.clear()
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(places, tokens)

    stepped, step, limits = list[Job](), Lanes.step, Limits(batch_invariant=apart)
    with Engine(make(), INNER, directory=tmp_path / "here", limits=limits) as engine:
        session = session_after(engine, M + 1, 0)
        list(session.generate(2 * M - 1, temperature=0))
        sid = engine.create().id
        engine.append(sid, text(M + 1, 0)).result(120)
        with monkeypatch.context() as patch:
            patch.setattr(Lanes, "step", lambda lanes, job, *rest: stepped.append(job) or step(lanes, job, *rest))
            patch.setattr(Places, "read", failing)
            with pytest.raises(Busy, match="no memory left"):
                engine.generate(sid, greedy(3 * M)).result(120)
        shutil.copytree(tmp_path / "here", tmp_path / "there")
        assert engine.info(sid).position == session.position == 3 * M
        assert (engine.info(sid).steps, engine.stats()["steps"]) == (session.steps, session.steps)
        written = list(session.generate(2 * M, temperature=0))
        assert [token.id for token in engine.generate(sid, greedy(2 * M))] == written
        assert engine.info(sid).steps == session.steps
        assert engine.info(sid).drift == pytest.approx(session.drift(), rel=1e-10)
    with Engine(make(), INNER, directory=tmp_path / "there", limits=limits) as engine:
        assert [token.id for token in engine.generate(sid, greedy(2 * M))] == written
        assert engine.info(sid).steps == session.steps


@each_way
@pytest.mark.parametrize(("network", "writers"), [("window", 2 * M), ("kept", 2 * M), ("mamba2", 1)])
def test_a_text_is_read_beside_those_that_write_all_the_time(network: str, writers: int, apart: bool) -> None:
    """Though an inner step is due at every token of theirs, or they have no lanes."""
    with Engine(
        make(**(NETWORKS | {"kept": {"kept_tokens": 2}})[network]), INNER, limits=Limits(batch_invariant=apart)
    ) as engine:
        tasks = []
        for i in range(writers):
            sid = engine.create().id
            engine.append(sid, text(M + i, i)).result(120)
            tasks.append(engine.generate(sid, Sampling(max_tokens=1_000_000)))
        for task in tasks:
            assert len(list(itertools.islice(task, M + 1))) == M + 1
        reader = engine.create("bob").id
        assert engine.append(reader, text(5 * M)).result(120).position == 5 * M
        for task in tasks:
            assert not task.done
            task.cancel()
