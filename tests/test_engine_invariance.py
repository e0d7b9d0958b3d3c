"""Batch invariance: bit for bit, a session in a busy engine gives what it gives alone."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from longread.engine import Engine, Limits, Sampling, largest_session, pieces, scheduler
from longread.engine.pieces import STEPS
from longread.inner_loop import places, read
from longread.inner_loop.places import Places
from longread.model import Transformer
from longread.session import Session
from tests.test_engine_batches import INNER, NETWORKS, M, after, make, text, two_networks

LENGTHS = [1, M - 1, M, M + 1, 2 * M, 2 * M, 3 * M + 1, 5 * M + 3]
"""Of the first texts: within, at and across mini-batches; equal ones could share every product."""

ESSENTIAL = [("window", torch.float64, True), ("hybrid", torch.float32, True), ("mamba2", torch.float32, False)]


class Life(NamedTuple):
    """All that one session gave, and what is left of it."""

    nll: list[float]
    written: list[Any]
    state: list[Tensor]


def live(engine: Engine, sid: str, i: int) -> list[Any]:
    """Begins all the tasks of session i."""
    return [
        engine.append(sid, text(LENGTHS[i], i)),
        engine.generate(sid, Sampling(max_tokens=2 * M + i % 3, seed=i, top_p=0.9, logprobs=i % 3)),
        engine.append(sid, text(M + i % 2, 70 + i)),
        engine.generate(sid, Sampling(max_tokens=M, temperature=0, repetition_penalty=1.1)),
    ]


def lived(engine: Engine, sid: str, tasks: list[Any], i: int) -> Life:
    """What came of them; the first of all tokens, which nothing predicts, is left out."""
    first, one, second, other = tasks
    nll = [*first.result(60).nll[1:], *second.result(60).nll]
    written = [(token.id, token.logprob, token.top) for task in (one, other) for token in task]
    nll += engine.score(sid, text(2 * M + 1, 90 + i)).result(60).nll
    return Life(nll, written, Session.restore(engine.export(sid), engine.model, fingerprint="x").state.tensors)


def assert_equal(one: Life, other: Life) -> None:
    assert one[:2] == other[:2]
    assert all(torch.equal(a, b) for a, b in zip(one.state, other.state, strict=True))


def lives(model: Transformer, folder: Path, limits: Limits, which: list[int]) -> list[Life]:
    with Engine(model, INNER, directory=folder, limits=limits, fingerprint="x") as engine:
        ids = [engine.create(learn=i % 4 != 3).id for i in which]
        tasks = [live(engine, sid, i) for sid, i in zip(ids, which, strict=True)]
        return [lived(engine, sid, own, i) for sid, own, i in zip(ids, tasks, which, strict=True)]


@pytest.mark.parametrize(
    ("network", "dtype", "tight"),
    [
        pytest.param(*case, marks=() if case in ESSENTIAL else pytest.mark.slow)
        for case in itertools.product(["window", "hybrid", "mamba2"], [torch.float64, torch.float32], [False, True])
    ],
    ids=str,
)
def test_a_busy_engine_changes_no_bit(
    network: str, dtype: torch.dtype, tight: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64 as it is, in float32 where it is asked for; also while sessions move between device, host and disk."""
    monkeypatch.setattr(places, "SPARE", 16)  # so that room runs out
    model = make(dtype, **NETWORKS[network])
    own: dict[str, Any] = {"batch_invariant": None if dtype == torch.float64 else True}
    size = largest_session(model)
    memory = {"device_bytes": 6 * size, "host_bytes": size} if tight else {}
    busy = lives(model, tmp_path / "busy", Limits(max_batch=4, **own, **memory), list(range(len(LENGTHS))))
    for i in (2, 3, 7):
        [alone] = lives(model, tmp_path / str(i), Limits(**own), [i])
        assert_equal(busy[i], alone)


@two_networks
def test_an_engine_gives_the_bits_of_sessions(changes: dict, tmp_path: Path) -> None:
    """That read in the same pieces: to the end of a mini-batch, then a slice at a time."""
    model = make(torch.float32, **changes)
    limits = Limits(max_batch=4, batch_invariant=True)
    for i, life in enumerate(lives(model, tmp_path, limits, list(range(len(LENGTHS))))):
        session, nll = Session(model, INNER, learn=i % 4 != 3), []
        for task, tokens in enumerate((text(LENGTHS[i], i), text(M + i % 2, 70 + i))):
            while tokens:
                waiting = session.describe().waiting
                piece = M - waiting if session.learn and 0 < waiting < M else STEPS * M
                nll += session.read(tokens[:piece]).tolist()
                tokens = tokens[piece:]
            if not task:
                written = list(session.generate(2 * M + i % 3, seed=i, top_p=0.9))
        written += session.generate(M, temperature=0, repetition_penalty=1.1)
        assert life.nll[: len(nll) - 1] == nll[1:]
        assert [token for token, *_ in life.written] == written
        assert all(torch.equal(a, b) for a, b in zip(life.state, session.state.tensors, strict=True))


