"""Work that ends before its time, because the server stops or a limit is reached: nobody takes it for a success."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient

from longread.config import UserError
from longread.engine import Busy, pieces, scheduler
from longread.server import ServerLimits, running
from longread.server.service import Work
from tests.held import Held
from tests.server import BOS, TEXT, Listening, direct, events, post, serving, session

LONG = TEXT * 3
EARLY = ("start", "position", "tokens", "bytes")


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once work has been told to end."""
    told, cut_off = threading.Event(), Work.cut_off

    def telling(work: Work) -> None:
        cut_off(work)
        if work._running:
            told.set()

    monkeypatch.setattr(Work, "cut_off", telling)
    return told


def in_background(
    pool: ThreadPoolExecutor, client: httpx2.Client, path: str, **request: Any
) -> Future[httpx2.Response]:
    return pool.submit(client.post, path, **request)


def test_a_stop_lets_requests_end_and_tells_others_to_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "PATIENCE_SECONDS", 3600.0)
    with Listening(tmp_path) as server, ThreadPoolExecutor(1) as pool:
        one = server.client.post("/v1/sessions").json()["id"]
        server.service.encode = held = Held(server.service.encode)  # type: ignore[method-assign]
        append = in_background(pool, server.client, f"/v1/sessions/{one}/append", json={"text": TEXT})
        assert held.entered.wait(60)
        assert httpx2.get(f"{server.url}/ready").json() == {"status": "ready"}
        server.signal()
        for method, path in (("GET", "/ready"), ("GET", "/v1/models"), ("POST", f"/v1/sessions/{one}/append")):
            refused = httpx2.request(method, server.url + path)  # on a connection of its own
            assert (refused.status_code, refused.headers["connection"]) == (503, "close")
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == "stopping"
        assert httpx2.get(f"{server.url}/health").status_code == 200
        held.go()
        assert append.result(60).json()["position"] == 1 + len(TEXT)
        server.thread.join(60)
        assert not server.thread.is_alive()
        with pytest.raises(httpx2.TransportError):
            httpx2.get(f"{server.url}/health")
    with serving(tmp_path) as client:
        assert client.get(f"/v1/sessions/{one}").json()["position"] == 1 + len(TEXT)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_ends_what_takes_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: threading.Event, stream: bool
) -> None:
    monkeypatch.setattr(running, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(pieces, "read", held := Held(pieces.read, call=2))
    monkeypatch.setattr(running, "ENDING_SECONDS", 3600.0)
    with Listening(tmp_path) as server, ThreadPoolExecutor(1) as pool:
        one = server.client.post("/v1/sessions").json()["id"]
        append = in_background(
            pool, server.client, f"/v1/sessions/{one}/append", json={"text": LONG, "stream": stream, "bin": 1}
        )
        assert held.entered.wait(60)
        server.signal()
        assert cut.wait(60)
        held.go()
        answer = append.result(60)
        server.thread.join(60)
        assert not server.thread.is_alive()
    if stream:
        name, data = events(answer)[-1]
        assert (answer.status_code, name) == (200, "error")
        error = data["error"]
    else:
        assert (answer.status_code, answer.headers["connection"]) == (503, "close")
        assert int(answer.headers["retry-after"]) >= 1
        error = answer.json()["error"]
    assert error["code"] == "stopping"
    assert 0 < error["tokens"] < len(LONG)
    assert (error["start"], error["position"], error["bytes"]) == (0, error["tokens"], error["tokens"] - 1)
    with serving(tmp_path) as client:
        assert client.get(f"/v1/sessions/{one}").json()["position"] == error["position"]


def at_the_end_of_its_time(client: TestClient) -> None:
    for work in list(client.app.state.service.works):  # type: ignore[attr-defined]
        work._time_is_up()


@pytest.mark.parametrize("route", ["append", "append of tokens", "append/file", "streamed append"])
def test_a_text_that_ended_early_can_be_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, route: str) -> None:
    with serving(tmp_path) as client, ThreadPoolExecutor(1) as pool:
        one = session(client, compare=True)

        def send(**more: Any) -> httpx2.Response:
            url = f"/v1/sessions/{one}/append"
            if route == "append/file":
                return client.post(f"{url}/file", params={"bin": 1} | more, content=LONG.encode())
            text = {"tokens": [BOS, *LONG.encode()]} if route == "append of tokens" else {"text": LONG}
            return client.post(url, json={**text, "bin": 1, "stream": route == "streamed append", **more})

        with monkeypatch.context() as patch:
            patch.setattr(pieces, "read", held := Held(pieces.read, call=4))
            sent = pool.submit(send)
            assert held.entered.wait(60)
            at_the_end_of_its_time(client)
            held.go()
            answer = sent.result(60)
        if route == "streamed append":
            read = [data["tokens"] for name, data in events(answer) if name == "progress"]
            error = events(answer)[-1][1]["error"]
            assert read[-1] == error["tokens"]
        else:
            assert answer.status_code == 504
            error = answer.json()["error"]
        assert error["code"] == "timeout"
        assert 0 < error["tokens"] < 1 + len(LONG)
        assert error["bytes"] == (None if route == "append of tokens" else error["tokens"] - 1)
        info = client.get(f"/v1/sessions/{one}").json()
        assert (info["position"], info["compare"]) == (error["position"], True)
        rest = send(skip=error["tokens"], expected_position=error["position"])
        again = send(skip=error["tokens"], expected_position=error["position"])
        last = [found if route == "streamed append" else found.json() for found in (rest, again)]
        if route == "streamed append":
            nll = [x for name, data in events(rest) if name == "progress" for x in data["bins"]["nll"]]
            assert events(rest)[-1][1]["position"] == events(again)[-1][1]["position"] == 1 + len(LONG)
        else:
            nll = last[0]["bins"]["nll"]
            assert last[0]["position"] == last[1]["position"] == 1 + len(LONG)
            assert last[0]["frozen_nll"] is not None
        assert nll == pytest.approx(direct(LONG)[error["tokens"] - 1 :], abs=1e-5)
        assert send(skip=1, expected_position=0).status_code == 400


