"""Any order of turns, branches, conversations and deletions of two tenants: what is told is what sessions have read."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings, strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule, run_state_machine_as_test

from longread.server import ServerLimits
from tests.server import ALICE, BOB, bearer, serving

KEYS = {"alice": ALICE, "bob": BOB}
TENANTS = st.sampled_from(sorted(KEYS))
TEXTS = st.text("abc \u00e9\n", max_size=9)
MOST = 6
"""Responses of a tenant."""


@dataclass
class Talk:
    """What a conversation must hold."""

    owner: str
    items: list[str] = field(default_factory=list)
    read: list[tuple[str, int]] = field(default_factory=list)
    """Its responses, and how many of its items each has read."""


class Conversations(RuleBasedStateMachine):
    """Responses and conversations against what is known of them: their tokens, who has which, who expired."""

    ids: Bundle[str] = Bundle("ids")
    talks: Bundle[str] = Bundle("talks")

    def __init__(self) -> None:
        super().__init__()
        self._stack = contextlib.ExitStack()
        folder = self._stack.enter_context(tempfile.TemporaryDirectory())
        limits = ServerLimits(responses=MOST, per_minute=10**6)
        self._client = self._stack.enter_context(serving(Path(folder), keys=True, limits=limits))
        self._total: dict[str, int] = {}
        self._owner: dict[str, str] = {}
        self._used: dict[str, list[str]] = {tenant: [] for tenant in KEYS}
        """Those that are there, the one used last at the end."""
        self._talks: dict[str, Talk] = {}

    def teardown(self) -> None:
        self._stack.close()

    def _call(self, tenant: str, method: str, path: str, status: int = 200, **body: Any) -> Any:
        answer = self._client.request(method, path, headers=bearer(KEYS[tenant]), json=body or None)
        assert answer.status_code == status, answer.text
        return answer.json()

    def _there(self, tenant: str, one: str) -> bool:
        return one in self._used[tenant]

    def _answered(self, tenant: str, base: str | None, found: Any) -> str:
        """Checks the account of a new response, and notes it."""
        usage = found["usage"]
        assert usage["input_tokens_details"]["cached_tokens"] == (0 if base is None else self._total[base])
        one, used = str(found["id"]), self._used[tenant]
        if base is not None:
            used.remove(base)
            used.append(base)
        if len(used) >= MOST:
            used.remove(next(old for old in used if old != base))
        used.append(one)
        self._total[one], self._owner[one] = usage["total_tokens"], tenant
        return one

    @rule(target=ids, tenant=TENANTS, text=TEXTS)
    def begin(self, tenant: str, text: str) -> str:
        return self._answered(tenant, None, self._call(tenant, "POST", "/v1/responses", input=text, **SHORT))

    @rule(target=ids, tenant=TENANTS, base=ids, text=TEXTS)
    def go_on(self, tenant: str, base: str, text: str) -> Any:
        known = self._there(tenant, base)
        body = {"input": text, "previous_response_id": base, **SHORT}
        found = self._call(tenant, "POST", "/v1/responses", 200 if known else 404, **body)
        if not known:
            assert found["error"]["code"] == "previous_response_not_found"
            return multiple()
        # the session of the base counts as used only once there is an answer: what goes for it was chosen before
        return self._answered(tenant, base, found)

    @rule(tenant=TENANTS, one=ids)
    def delete(self, tenant: str, one: str) -> None:
        self._call(tenant, "DELETE", f"/v1/responses/{one}", 200 if self._there(tenant, one) else 404)
        if self._there(tenant, one):
            self._used[tenant].remove(one)

    @rule(target=talks, tenant=TENANTS, said=st.lists(TEXTS, max_size=2))
    def start(self, tenant: str, said: list[str]) -> str:
        items = [{"role": "user", "content": text} for text in said]
        found = self._call(tenant, "POST", "/v1/conversations", items=items, metadata={"a": "b"})
        self._talks[found["id"]] = Talk(tenant, list(said))
        return str(found["id"])

    @rule(target=ids, talk=talks, text=TEXTS)
    def say(self, talk: str, text: str) -> Any:
        known = self._talks[talk]
        found = self._call(known.owner, "POST", "/v1/responses", input=text, conversation=talk, **SHORT)
        alive = [one for one, _ in known.read if self._there(known.owner, one)]
        one = self._answered(known.owner, alive[-1] if alive else None, found)
        known.items += [text, found["output"][0]["content"][0]["text"]]
        known.read.append((one, len(known.items)))
        return one

    @rule(talk=talks, text=TEXTS)
    def add(self, talk: str, text: str) -> None:
        known = self._talks[talk]
        items = [{"role": "user", "content": text}]
        self._call(known.owner, "POST", f"/v1/conversations/{talk}/items", items=items)
        known.items.append(text)

    @rule(talk=talks, place=st.integers(0, 20))
    def take_out(self, talk: str, place: int) -> None:
        known = self._talks[talk]
        if place >= len(known.items):
            return
        listed = self._call(known.owner, "GET", f"/v1/conversations/{talk}/items?order=asc&limit=100")["data"]
        self._call(known.owner, "DELETE", f"/v1/conversations/{talk}/items/{listed[place]['id']}")
        del known.items[place]
        known.read = [(one, count) for one, count in known.read if count <= place]

    @rule(tenant=TENANTS, one=ids)
    def look(self, tenant: str, one: str) -> None:
        there = self._there(tenant, one)
        found = self._call(tenant, "GET", f"/v1/responses/{one}", 200 if there else 404)
        if there:
            assert found["usage"]["total_tokens"] == self._total[one]

    @rule(tenant=TENANTS, talk=talks)
    def look_at_items(self, tenant: str, talk: str) -> None:
        known = self._talks[talk]
        path = f"/v1/conversations/{talk}/items?order=asc&limit=100"
        found = self._call(tenant, "GET", path, 200 if tenant == known.owner else 404)
        if tenant == known.owner:
            assert [item["content"][0]["text"] for item in found["data"]] == known.items

    @invariant()
    def every_response_has_a_session_and_no_other_is_left(self) -> None:
        engine = self._client.app.state.service.engine  # type: ignore[attr-defined]
        found = {(info.owner, info.id): info.position for info in engine.sessions()}
        there = [(tenant, one) for tenant, used in self._used.items() for one in used]
        assert found == {(tenant, one.removeprefix("resp_")): self._total[one] for tenant, one in there}


SHORT: dict[str, Any] = {"max_output_tokens": 2, "temperature": 0}


def machine(examples: int, steps: int) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Conversations,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_conversations_in_any_order() -> None:
    machine(3, 25)


@pytest.mark.slow
def test_many_conversations_in_any_order() -> None:
    machine(30, 40)