@pytest.mark.parametrize("alone", [True, False, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("mixer", ["window", "mamba2"])
def test_who_is_computed_with_whom(
    alone: bool | None, dtype: torch.dtype, mixer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody with anybody, where a batch must change no bit; otherwise all that can be."""
    model = make(dtype, **NETWORKS[mixer])
    sizes: dict[str, set[int]] = {"group": set(), "lanes": set(), "draw": set(), "head": set()}

    def watched(name: str, owner: Any, method: str, count: Any) -> None:
        plain = getattr(owner, method)

        def watching(*args: Any, **options: Any) -> Any:
            sizes[name].add(count(*args))
            return plain(*args, **options)

        monkeypatch.setattr(owner, method, watching)

    watched("group", pieces, "together", len)
    watched("draw", scheduler, "draw", lambda logits, *rest: len(logits))
    watched("lanes", Places, "_pass", lambda self, count: count)
    if mixer != "window":  # in lanes the head is part of the pass
        watched("head", model, "logits", len)
    with Engine(model, INNER, limits=Limits(batch_invariant=alone), fingerprint="x") as engine:
        ids = [engine.create().id for _ in range(6)]
        reading = [engine.append(sid, text(3 * M, i)) for i, sid in enumerate(ids)]
        writing = [engine.generate(sid, Sampling(max_tokens=2 * M, seed=i)) for i, sid in enumerate(ids)]
        for task in (*reading, *writing):
            task.result(60)
    together = not (dtype == torch.float64 if alone is None else alone)
    seen = {name: max(found) > 1 for name, found in sizes.items() if found}
    assert seen == dict.fromkeys(["group", "draw", "lanes" if mixer == "window" else "head"], together)


def test_steps_are_taken_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """When more inner steps are due than fit at once, and those that take none stand between them."""
    monkeypatch.setattr(pieces, "GROUP", M)
    model = make()
    with Engine(model, INNER, limits=Limits(batch_invariant=False), fingerprint="x") as engine:
        lengths = [2 * M, 2 * M + 1, 2 * M, 2 * M + 2, 2 * M]
        ids = [engine.create().id for _ in lengths]
        for i, (sid, n) in enumerate(zip(ids, lengths, strict=True)):
            engine.append(sid, text(n, i)).result(60)
        tasks = [engine.generate(sid, Sampling(max_tokens=3 * M, seed=i)) for i, sid in enumerate(ids)]
        for i, (task, n) in enumerate(zip(tasks, lengths, strict=True)):
            session = Session(model, INNER)
            session.read(text(n, i))
            assert [token.id for token in task] == list(session.generate(3 * M, seed=i))
        assert engine.stats()["rounds"] < len(ids) * 3 * M  # they did write together


@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("where", ["key", "value", "all"])
def test_nothing_of_a_broken_reader_stays_in_its_lane(number: float, where: str) -> None:
    """Its numbers, which need not be finite, are not even multiplied by 0; not in the lane that the last moves to."""
    model = make()
    broken, fresh = after(model, 5 * M + 3, 0), after(model, 1, 1)
    pasts = [x for past in (*broken.lower_pasts, *broken.upper_pasts) for x in (past.key, past.value)]
    for x in {"key": pasts[::2], "value": pasts[1::2], "all": broken.tensors}[where]:
        if x.is_floating_point():
            x.fill_(number)
    lanes = Places(model, 3, learn=True)
    lanes.put(0, broken, learn=True)
    lanes.put(1, fresh, learn=True)
    lanes.read(torch.tensor([3, 3]))
    lanes.leave(0)
    lanes.move(1, 0)
    lanes.put(1, fresh, learn=True)
    lanes.put(2, broken, learn=True)
    lanes.leave(2)
    lanes.put(2, fresh, learn=False)
    lanes.read(torch.tensor([4, 3, 3]))
    once = read(model, fresh, torch.tensor([[3]]), inner=INNER).state
    twice = read(model, once, torch.tensor([[4]]), inner=INNER).state
    expected = torch.cat([model.logits(state.output) for state in (twice, once, once)])
    torch.testing.assert_close(lanes.logits(3), expected)


def test_room_does_not_depend_on_the_way() -> None:
    """Slots of attention without a window: enough, a few more, and as many for who comes as for who stays."""
    slots = places.room(0)
    for position in range(60_000):
        if position >= slots:
            slots = places.room(position)
        assert slots == places.room(position)
        assert position < slots <= position + max(places.SPARE, position // 32)


def test_whoever_has_all_places_has_the_room_that_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "SPARE", 64)
    model = make(attention="full")
    own = Places(model, 1, learn=True)
    near, far = after(model, 3 * M, 0), after(model, places.SPARE + 3 * M, 1)
    for state in (near, far, near):
        own.put(0, state, learn=True)
        assert own._rings[0].key.shape[2] == places.room(state.position)
        assert all(torch.equal(a, b) for a, b in zip(own.take(0).tensors, state.tensors, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("network", ["window", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_busy_gpu_changes_no_bit(network: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make(dtype, width=32, mini_batch_size=8, window_size=24, **NETWORKS[network]).cuda()
    limits = Limits(batch_invariant=True)
    for i, life in enumerate(lives(model, tmp_path / "busy", limits, list(range(len(LENGTHS))))):
        [alone] = lives(model, tmp_path / str(i), limits, [i])
        assert_equal(life, alone)
