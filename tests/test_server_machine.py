"""Any order of requests of two tenants to a server, against plain sessions that are alone: bit for bit, in float32."""

from __future__ import annotations

import contextlib
import itertools
import math
import tempfile
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, settings, strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from longread.engine import Limits, largest_session
from longread.engine.pieces import STEPS
from longread.engine.records import KEPT_ANSWERS
from longread.session import Session
from tests.server import ALICE, BOB, BOS, INNER, M, bearer, events, make_model, serving

MODEL = make_model()
SIZE = largest_session(MODEL)
KEY = {"alice": ALICE, "bob": BOB}
TENANTS = st.sampled_from(sorted(KEY))
LABELS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
TEXTS = st.text("abc é\n", max_size=3 * M)
TOKENS = st.lists(st.integers(0, BOS), max_size=3 * M)
ROUTES: list[tuple[str, str, Any]] = [
    ("GET", "", None),
    ("PATCH", "", {"label": "mine"}),
    ("DELETE", "", None),
    ("POST", "/append", {"text": "x"}),
    ("POST", "/append", {"text": "x", "expected_position": 0, "stream": True}),
    ("POST", "/score", {"tokens": [1]}),
    ("POST", "/generate", {"max_tokens": 1}),
    ("POST", "/cancel", None),
    ("POST", "/fork", {}),
    ("POST", "/save", None),
    ("GET", "/file", None),
]
"""All that can be asked of one session."""


@dataclass
class Plain:
    """What a session must be."""

    owner: str
    label: str
    session: Session
    frozen: Session | None
    """Its twin."""
    answers: deque[tuple[int, list[int], dict[str, Any]]] = field(default_factory=lambda: deque(maxlen=KEPT_ANSWERS))
    """Appends at an expected position that are answered a second time."""

    def ids(self, passage: str | list[int], start: int) -> list[int]:
        """What is read of a text, or of tokens, from a position on."""
        if isinstance(passage, list):
            return passage
        return [*[BOS] * (start == 0), *passage.encode()]

    def twin(self, label: str | None = None, owner: str | None = None, *, compare: bool = True) -> Plain:
        """One that has read the same."""
        frozen = self.frozen.fork() if self.frozen is not None and compare else None
        return Plain(owner or self.owner, self.label if label is None else label, self.session.fork(), frozen)

    def read(self, ids: list[int], *, expected: bool = False, keep: bool = True) -> dict[str, Any]:
        """Reads, in the pieces of an engine, and says what a reading must say."""
        start, steps, frozen = self.session.position, self.session.steps, None
        if self.frozen is not None:  # it reads along, or scores by itself
            frozen = _read(self.frozen, ids, like=self.session if keep else None)
        nll = _read(self.session, ids)
        found = {"start": start, "position": start + len(ids), "tokens": len(ids), "steps": self.session.steps - steps}
        found |= {"rolled_back": 0, "cancelled": False, "nll": _mean(nll), "all": nll, "frozen": frozen}
        if expected:
            self.answers.append((start, ids, found | {"frozen": None}))
        return found

    def again(self, start: int, ids: list[int]) -> dict[str, Any] | None:
        """What was answered to an append before."""
        return next((found for at, known, found in self.answers if (at, known) == (start, ids)), None)


def _read(session: Session, ids: list[int], like: Session | None = None) -> list[float]:
    """In the pieces in which an engine reads, or would read with another session."""
    like, nll = (session if like is None else like), []
    waiting = like.describe().waiting
    end = M - waiting if like.learn and 0 < waiting < M else STEPS * M
    for first, last in itertools.pairwise([0, *range(end, len(ids), STEPS * M), len(ids)]):
        nll += session.read(ids[first:last]).tolist()
    return nll


def _mean(nll: Sequence[float]) -> float | None:
    numbers = [x for x in nll if math.isfinite(x)]
    return sum(numbers) / len(numbers) if numbers else None


