"""Responses are kept: whose they are, how many, how long, and that neither a failure nor a kill loses or leaves one."""

from __future__ import annotations

import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.responses import Response

from longread.config import UserError
from longread.engine import Limits
from longread.server import ServerLimits
from longread.server.catalog import RESPONSE_LABEL
from longread.server.openai.history import History
from tests.responding import TOKENS, ask, connected, usage
from tests.server import ALICE, BOB, Process, bearer, make_service, serving


def test_tenants_have_their_own(tmp_path: Path) -> None:
    with serving(tmp_path, keys=True, limits=ServerLimits(responses=3, sessions=1, conversations=1)) as served:
        alice, bob = connected(served, ALICE), connected(served, BOB)
        root = ask(alice, "Who?")
        talk = alice.conversations.create()
        for unknown in (root.id, "resp_" + "0" * 32, "../x"):
            for call in (bob.responses.retrieve, bob.responses.delete, bob.responses.input_items.list):
                with pytest.raises(openai.NotFoundError) as refused:
                    call(unknown)
                assert refused.value.code == ("not_found" if "/" in unknown else "response_not_found")
            with pytest.raises(openai.NotFoundError) as refused:
                ask(bob, "And?", previous_response_id=unknown)
            assert refused.value.code == "previous_response_not_found"
        with pytest.raises(openai.NotFoundError) as refused:
            ask(bob, "And?", conversation=talk.id)
        assert refused.value.code == "conversation_not_found"
        with pytest.raises(openai.RateLimitError, match="1 conversations"):
            alice.conversations.create()
        others = [ask(bob, f"Who {i}?") for i in range(5)]
        assert alice.responses.retrieve(root.id) == root, "others cannot push it out"
        for i, other in enumerate(others):
            if i < 2:
                with pytest.raises(openai.NotFoundError, match="at most 3"):
                    bob.responses.retrieve(other.id)
            else:
                assert bob.responses.retrieve(other.id) == other
        assert served.get("/v1/sessions", headers=bearer(BOB)).json()["data"] == []
        assert served.post("/v1/sessions", headers=bearer(BOB)).status_code == 201, (
            "responses are no sessions of theirs"
        )
        session = others[-1].id.removeprefix("resp_")
        assert served.get(f"/v1/sessions/{session}", headers=bearer(BOB)).status_code == 404


def test_what_is_used_stays(tmp_path: Path) -> None:
    with serving(tmp_path, limits=ServerLimits(responses=3)) as served:
        client = connected(served)
        root = ask(client, "Who?")
        for turn in range(4):
            ask(client, f"And {turn}?", previous_response_id=root.id)
        assert client.responses.retrieve(root.id) == root
        engine = served.app.state.service.engine  # type: ignore[attr-defined]
        assert len(engine.sessions()) == 3


def test_a_full_engine_forgets_a_response_for_another(tmp_path: Path) -> None:
    with serving(tmp_path, keys=True, engine_limits=Limits(max_sessions=2)) as served:
        alice, bob = connected(served, ALICE), connected(served, BOB)
        found = [ask(alice, f"Who {i}?") for i in range(3)]
        with pytest.raises(openai.NotFoundError):
            alice.responses.retrieve(found[0].id)
        with pytest.raises(openai.InternalServerError):
            ask(bob, "Who?")
        assert [alice.responses.retrieve(one.id) for one in found[1:]] == found[1:]


def test_responses_take_no_more_bytes_than_they_may(tmp_path: Path) -> None:
    with serving(tmp_path / "size") as served:
        size = ask(connected(served), "Who?").id.removeprefix("resp_")
        nbytes = served.app.state.service.engine.info(size).nbytes  # type: ignore[attr-defined]
    with serving(tmp_path, limits=ServerLimits(tenant_bytes=2 * nbytes)) as served:
        client = connected(served)
        found = [ask(client, f"Who {i}?") for i in range(3)]
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(found[0].id)
        assert client.responses.retrieve(found[2].id) == found[2]


def test_what_is_not_used_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path, limits=ServerLimits(response_seconds=100)) as served:
        client, now = connected(served), time.time()
        monkeypatch.setattr(time, "time", lambda: now)
        root, talk = ask(client, "Who?"), client.conversations.create()
        now += 90
        more = ask(client, "And?", previous_response_id=root.id)
        assert client.conversations.retrieve(talk.id) == talk
        now += 90
        assert client.responses.retrieve(root.id) == root, "it has been used since"
        with pytest.raises(openai.NotFoundError):
            client.conversations.retrieve(talk.id)
        now += 20
        for old in (root, more):
            with pytest.raises(openai.NotFoundError, match="has expired"):
                client.responses.retrieve(old.id)
        assert served.app.state.service.engine.sessions() == []  # type: ignore[attr-defined]


@pytest.mark.parametrize("at", ["read", "written", "kept"])
def test_a_response_that_fails_leaves_nothing(at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path) as served:
        client, service = connected(served), served.app.state.service  # type: ignore[attr-defined]
        root = ask(client, "Who?")
        owner, name = {
            "read": (service.engine, "append"),
            "written": (service.engine, "complete"),
            "kept": (service.history, "add"),
        }[at]

        def fail(*_: Any, **__: Any) -> None:
            raise UserError("the disk is full") from OSError()

        with monkeypatch.context() as broken:
            broken.setattr(owner, name, fail)
            with pytest.raises(openai.InternalServerError):
                ask(client, "And?", previous_response_id=root.id)
            stream = client.responses.create(
                input="And?", previous_response_id=root.id, max_output_tokens=TOKENS, stream=True
            )
            last: Any = list(stream)[-1]
        assert (last.type, last.response.status, last.response.error.code) == (
            "response.failed",
            "failed",
            "server_error",
        )
        assert [info.id for info in service.engine.sessions()] == [root.id.removeprefix("resp_")]
        assert usage(ask(client, "And?", previous_response_id=root.id))[1] == sum(usage(root)[::2])


def test_no_answer_is_lost_to_a_kill(tmp_path: Path) -> None:
    home, previous, talk = tmp_path, None, ""
    found: list[Response] = []
    for turn in range(3):
        with Process(home, keys=True) as server:
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=ALICE, max_retries=0)
            talk = talk or client.conversations.create().id
            for one in found:
                assert client.responses.retrieve(one.id) == one
            options: dict[str, Any] = {} if previous is None else {"previous_response_id": previous.id}
            said = ask(client, f"Question {turn}?", conversation=talk, temperature=0)
            new = ask(client, f"Question {turn}?", temperature=0, **options)  # or one of the two might end sooner
            if previous is not None:
                branch = ask(client, f"Question {turn}?", previous_response_id=previous.id)
                assert usage(new)[1] == usage(branch)[1] == sum(usage(previous)[::2])
                assert usage(said)[:2] == usage(new)[:2]
            previous = new
            found += [said, new]
            server.stop(signal.SIGKILL)


def test_a_turn_that_a_kill_ended_leaves_nothing(tmp_path: Path) -> None:
    service = make_service(tmp_path)
    service.engine.create("local", label=RESPONSE_LABEL)
    service.close()
    with serving(tmp_path) as served:
        assert served.app.state.service.engine.sessions() == []  # type: ignore[attr-defined]


def test_a_damaged_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken").write_bytes(b"no database" * 1000)
    with pytest.raises(UserError, match="move it away"):
        History(tmp_path / "broken")
    later = sqlite3.connect(tmp_path / "later")
    later.execute("PRAGMA user_version=9")
    later.close()
    with pytest.raises(UserError, match="version 9"):
        History(tmp_path / "later")
