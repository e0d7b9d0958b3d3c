"""The engine's interface: sessions, tasks, events, limits, cancelling, tiers of memory, isolation."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from longread.config import InnerConfig, UserError
from longread.engine import Busy, Engine, Finished, Limits, Progress, Sampling, Token, UnknownSession, WrongPosition
from longread.engine.lanes import largest_session
from longread.session import Session
from tests.test_engine_batches import INNER, K, M, V, make, text


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(make(), INNER) as made:
        yield made


def read(engine: Engine, sid: str, tokens: list[int]) -> None:
    engine.append(sid, tokens).result(60)


def write(engine: Engine, sid: str, count: int = 10, **settings: Any) -> list[int]:
    settings.setdefault("seed", 1)
    return [token.id for token in engine.generate(sid, Sampling(max_tokens=count, **settings))]


def test_a_new_session_has_read_nothing(engine: Engine) -> None:
    one, other = engine.create("ann", label="a text"), engine.create("bob", learn=False)
    assert (one.position, one.drift, one.steps, one.rolled_back) == (0, 0.0, 0, 0)
    assert (one.owner, one.label, one.learn, other.learn) == ("ann", "a text", True, False)
    assert len(bytes.fromhex(one.id)) == 16
    assert one.id != other.id
    assert [info.id for info in engine.sessions()] == [one.id, other.id]
    assert [info.id for info in engine.sessions("bob")] == [other.id]


def test_reading_reports_as_it_goes(engine: Engine) -> None:
    sid = engine.create().id
    task = engine.append(sid, text(40 * M))
    events = list(task)
    found = task.result()
    assert len(events) > 1
    assert all(isinstance(event, Progress) for event in events)
    assert [event.position for event in events][-1] == found.position == 40 * M
    joined = [x for event in events for x in event.nll]
    assert math.isnan(joined[0])
    assert joined[1:] == found.nll[1:]
    assert sum(len(event.grad_norms) for event in events) == found.steps == engine.info(sid).steps == 39
    assert engine.info(sid).drift > 0
    assert found.rolled_back == 0


def test_writing_reports_every_token(engine: Engine) -> None:
    sid = engine.create().id
    read(engine, sid, text(9))
    task = engine.generate(sid, Sampling(max_tokens=12, seed=0))
    events = list(task)
    assert all(isinstance(event, Token) for event in events)
    assert [event.position for event in events] == list(range(10, 22))
    assert task.result() == Finished("length", 21)
    assert engine.info(sid).position == 21


def test_a_stop_token_is_neither_given_nor_read(engine: Engine) -> None:
    sid = engine.create().id
    read(engine, sid, text(9))
    written = write(engine, engine.fork(sid).id, 20)
    task = engine.generate(sid, Sampling(max_tokens=20, seed=1, stop_ids={written[5]}))
    first = written.index(written[5])
    assert [event.id for event in task] == written[:first]
    assert task.result() == Finished("stop", 9 + first)


def test_tasks_of_one_session_run_in_order(engine: Engine) -> None:
    sid = engine.create().id
    tasks = [engine.append(sid, text(7, seed)) for seed in range(5)]
    assert [task.result().position for task in tasks] == [7, 14, 21, 28, 35]


def test_a_fork_goes_its_own_way(engine: Engine) -> None:
    sid = engine.create("ann").id
    read(engine, sid, text(30))
    fork = engine.fork(sid, label="other")
    assert (fork.position, fork.owner, fork.label, fork.nbytes) == (30, "ann", "other", engine.info(sid).nbytes)
    assert write(engine, fork.id) == write(engine, engine.fork(sid).id)
    assert engine.info(sid).position == 30


def test_a_session_can_be_forked_while_it_writes(engine: Engine) -> None:
    sid = engine.create().id
    read(engine, sid, text(9))
    task = engine.generate(sid, Sampling(max_tokens=60, seed=3))
    events = iter(task)
    next(events)
    fork = engine.fork(sid)
    at = fork.position - 9
    written = [event.id for event in events]
    assert task.result().position == 69
    session = Session(engine.model, INNER)
    session.read(text(9))
    assert list(session.generate(60, seed=3))[1:] == written
    twin = Session(engine.model, INNER)
    twin.read(text(9))
    all_written = list(twin.generate(at, seed=3))
    assert len(all_written) == at
    assert write(engine, fork.id, 5) == list(twin.generate(5, seed=1))


def test_scoring_leaves_no_trace(engine: Engine) -> None:
    sid = engine.create().id
    read(engine, sid, text(11))
    before = engine.info(sid)
    scored = engine.score(sid, text(20, 1)).result()
    after = engine.info(sid)
    assert (after.position, after.drift, after.steps) == (before.position, before.drift, before.steps)
    assert scored.nll == engine.append(sid, text(20, 1)).result().nll
    fresh = engine.score(None, text(20), logprobs=2)
    tops = [top for event in fresh for top in event.top]
    assert len(tops) == 20
    assert all(len(top) == 2 for top in tops)
    session = Session(engine.model, INNER)
    assert fresh.result().nll[1:] == pytest.approx(session.read(text(20)).tolist()[1:])
    assert len(engine.sessions()) == 1


def test_a_completion_needs_no_session(engine: Engine) -> None:
    task = engine.complete(text(13), Sampling(max_tokens=6, seed=2, logprobs=1))
    events = list(task)
    session = Session(engine.model, INNER)
    nll = session.read(text(13)).tolist()
    assert [event.id for event in events if isinstance(event, Token)] == list(session.generate(6, seed=2))
    progress = [event for event in events if isinstance(event, Progress)]
    assert [x for event in progress for x in event.nll][1:] == pytest.approx(nll[1:])
    assert all(len(top) == 1 for event in progress for top in event.top)
    assert task.result() == Finished("length", 19)
    assert engine.sessions() == []
    assert engine.stats()["sessions"] == 0
    with pytest.raises(UserError, match="the prompt is empty"):
        engine.complete([], Sampling())


def test_a_completion_goes_on_from_a_session_and_leaves_it_alone(engine: Engine) -> None:
    sid = engine.create().id
    with pytest.raises(UserError, match="nothing to continue"):
        engine.complete([], Sampling(), session_id=sid).result(60)
    read(engine, sid, text(21))
    before = engine.info(sid)
    for tokens in (text(13, 5), []):
        session = Session(engine.model, INNER)
        session.read(text(21))
        session.read(tokens)
        task = engine.complete(tokens, Sampling(max_tokens=6, seed=2), session_id=sid)
        assert [event.id for event in task if isinstance(event, Token)] == list(session.generate(6, seed=2))
        assert task.result() == Finished("length", 27 + len(tokens))
    frozen = Session(engine.model, INNER)
    frozen.read(text(21))
    frozen.learn = False
    nll = frozen.read(text(13, 5)).tolist()
    told = list(engine.complete(text(13, 5), Sampling(max_tokens=0), session_id=sid, learn=False))
    assert [x for event in told if isinstance(event, Progress) for x in event.nll] == pytest.approx(nll)
    assert (engine.info(sid).position, engine.info(sid).drift) == (before.position, before.drift)
    assert [info.id for info in engine.sessions()] == [sid]


def test_learning_can_be_switched_while_writing(engine: Engine) -> None:
    sid = engine.create().id
    read(engine, sid, text(9))
    task = engine.generate(sid, Sampling(max_tokens=60, seed=0))
    next(iter(task))
    assert engine.update(sid, learn=False, label="frozen").label == "frozen"
    steps = engine.info(sid).steps
    task.result()
    assert engine.info(sid).steps <= steps + 1
    assert engine.info(sid).learn is False


def test_repeated_appends_are_read_once(engine: Engine) -> None:
    sid = engine.create().id
    first = engine.append(sid, text(10), expected_position=0).result()
    assert engine.append(sid, text(10), expected_position=0).result() == first
    assert engine.info(sid).position == 10
    with pytest.raises(WrongPosition, match="at position 10, not at 0") as caught:
        engine.append(sid, text(10, seed=1), expected_position=0).result()
    assert caught.value.position == 10
    second = engine.append(sid, text(5), expected_position=10).result()
    assert engine.append(sid, text(10), expected_position=0).result() == first
    keyed = engine.append(sid, text(3), key="x").result()
    assert engine.append(sid, text(3), key="x").result() == keyed
    assert engine.append(sid, text(4), key="x").result().position == 22
    assert second.position == 15
    assert engine.info(sid).position == 22


def test_an_append_that_is_repeated_while_it_runs_is_read_once(engine: Engine) -> None:
    sid = engine.create().id
    one, two = (engine.append(sid, text(30 * M), expected_position=0) for _ in range(2))
    assert one.result() == two.result()
    assert engine.info(sid).position == 30 * M


def test_an_append_of_nothing(engine: Engine) -> None:
    sid = engine.create().id
    assert engine.append(sid, []).result().nll == []
    assert engine.append(sid, [], expected_position=0).result().position == 0


def test_reading_stops_at_the_end_of_a_mini_batch(engine: Engine) -> None:
    sid = engine.create().id
    read(engine, sid, [1])
    task = engine.append(sid, text(5000 * M))
    next(iter(task))
    task.cancel()
    found = task.result()
    assert found.cancelled
    assert 1 < found.position < 5000 * M
    assert found.position % M == 0
    assert len(found.nll) == found.position - 1
    assert engine.info(sid).position == found.position
    session = Session(engine.model, INNER)
    session.read([1, *text(5000 * M)[: found.position - 1]])
    assert write(engine, sid) == list(session.generate(10, seed=1))


def test_writing_stops_after_a_token(engine: Engine) -> None:
    sid = engine.create().id
    read(engine, sid, text(5))
    task = engine.generate(sid, Sampling(max_tokens=100_000))
    events = iter(task)
    next(events)
    task.cancel()
    count = 1 + sum(1 for _ in events)
    assert task.result() == Finished("cancelled", 5 + count)
    assert engine.info(sid).position == 5 + count


def test_a_waiting_completion_can_be_cancelled(engine: Engine) -> None:
    task = engine.complete(text(5000 * M), Sampling())
    task.cancel()
    assert task.result().reason == "cancelled"


def test_deleting_stops_what_is_under_way(engine: Engine) -> None:
    sid = engine.create().id
    read(engine, sid, text(5))
    running, waiting = engine.generate(sid, Sampling(max_tokens=100_000)), engine.append(sid, text(5))
    engine.delete(sid)
    assert running.result().reason == "cancelled"
    with pytest.raises(UnknownSession):
        waiting.result()
    with pytest.raises(UnknownSession, match="there is no session"):
        engine.info(sid)


def test_a_session_belongs_to_its_owner(engine: Engine) -> None:
    sid = engine.create("ann").id
    assert engine.info(sid, "ann").id == sid
    for wrong in (lambda: engine.info(sid, "bob"), lambda: engine.info("0" * 32), lambda: engine.append("x", [1])):
        with pytest.raises(UnknownSession):
            wrong()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0"),
        ({"seed": 2**64}, "seed is"),
        ({"logprobs": -1}, "logprobs is -1"),
    ],
)
def test_settings_out_of_range(settings: dict, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        Sampling(**settings)


def test_wrong_tokens_are_refused_before_anything_is_read(engine: Engine) -> None:
    sid = engine.create().id
    with pytest.raises(UserError, match="token id 19 is not in the vocabulary of 19"):
        engine.append(sid, [1, V])
    with pytest.raises(UserError, match="there is nothing to continue"):
        engine.generate(sid, Sampling()).result()
    assert engine.info(sid).position == 0


def test_limits_say_when_to_come_back() -> None:
    with Engine(make(), INNER, limits=Limits(max_sessions=2, max_waiting=1)) as engine:
        ids = [engine.create().id for _ in range(2)]
        for more in (engine.create, lambda: engine.fork(ids[0])):
            with pytest.raises(Busy, match="there are 2 sessions of at most 2") as caught:
                more()
            assert caught.value.retry_after > 0
        task = engine.append(ids[0], text(3000 * M))
        with pytest.raises(Busy, match="1 tasks are under way"):
            engine.append(ids[1], text(3))
        task.cancel()
        task.result()
        engine.delete(ids[0])
        engine.create()


def test_an_engine_that_is_closed_refuses_work() -> None:
    engine = Engine(make(), INNER)
    sid = engine.create().id
    task = engine.append(sid, text(5000 * M))
    engine.close()
    assert task.result().cancelled
    with pytest.raises(Busy):
        engine.create()


def test_a_long_text_does_not_stall_others() -> None:
    """While a text is read, a session that writes gets tokens, and a short text is read before it ends."""
    with Engine(make(), INNER) as engine:
        reading, writing, short = (engine.create().id for _ in range(3))
        read(engine, writing, text(5))
        long = engine.append(reading, text(20_000 * M))
        tokens = engine.generate(writing, Sampling(max_tokens=50, seed=0)).result(60)
        assert tokens.position == 55
        assert engine.append(short, text(10)).result(60).position == 10
        assert not long.done
        long.cancel()
        long.result(60)


@pytest.mark.parametrize("host", [pytest.param(None, marks=pytest.mark.slow), 3])
def test_idle_sessions_move_down_and_come_back(host: int | None, tmp_path: Any) -> None:
    model = make()
    size = largest_session(model)
    host_bytes = None if host is None else host * size
    limits = Limits(device_bytes=3 * size, host_bytes=host_bytes, max_batch=1)
    engine = Engine(model, INNER, directory=tmp_path, limits=limits)
    ids = [engine.create().id for _ in range(10)]
    sessions = [Session(model, INNER) for _ in ids]
    for turn in range(2):
        for i, (sid, session) in enumerate(zip(ids, sessions, strict=True)):
            read(engine, sid, text(3 * M + i, turn))
            session.read(text(3 * M + i, turn))
    for _ in range(200):
        stats = engine.stats()
        if stats["bytes_device"] <= 3 * size and (host is None or stats["bytes_host"] <= host * size):
            break
        threading.Event().wait(0.02)
    assert stats["bytes_device"] <= 3 * size
    tiers = [info.tier for info in engine.sessions()]
    assert "host" in tiers
    assert ("disk" in tiers) == (host is not None)
    least, newest = tiers[0], tiers[-1]
    assert newest == "device"
    assert least == ("host" if host is None else "disk")
    for i, (sid, session) in enumerate(zip(ids, sessions, strict=True)):
        assert engine.info(sid).drift == pytest.approx(session.drift())
        assert write(engine, sid, 3) == list(session.generate(3, seed=1)), i
    engine.close()


@pytest.mark.parametrize("apart", [pytest.param(True, marks=pytest.mark.slow), False])
def test_no_more_is_begun_than_fits(apart: bool) -> None:
    model = make()
    size = largest_session(model)
    with Engine(model, INNER, limits=Limits(device_bytes=4 * size, max_batch=2, batch_invariant=apart)) as engine:
        tasks = [engine.complete(text(4 * M, i), Sampling(max_tokens=9, seed=i)) for i in range(12)]
        most = 0.0
        while not all(task.done for task in tasks):
            most = max(most, engine.stats()["bytes_device"])
            threading.Event().wait(0.002)
        assert most <= 6 * size  # and not 12: a lane of so small a model is larger than its session
        for i, task in enumerate(tasks):
            session = Session(model, INNER)
            session.read(text(4 * M, i))
            assert [event.id for event in task if isinstance(event, Token)] == list(session.generate(9, seed=i))


def test_one_session_at_least_must_fit() -> None:
    with pytest.raises(UserError, match="device_bytes is 1000; one session of this model"):
        Engine(make(), INNER, limits=Limits(device_bytes=1000))


def test_without_a_directory_a_full_memory_refuses_sessions() -> None:
    model = make()
    size = largest_session(model)
    with Engine(model, INNER, limits=Limits(device_bytes=3 * size, host_bytes=size)) as engine:
        for _ in range(4):
            engine.create()
        with pytest.raises(Busy, match="4 sessions fill the"):
            engine.create()
        with pytest.raises(UserError, match="this engine keeps no files"):
            engine.save(engine.sessions()[0].id)


@pytest.mark.parametrize("learn", [True, False])
def test_the_largest_session_is_as_large_as_it_gets(learn: bool) -> None:
    model = make()
    session = Session(model, INNER, learn=learn)
    sizes = []
    for seed in range(10 * M):
        session.read(text(1, seed))
        sizes.append(session.nbytes)
    largest = largest_session(model)
    assert max(sizes) <= largest
    assert not learn or max(sizes) == largest


def test_memory_does_not_grow_with_the_text() -> None:
    """To the byte, in memory and in the file."""
    with Engine(make(), INNER) as engine:
        sizes = set()
        for n in (16, 32, 64):
            sid = engine.create().id
            read(engine, sid, text(n * M))
            sizes.add(engine.info(sid).nbytes)
        assert len(sizes) == 1


@pytest.mark.parametrize("apart", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_secret_stays_where_it_was_read(apart: bool) -> None:
    """One session reads a secret again and again; whatever others do beside it, it changes nothing of theirs."""
    model, secret = make(), [17, 3, 11, 5, 13, 2]

    def others(engine: Engine, beside: bool) -> list[list[int]]:
        ids = [engine.create().id for _ in range(5)]
        if beside:
            spies = [engine.create().id for _ in range(2)]
            busy = [engine.append(spy, secret * 12) for spy in spies]
            busy += [engine.generate(spy, Sampling(max_tokens=30, seed=0)) for spy in spies]
        for i, sid in enumerate(ids):
            engine.append(sid, text(20 + i, i))
        tasks = [engine.generate(sid, Sampling(max_tokens=20, seed=i)) for i, sid in enumerate(ids)]
        written = [[token.id for token in task] for task in tasks]
        for task in busy if beside else ():
            task.result()
        scored = [engine.score(sid, secret).result().nll for sid in ids]
        return [*written, *(row if apart else [round(x, 9) for x in row] for row in scored)]  # type: ignore[list-item]

    few, many = Limits(max_batch=4, batch_invariant=apart), Limits(batch_invariant=apart)
    with Engine(model, INNER, limits=few) as alone, Engine(model, INNER, limits=many) as crowded:
        assert others(alone, beside=False) == others(crowded, beside=True)


def test_a_harmful_step_is_not_taken_and_harms_nobody_else() -> None:
    model = make()
    with Engine(model, InnerConfig(lr=1e6, clip=None)) as engine:
        ids = [engine.create().id for _ in range(3)]
        for sid in ids:
            found = engine.append(sid, text(6 * M)).result()
            assert found.rolled_back == found.steps == 5
            assert engine.info(sid).rolled_back == 5
            assert engine.info(sid).drift == 0
            assert all(math.isfinite(x) for x in found.nll[1:])


def test_window_of_recent_tokens(engine: Engine) -> None:
    sid = engine.create().id
    read(engine, sid, text(30))
    session = Session(engine.model, INNER)
    session.read(text(30))
    alone = session.generate(3 * K, seed=1, repetition_penalty=1.7)
    assert write(engine, sid, 3 * K, repetition_penalty=1.7) == list(alone)