def test_more_cannot_be_skipped_than_was_read(tmp_path: Path) -> None:
    with serving(tmp_path) as client:
        one = session(client, "abc")
        url, here = f"/v1/sessions/{one}/append", {"expected_position": 4}
        for body in ({"text": "abcdef", "skip": 5}, {"text": "ab", "skip": 4}, {"tokens": [1], "skip": 2}):
            error = post(client, url, 400, **here, **body)["error"]
            assert error["param"] == "skip"
            assert "at most the smaller of the two" in error["message"]
        assert "give both" in post(client, url, 400, text="abcdef", skip=4)["error"]["message"]
        assert post(client, url, text="abcdef", skip=4, **here)["tokens"] == 3
        assert post(client, url, text="abcdef", skip=7, expected_position=7)["tokens"] == 0


def test_a_text_that_a_client_ended_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path) as client, ThreadPoolExecutor(1) as pool:
        one = session(client)
        catalog = client.app.state.catalog  # type: ignore[attr-defined]
        monkeypatch.setattr(pieces, "read", held := Held(pieces.read, call=2))
        sent = in_background(pool, client, f"/v1/sessions/{one}/append", json={"text": LONG})
        assert held.entered.wait(60)
        catalog.cancel(one)
        held.go()
        found = sent.result(60)
        assert (found.status_code, found.json()["cancelled"]) == (200, True)


def test_what_is_finished_when_the_time_is_up_is_a_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path) as client:
        one = session(client)
        enter = Work.__aenter__

        async def late(work: Work) -> Work:
            work._late = True
            return await enter(work)

        monkeypatch.setattr(Work, "__aenter__", late)
        assert post(client, f"/v1/sessions/{one}/append", text=TEXT)["cancelled"] is False
        assert post(client, f"/v1/sessions/{one}/generate", max_tokens=3)["finish_reason"] in ("length", "stop")
        post(client, "/v1/completions", model="tiny", prompt="x", max_tokens=3)


