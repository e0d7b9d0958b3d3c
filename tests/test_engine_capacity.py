"""How many sessions write at once: by the arithmetic of `capacity`, and in an engine with that budget."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch

from longread.engine import Engine, Limits, Sampling, Token, capacity, session_sizes
from longread.engine.lanes import Lanes
from longread.engine.memory import SHARE, Tiers
from longread.engine.records import Job, Reader
from longread.inner_loop import begin, read
from longread.inner_loop.places import Places, place_nbytes
from longread.model import Transformer
from tests.tiny import BY_BLOCK, GROUPED, INNER, M, config, make, text

K = 24


def on_no_device(**changes: object) -> Transformer:
    with torch.device("meta"):
        return Transformer(config(**changes))


@pytest.mark.parametrize(
    "changes",
    [{}, {"attention": "full"}, {"attention": "hybrid"}, GROUPED, BY_BLOCK, {"attention": "full"} | GROUPED],
    ids=str,
)
def test_a_place_is_as_large_as_it_is_said_to_be(changes: dict) -> None:
    model = make(window_size=K, **changes).requires_grad_(False)
    tokens = torch.tensor([text(5 * K + M)])
    state = read(model, begin(model), tokens, inner=INNER).state
    places = Places(model, 1, learn=True)
    places.put(0, state, learn=True)
    sizes = session_sizes(on_no_device(window_size=K, **changes), state.position)
    assert sizes.place == places.nbytes == place_nbytes(model, state.position)
    assert sizes.beside == sum(x.nbytes for w in state.fast for x in w)
    assert state.nbytes <= sizes.resting <= state.nbytes + 2 * M * model.config.width * 4 * 4


@pytest.mark.parametrize("most", [1, 2, 3, 5])
def test_an_engine_lets_as_many_write(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, together, enter, reached = make(window_size=K).requires_grad_(False), [], Lanes.enter, threading.Event()

    def entering(lanes: Lanes, job: Job) -> None:
        enter(lanes, job)
        together.append(len(lanes.jobs))
        if len(lanes.jobs) >= most:
            reached.set()

    monkeypatch.setattr(Lanes, "enter", entering)
    size = session_sizes(model, 0)
    room = size.resting + size.place + (most - 1) * size.writing + size.place // 3
    assert capacity(-(-room * 10 // 7), size).writing == most
    assert capacity(int((room - size.place // 2) / SHARE), size).writing == most - 1
    endless = Sampling(max_tokens=100_000, temperature=0)
    with Engine(model, INNER, limits=Limits(device_bytes=room)) as engine:
        ids = [engine.create().id for _ in range(most + 2)]
        for i, sid in enumerate(ids):
            engine.append(sid, text(2 * K, i)).result(60)
        tasks = [engine.generate(sid, endless) for sid in ids[:most]]
        assert reached.wait(120)
        tasks += [engine.generate(sid, endless) for sid in ids[most:]]
        written = (event for event in tasks[0] if isinstance(event, Token))
        assert len(list(itertools.islice(written, 5 * M))) == 5 * M  # time for one more to come in, if it could
        for task in tasks:
            task.cancel()
    assert max(together) == most


@pytest.mark.parametrize("apart", [False, True])
def test_those_that_fit_write_together_again_and_again(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lanes that are empty between two turns never cost a session its place on the device."""
    most, together, most_used, to_host = 5, [], [0], []
    model, full = make(window_size=K).requires_grad_(False), threading.Event()
    enter, leave, carry = Lanes.enter, Lanes.leave, Tiers._carry

    def used() -> None:
        most_used.append(engine._jobs.tiers.usage(engine._jobs.readers.values())["device"])

    def entering(lanes: Lanes, job: Job) -> None:
        enter(lanes, job)
        used()
        together.append(len(lanes.jobs))
        if len(lanes.jobs) == most:
            full.set()

    def leaving(lanes: Lanes, job: Job, **options: bool) -> None:
        to_host.append(any(options.values()))
        leave(lanes, job, **options)
        used()

    def carrying(tiers: Tiers, reader: Reader, device: torch.device, tier: str) -> None:
        to_host.append(tier == "host")
        carry(tiers, reader, device, tier)

    monkeypatch.setattr(Lanes, "enter", entering)
    monkeypatch.setattr(Lanes, "leave", leaving)
    monkeypatch.setattr(Tiers, "_carry", carrying)
    size = session_sizes(model, 0)
    room = size.resting + size.place + (most - 1) * size.writing
    assert most * (size.resting + size.place) > room, "there is no room for all at rest beside as many empty lanes"
    with Engine(model, INNER, limits=Limits(device_bytes=room, batch_invariant=apart)) as engine:
        ids = [engine.create(learn=False).id for _ in range(most)]
        for i, sid in enumerate(ids):
            engine.append(sid, text(2 * K, i)).result(60)
        for _ in range(3):
            full.clear()
            together.clear()
            tasks = [engine.generate(sid, Sampling(max_tokens=100_000, temperature=0)) for sid in ids]
            assert full.wait(60)
            assert together == [1, 2, 3, 4, 5]
            for task in tasks:
                task.cancel()
            for task in tasks:
                task.result(60)
    assert not any(to_host)
    assert max(most_used) <= room


def test_what_has_no_lanes_is_counted_by_its_sessions() -> None:
    size = session_sizes(on_no_device(mixer="mamba2", num_suffix_blocks=0), 0)
    assert size.place == 0
    assert capacity(10 * size.resting, size)[1:] == (7, 7)
    assert capacity(0, size)[1:] == (0, 0)
    assert capacity(-1, size)[1:] == (0, 0)
