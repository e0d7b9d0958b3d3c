"""Tasks: what clients of the engine are told of their work, in which order, and until when."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from longread.engine import Engine, Finished, Limits, Sampling, Token
from longread.engine.lanes import Lanes
from longread.engine.records import Task
from tests.test_engine_batches import INNER, M, make, text


def test_subscribers_hear_everything_and_may_fail() -> None:
    heard: list[Any] = []
    finished = threading.Event()

    def listen(event: Any) -> None:
        heard.append(event)
        if isinstance(event, Finished):
            finished.set()

    def fail(event: Any) -> None:
        raise RuntimeError("the client is gone")

    with Engine(make(), INNER) as engine:
        sid = engine.create().id
        engine.append(sid, text(5)).result()
        task = engine.generate(sid, Sampling(max_tokens=5, seed=0))
        task.subscribe(fail)
        task.subscribe(listen)
        assert finished.wait(10)
        late: list[Any] = []
        task.subscribe(late.append)
        assert late == [task.result()]
        assert heard[-1] == task.result()
        assert engine.info(sid).position == 10


@pytest.mark.parametrize("launches", [False, True], ids=["computes", "launches"])
def test_clients_are_told_before_a_token_is_read_but_by_a_device_that_computes_meanwhile(
    launches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of the token whose reading fails, before that is said."""
    done: list[str] = []

    def read(lanes: Lanes, count: int) -> None:
        done.append("read")
        if len(done) == 5:
            raise RuntimeError("lost")

    def emit(task: Task, event: object) -> None:
        if isinstance(event, Token):
            done.append("told")

    monkeypatch.setattr(Lanes, "read", read)
    monkeypatch.setattr(Task, "_emit", emit)
    with Engine(make(), INNER, limits=Limits(batch_invariant=False)) as engine:
        engine._scheduler._slices._launches = launches
        sid = engine.create().id
        engine.append(sid, text(M + 1)).result()
        task = engine.generate(sid, Sampling(max_tokens=3 if launches else 2, temperature=0))
        if launches:
            with pytest.raises(RuntimeError, match="lost"):
                task.result()
        else:
            task.result()
    assert done == (["read", "told"] * 3 if launches else ["told", "read"] * 2)


def test_nothing_comes_after_the_outcome() -> None:
    task, heard = Task(), []
    task.subscribe(heard.append)
    task._finish("end")
    task._emit("late")
    assert heard == ["end"]
    assert task.result() == "end"
    assert list(task) == []