@pytest.mark.parametrize("end", [at_the_end_of_its_time, None])
def test_a_continuation_that_ended_early_says_what_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: Callable[[TestClient], None] | None
) -> None:
    with serving(tmp_path) as client, ThreadPoolExecutor(1) as pool:
        one = session(client, TEXT)
        with monkeypatch.context() as patch:
            patch.setattr(scheduler, "draw", held := Held(scheduler.draw, call=5))
            sent = in_background(pool, client, f"/v1/sessions/{one}/generate", json={"max_tokens": 50, "seed": 1})
            assert held.entered.wait(60)
            if end is None:
                client.app.state.service.stopping = True  # type: ignore[attr-defined]
                client.app.state.service.end()  # type: ignore[attr-defined]
            else:
                end(client)
            held.go()
            answer = sent.result(60)
        client.app.state.service.stopping = False  # type: ignore[attr-defined]
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == ((504, "timeout") if end else (503, "stopping"))
        assert error["start"] == 1 + len(TEXT)
        assert 4 <= error["tokens"] <= 6
        assert error["position"] == error["start"] + error["tokens"]
        assert client.get(f"/v1/sessions/{one}").json()["position"] == error["position"]
        client.app.state.service.ending = False  # type: ignore[attr-defined]
        other = session(client, TEXT)
        whole = post(client, f"/v1/sessions/{other}/generate", max_tokens=error["tokens"], seed=1)
        assert whole["text"] == error["text"]


@pytest.mark.parametrize("kind", ["completions", "chat/completions"])
def test_a_completion_that_ended_early_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    with serving(tmp_path) as client, ThreadPoolExecutor(1) as pool:
        ask = {"prompt": "x"} if kind == "completions" else {"messages": [{"role": "user", "content": "x"}]}
        seed = 1  # another may end the text before its time is up
        body = {"model": "tiny", **ask, "max_tokens": 50, "seed": seed, "stream": True}
        monkeypatch.setattr(scheduler, "draw", held := Held(scheduler.draw, call=5))
        sent = in_background(pool, client, f"/v1/{kind}", json=body)
        assert held.entered.wait(60)
        at_the_end_of_its_time(client)
        held.go()
        lines = sent.result(60).text.strip().split("\n\n")
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"


def test_a_failure_in_the_midst_says_how_far_it_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path) as client:
        one = session(client)
        real, calls = pieces.read, iter(range(100))

        def failing(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == 2:
                raise Busy("the device has no memory left for this; try again later")
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(pieces, "read", failing)
            answer = client.post(f"/v1/sessions/{one}/append", json={"text": LONG})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (503, "overloaded")
        assert error["tokens"] > 0
        assert set(EARLY) <= set(error)
        assert client.get(f"/v1/sessions/{one}").json()["position"] == error["position"]

        def refusing(*_: Any, **__: Any) -> Any:
            raise UserError("no")

        monkeypatch.setattr(pieces, "read", refusing)
        assert "tokens" not in client.post(f"/v1/sessions/{one}/append", json={"text": LONG}).json()["error"]


def test_the_clock_of_a_request_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: threading.Event) -> None:
    with serving(tmp_path, limits=ServerLimits(seconds=0.2)) as client, ThreadPoolExecutor(1) as pool:
        one = session(client)
        monkeypatch.setattr(pieces, "read", held := Held(pieces.read))
        sent = in_background(pool, client, f"/v1/sessions/{one}/append", json={"text": LONG})
        assert cut.wait(60)
        held.go()
        answer = sent.result(60)
        assert answer.status_code == 504
        assert "0.2 seconds" in answer.json()["error"]["message"]