class Requests(RuleBasedStateMachine):
    """Every answer is compared as it comes, and what every tenant sees of the whole after every step."""

    ids = Bundle("ids")

    def __init__(self) -> None:
        super().__init__()
        self.folder, self.stack = tempfile.TemporaryDirectory(), contextlib.ExitStack()
        self.plain: dict[str, Plain] = {}
        self.gone = ["0" * 32, "nobody"]

    @initialize(target=ids, tight=st.booleans(), passage=TEXTS)
    def open(self, tight: bool, passage: str) -> Any:
        memory = {"device_bytes": 3 * SIZE, "host_bytes": SIZE} if tight else {}
        self.limits = Limits(max_batch=4, batch_invariant=True, **memory)
        self.opened()
        made = [self.create(tenant, "", learn=True, compare=tenant == "bob") for tenant in ("alice", "alice", "bob")]
        for sid in made:
            self.append(sid, passage, expected=True, stream=False)
        return multiple(*made)

    def opened(self) -> None:
        folder = Path(self.folder.name)
        self.client: TestClient = self.stack.enter_context(serving(folder, keys=True, engine_limits=self.limits))

    def ask(self, tenant: str, method: str, path: str, status: int = 200, **request: Any) -> Any:
        answer = self.client.request(method, path, headers=bearer(KEY[tenant]), **request)
        assert answer.status_code == status, answer.text
        return answer

    def of(self, sid: str, method: str, path: str, status: int = 200, **request: Any) -> Any:
        """Asks something of a session for its owner."""
        return self.ask(self.plain[sid].owner, method, f"/v1/sessions/{sid}{path}", status, **request)

    def taken_in(self, shown: dict[str, Any], plain: Plain) -> str:
        """A session that has just been made."""
        assert shown["id"] not in self.plain
        self.plain[shown["id"]] = plain
        self.check_object(shown)
        return shown["id"]

    def check_object(self, shown: dict[str, Any]) -> None:
        plain, session = self.plain[shown["id"]], self.plain[shown["id"]].session
        expected = {"object": "session", "label": plain.label, "position": session.position, "learn": session.learn}
        expected |= {"compare": plain.frozen is not None, "nbytes": session.nbytes, "steps": session.steps}
        assert {name: shown[name] for name in [*expected, "rolled_back"]} == expected | {"rolled_back": 0}
        assert shown["drift"] == pytest.approx(session.drift(), abs=1e-6)

    def check_reading(self, answer: Any, sid: str, expected: dict[str, Any]) -> None:
        if answer.headers["content-type"].startswith("text/event-stream"):
            *progress, (name, found) = events(answer)
            assert name == "done"
            bins = [data["bins"] for _, data in progress]
            found["bins"] = {key: [x for part in bins for x in part[key] or ()] for key in ("start", "nll")}
            frozen = [x for part in bins for x in part["frozen_nll"] or ()]
            found["bins"]["frozen_nll"] = None if expected["frozen"] is None else frozen
        else:
            found = answer.json()
        names = set(expected) - {"all", "frozen"}
        assert {name: found[name] for name in names} == {name: expected[name] for name in names}
        assert found["session"] == sid
        if found["bins"] is None:  # a stream of nothing
            assert not expected["all"]
            return
        start, nll = expected["start"], [x if math.isfinite(x) else None for x in expected["all"]]
        assert found["bins"]["start"] == list(range(start, start + len(nll)))
        assert found["bins"]["nll"] == nll
        if expected["frozen"] is None:
            assert (found["frozen_nll"], found["gain"], found["bins"]["frozen_nll"]) == (None, None, None)
        else:
            assert found["bins"]["frozen_nll"] == [x if math.isfinite(x) else None for x in expected["frozen"]]
            assert found["frozen_nll"] == _mean(expected["frozen"])

    @rule(target=ids, tenant=TENANTS, label=LABELS, learn=st.booleans(), compare=st.booleans())
    def create(self, tenant: str, label: str, learn: bool, compare: bool) -> str:
        body = {"label": label, "learn": learn, "compare": compare}
        shown = self.ask(tenant, "POST", "/v1/sessions", 201, json=body).json()
        frozen = Session(MODEL, INNER, learn=False) if compare else None
        return self.taken_in(shown, Plain(tenant, label, Session(MODEL, INNER, learn=learn), frozen))

    @rule(sid=ids, passage=TEXTS | TOKENS, expected=st.booleans(), stream=st.booleans())
    def append(self, sid: str, passage: str | list[int], expected: bool, stream: bool) -> None:
        plain = self.plain[sid]
        body = {"text" if isinstance(passage, str) else "tokens": passage, "bin": 1, "stream": stream}
        if expected:
            body["expected_position"] = plain.session.position
        answer = self.of(sid, "POST", "/append", json=body)
        found = plain.read(plain.ids(passage, plain.session.position), expected=expected)
        self.check_reading(answer, sid, found)

    @rule(sid=ids, passage=TEXTS)
    def append_a_file(self, sid: str, passage: str) -> None:
        plain = self.plain[sid]
        answer = self.of(sid, "POST", "/append/file", params={"bin": 1}, content=passage.encode())
        self.check_reading(answer, sid, plain.read(plain.ids(passage, plain.session.position)))

    @rule(sid=ids, passage=TEXTS | TOKENS, at=st.integers(0, 9 * M), which=st.none() | st.integers(0, KEPT_ANSWERS))
    def append_elsewhere(self, sid: str, passage: str | list[int], at: int, which: int | None) -> None:
        """An append that was acknowledged before is answered again, another one is refused; neither is read."""
        plain = self.plain[sid]
        if which is not None and which < len(plain.answers):
            at, passage = plain.answers[which][:2]
        if at == plain.session.position:
            return
        body = {"text" if isinstance(passage, str) else "tokens": passage, "bin": 1, "expected_position": at}
        known = plain.again(at, plain.ids(passage, at))
        answer = self.of(sid, "POST", "/append", 409 if known is None else 200, json=body)
        if known is None:
            assert answer.json()["error"]["position"] == plain.session.position
        else:
            self.check_reading(answer, sid, known)

    @rule(
        sid=ids,
        count=st.integers(0, 2 * M),
        seed=st.integers(0, 5),
        temperature=st.sampled_from([0.0, 0.7, 1.0]),
        penalty=st.sampled_from([1.0, 1.3]),
        stop=st.none() | st.sampled_from(["a", "\x10", "|"]),
        stream=st.booleans(),
    )
    def generate(
        self, sid: str, count: int, seed: int, temperature: float, penalty: float, stop: str | None, stream: bool
    ) -> None:
        plain = self.plain[sid]
        choices: dict[str, Any] = {"seed": seed, "temperature": temperature, "repetition_penalty": penalty}
        body = choices | {"max_tokens": count, "stop": stop, "stream": stream}
        answer = self.of(sid, "POST", "/generate", json=body)
        found = events(answer)[-1][1] if stream else answer.json()
        if plain.session.position == 0:
            plain.read([BOS], expected=True)
        start, writer = plain.session.position, plain.session if stop is None else plain.session.fork()
        written = list(writer.generate(count, stop_ids={BOS}, **choices))
        ended = len(written) < count
        if stop is not None:
            ended |= ord(stop) in written
            written = written[: written.index(ord(stop))] if ord(stop) in written else written
            if written:
                frozen, plain.frozen = plain.frozen, None
                plain.read(written, expected=True)
                plain.frozen = frozen
        if plain.frozen is not None:
            _read(plain.frozen, written)
        assert found["tokens"] == written
        assert found["text"] == bytes(written).decode(errors="replace")
        assert (found["start"], found["position"]) == (start, start + len(written))
        assert found["finish_reason"] == ("stop" if ended else "length")

    @rule(sid=ids, passage=TEXTS | TOKENS, stream=st.booleans())
    def score(self, sid: str, passage: str | list[int], stream: bool) -> None:
        fork = self.plain[sid].twin()
        body = {"text" if isinstance(passage, str) else "tokens": passage, "bin": 1, "stream": stream}
        answer = self.of(sid, "POST", "/score", json=body)
        self.check_reading(answer, sid, fork.read(fork.ids(passage, fork.session.position), keep=False))

    @rule(one=ids, other=ids, passage=TOKENS)
    def compare(self, one: str, other: str, passage: list[int]) -> None:
        allowed = self.plain[one].owner == self.plain[other].owner
        body = {"sessions": [one, other], "tokens": passage}
        found = self.ask(
            self.plain[one].owner, "POST", "/v1/sessions/compare", 200 if allowed else 404, json=body
        ).json()
        if allowed:
            a, b = (self.plain[sid].twin().read(passage)["nll"] for sid in (one, other))
            assert [reading["nll"] for reading in found["readings"]] == [a, b]
            assert found["difference"] == (None if a is None or b is None else a - b)

    @rule(target=ids, sid=ids, label=st.none() | LABELS)
    def fork(self, sid: str, label: str | None) -> str:
        shown = self.of(sid, "POST", "/fork", 201, json={"label": label}).json()
        return self.taken_in(shown, self.plain[sid].twin(label))

    @rule(sid=ids, label=st.none() | LABELS, learn=st.none() | st.booleans())
    def update(self, sid: str, label: str | None, learn: bool | None) -> None:
        plain = self.plain[sid]
        plain.label = plain.label if label is None else label
        if learn is not None:
            plain.session.learn = learn
        self.check_object(self.of(sid, "PATCH", "", json={"label": label, "learn": learn}).json())

    @rule(sid=ids, what=st.sampled_from(["save", "cancel"]))
    def keep(self, sid: str, what: str) -> None:
        self.check_object(self.of(sid, "POST", f"/{what}").json())

    @rule(target=ids, sid=ids, tenant=TENANTS, label=LABELS)
    def restore(self, sid: str, tenant: str, label: str) -> str:
        """A file that was downloaded: whoever has it may go on from it."""
        content = self.of(sid, "GET", "/file").content
        answer = self.ask(tenant, "POST", "/v1/sessions/restore", 201, params={"label": label}, content=content)
        return self.taken_in(answer.json(), self.plain[sid].twin(label, tenant, compare=False))

    @rule(sid=consumes(ids))
    def delete(self, sid: str) -> None:
        self.of(sid, "DELETE", "")
        del self.plain[sid]
        self.gone.append(sid)

    @rule(tenant=TENANTS, route=st.sampled_from(ROUTES))
    def ask_for_what_is_not_there(self, tenant: str, route: tuple[str, str, Any]) -> None:
        """No such session, somebody else's, deleted ones and twins: all answers are the same."""
        foreign = [sid for sid, plain in self.plain.items() if plain.owner != tenant]
        engine = self.client.app.state.service.engine  # type: ignore[attr-defined]
        hidden = [info.id for info in engine.sessions() if info.id not in self.plain]
        method, path, body = route
        request = {} if body is None else {"json": body}
        errors = [
            self.ask(tenant, method, f"/v1/sessions/{sid}{path}", 404, **request).json()["error"]
            for sid in (*self.gone[-3:], *foreign[-3:], *hidden[-2:])
        ]
        for error, sid in zip(errors, (*self.gone[-3:], *foreign[-3:], *hidden[-2:]), strict=True):
            error["message"] = error["message"].replace(sid, "ID")
        assert all(error == errors[0] for error in errors)

    @rule(first=st.integers(0, 7), passage=TEXTS, count=st.integers(1, M), twice=st.booleans())
    def ask_at_once(self, first: int, passage: str, count: int, twice: bool) -> None:
        """Several sessions read and write at the same time, and an impatient client sends everything twice."""
        chosen = [sid for sid in self.plain if self.plain[sid].session.position][first:][:4]
        asked = []
        with ThreadPoolExecutor(8) as pool:
            for i, sid in enumerate(chosen):
                body: dict[str, Any] = {"text": passage, "expected_position": self.plain[sid].session.position}
                path, body = (
                    ("/append", body | {"bin": 1}) if i % 2 else ("/generate", {"max_tokens": count, "seed": i})
                )
                times = 2 if twice and i % 2 else 1
                asked.append([pool.submit(self.of, sid, "POST", path, json=body) for _ in range(times)])
        for i, (sid, answers) in enumerate(zip(chosen, asked, strict=True)):
            plain = self.plain[sid]
            if i % 2 == 0:
                written = list(plain.session.generate(count, seed=i, stop_ids={BOS}))
                assert answers[0].result().json()["tokens"] == written
                if plain.frozen is not None:
                    _read(plain.frozen, written)
                continue
            found = plain.read(plain.ids(passage, plain.session.position), expected=True)
            last = answers[-1].result()
            if last.json()["frozen_nll"] is None:  # it came second, and was answered again
                found |= {"frozen": None}
            self.check_reading(last, sid, found)

    @rule()
    def restart(self) -> None:
        self.stack.close()
        self.opened()

    @invariant()
    def everybody_sees_their_own(self) -> None:
        for tenant in KEY:
            listed = self.ask(tenant, "GET", "/v1/sessions").json()
            assert listed["lost"] == []
            assert {shown["id"] for shown in listed["data"]} == {
                sid for sid, plain in self.plain.items() if plain.owner == tenant
            }
            for shown in listed["data"]:
                self.check_object(shown)
            used = [shown["used"] for shown in listed["data"]]
            assert used == sorted(used, reverse=True)
        lines = self.ask("bob", "GET", "/metrics").text.splitlines()
        numbers = dict(line.rsplit(" ", 1) for line in lines if line.startswith("longread_engine_"))
        count = len(self.plain) + sum(plain.frozen is not None for plain in self.plain.values())
        names = ("sessions", "tasks", "writing", "lost")
        assert [float(numbers[f"longread_engine_{name}"]) for name in names] == [count, 0, 0, 0]

    def teardown(self) -> None:
        for sid, plain in self.plain.items():
            path = Path(self.folder.name) / "downloaded"
            path.write_bytes(self.of(sid, "GET", "/file").content)
            state = Session.restore(path, MODEL).state
            assert all(torch.equal(a, b) for a, b in zip(state.tensors, plain.session.state.tensors, strict=True))
        self.stack.close()
        left = [path for path in Path(self.folder.name).rglob("*") if path.suffix in (".tmp", ".upload", ".download")]
        assert not left
        self.folder.cleanup()


def run(examples: int, steps: int, *, derandomize: bool) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    phases = [phase for phase in Phase if phase is not Phase.shrink]  # it would take minutes
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=derandomize,
        database=None,
        suppress_health_check=checks,
        phases=phases,
    )
    run_state_machine_as_test(Requests, settings=chosen)


def test_any_order_of_requests() -> None:
    run(examples=3, steps=16, derandomize=True)


@pytest.mark.slow
def test_many_orders_of_requests() -> None:
    run(examples=150, steps=40, derandomize=False)
