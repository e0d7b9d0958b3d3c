"""Any order of operations on any sessions of an engine, against plain sessions that are alone."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings, strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from longread.engine import Engine, Limits, Sampling, WrongPosition
from longread.engine.lanes import largest_session
from longread.session import Session
from tests.test_engine_batches import INNER, V, make
from tests.test_engine_files import crash

TOKENS = st.lists(st.integers(0, V - 1), max_size=14)
MODEL = make()


class Engines(RuleBasedStateMachine):
    """Tasks are begun at once and collected later, so those of different sessions overlap."""

    ids = Bundle("ids")
    model = MODEL
    """Of the engine; plain sessions have `MODEL`."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.plain: dict[str, Session] = {}
        self.running: list[tuple[Any, Any]] = []
        self.exports = 0

    @initialize(tight=st.booleans(), alone=st.booleans())
    def open(self, tight: bool, alone: bool) -> None:
        size = largest_session(self.model)
        memory = {"device_bytes": 3 * size, "host_bytes": size} if tight else {}
        self.limits = Limits(max_batch=2, batch_invariant=alone, **memory)
        self.engine = self.opened()

    def possible(self, temperature: float) -> float:
        """Devices draw other numbers from one seed."""
        return temperature if self.model.device == MODEL.device else 0.0

    def opened(self) -> Engine:
        return Engine(self.model, INNER, directory=self.folder.name, limits=self.limits, fingerprint="x")

    def collect(self) -> None:
        for task, expected in self.running:
            events = list(task)
            result = task.result(60)
            if isinstance(expected, list):
                assert [event.id for event in events] == expected
            else:
                assert result.nll == pytest.approx(expected.tolist(), nan_ok=True, abs=1e-9)
        self.running = []

    @rule(target=ids, learn=st.booleans())
    def create(self, learn: bool) -> str:
        sid = self.engine.create(learn=learn).id
        self.plain[sid] = Session(MODEL, INNER, learn=learn, fingerprint="x")
        return sid

    @rule(sid=ids, tokens=TOKENS)
    def append(self, sid: str, tokens: list[int]) -> None:
        self.running.append((self.engine.append(sid, tokens), self.plain[sid].read(tokens)))

    @rule(sid=ids, tokens=TOKENS.filter(bool))
    def append_twice(self, sid: str, tokens: list[int]) -> None:
        position = self.plain[sid].position
        expected = self.plain[sid].read(tokens)
        for _ in range(2):
            self.running.append((self.engine.append(sid, tokens, expected_position=position), expected))
        with pytest.raises(WrongPosition):
            self.engine.append(sid, [*tokens, 1], expected_position=position).result()

    @rule(sid=ids, count=st.integers(0, 11), seed=st.integers(0, 5), temperature=st.sampled_from([0.0, 0.8, 1.0]))
    def generate(self, sid: str, count: int, seed: int, temperature: float) -> None:
        if self.plain[sid].position:
            options: dict[str, Any] = {"max_tokens": count, "seed": seed, "temperature": self.possible(temperature)}
            expected = list(self.plain[sid].generate(**options))
            self.running.append((self.engine.generate(sid, Sampling(**options)), expected))

    @rule(sid=ids, tokens=TOKENS)
    def score(self, sid: str, tokens: list[int]) -> None:
        self.collect()
        self.running.append((self.engine.score(sid, tokens), self.plain[sid].score(tokens)))

    @rule(tokens=TOKENS.filter(bool), seed=st.integers(0, 5))
    def complete(self, tokens: list[int], seed: int) -> None:
        session = Session(MODEL, INNER, fingerprint="x")
        session.read(tokens)
        options: dict[str, Any] = {"max_tokens": 6, "seed": seed, "temperature": self.possible(1.0)}
        task = self.engine.complete(tokens, Sampling(**options))
        assert [event.id for event in task if hasattr(event, "logprob")] == list(session.generate(**options))

    @rule(target=ids, sid=ids)
    def fork(self, sid: str) -> str:
        self.collect()
        fork = self.engine.fork(sid).id
        self.plain[fork] = self.plain[sid].fork()
        return fork

    @rule(sid=ids, learn=st.booleans())
    def update(self, sid: str, learn: bool) -> None:
        self.collect()
        assert self.engine.update(sid, learn=learn).learn is learn
        self.plain[sid].learn = learn

    @rule(target=ids, sid=ids)
    def export_and_restore(self, sid: str) -> str:
        self.collect()
        copy = self.engine.restore(self.engine.export(sid)).id
        self.plain[copy] = self.plain[sid].fork()
        return copy

    @rule(sid=ids)
    def save(self, sid: str) -> None:
        assert self.engine.save(sid).exists()

    @rule(sid=consumes(ids))
    def delete(self, sid: str) -> None:
        self.collect()
        self.engine.delete(sid)
        del self.plain[sid]

    @rule(killed=st.booleans())
    def restart(self, killed: bool) -> None:
        self.collect()
        (crash if killed else Engine.close)(self.engine)
        self.engine = self.opened()
        assert self.engine.lost == []

    @invariant()
    def facts_agree(self) -> None:
        if not self.running and self.plain:
            assert {info.id: info.position for info in self.engine.sessions()} == {
                sid: session.position for sid, session in self.plain.items()
            }

    def teardown(self) -> None:
        self.collect()
        self.facts_agree()
        for sid, session in self.plain.items():
            assert self.engine.score(sid, [1]).result().position == session.position + 1
            info = self.engine.info(sid)
            assert (info.steps, info.rolled_back) == (session.steps, session.rolled_back)
            assert info.drift == pytest.approx(session.drift(), abs=1e-9)
        self.engine.close()
        assert all(path.suffix != ".tmp" for path in Path(self.folder.name).rglob("*"))
        self.folder.cleanup()


def run(examples: int, steps: int, machine: type[Engines] = Engines) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    phases = [phase for phase in Phase if phase is not Phase.shrink]  # it would take minutes
    chosen = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=checks, phases=phases
    )
    run_state_machine_as_test(machine, settings=chosen)


def test_any_order_of_operations() -> None:
    run(examples=8, steps=16)


@pytest.mark.slow
def test_many_orders_of_operations() -> None:
    run(examples=120, steps=40)


@pytest.mark.gpu
def test_any_order_of_operations_on_a_gpu() -> None:
    """Where states move between two memories, and graphs are captured beside them."""

    class OnAGpu(Engines):
        model = make().cuda()

    run(examples=10, steps=25, machine=OnAGpu)
