"""/v1/sessions: what it answers is what the library finds."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from longread.engine.pieces import STEPS
from longread.session import Session
from tests.server import ALICE, BOS, INNER, TEXT, M, bearer, direct, events, make_model, post, serving, session


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with serving(tmp_path_factory.mktemp("sessions")) as client:
        yield client


def test_appending_is_reading(client: TestClient) -> None:
    one = session(client, label="book")
    first, second = TEXT[:50], TEXT[50:]
    found = post(client, f"/v1/sessions/{one}/append", text=first, bin=1)
    assert found["bins"]["bytes"] == [0] + [1] * len(first)
    assert found["bins"]["nll"][0] is None
    assert found["bins"]["nll"][1:] == pytest.approx(direct(first), abs=1e-5)
    then = post(client, f"/v1/sessions/{one}/append", tokens=list(second.encode()), bin=1)
    assert then["bins"]["nll"] == pytest.approx(direct(second, before=first), abs=1e-5)
    assert then["bins"]["bytes"] is None
    assert (then["start"], then["position"], then["tokens"]) == (51, 1 + len(TEXT), len(second))
    assert found["steps"] + then["steps"] == len(TEXT) // M
    assert then["nll"] == pytest.approx(sum(direct(second, before=first)) / len(second), abs=1e-5)
    info = client.get(f"/v1/sessions/{one}").json()
    assert (info["label"], info["position"], info["steps"]) == ("book", 1 + len(TEXT), len(TEXT) // M)
    assert info["drift"] > 0


def test_a_file_is_a_text(client: TestClient) -> None:
    one = session(client)
    answer = client.post(f"/v1/sessions/{one}/append/file", params={"bin": 1}, content=TEXT.encode())
    assert answer.json()["bins"]["nll"][1:] == pytest.approx(direct(TEXT), abs=1e-5)
    for content, words in ((b"\xff", "is not valid UTF-8 from byte 0 on"), (b"a\0b", "no text")):
        refused = client.post(f"/v1/sessions/{one}/append/file", content=content)
        assert refused.status_code == 400
        assert words in refused.json()["error"]["message"]
    assert client.post(f"/v1/sessions/{one}/append/file", files={"file": b"x"}).status_code == 415
    for route, slip in ((f"{one}/append/file", "expected_positon"), ("restore", "lable")):
        refused = client.post(f"/v1/sessions/{route}", params={slip: 0}, content=b"abc")
        assert refused.status_code == 400
        assert f"there is no query parameter '{slip}' here" in refused.json()["error"]["message"]
    assert client.get(f"/v1/sessions/{one}").json()["position"] == 1 + len(TEXT)


def test_a_file_may_have_another_encoding_and_any_line_ends(client: TestClient) -> None:
    one, many = session(client), "Möwe\r\nüber\rMeer"
    expected = len("Möwe\nüber\nMeer".encode())
    for kind, data in (
        ("text/plain", many.encode()),
        ("text/plain", many.encode("utf-16")),
        ("Text/Plain; Charset=Latin-1", many.encode("latin-1")),
        ("text/html", b"<!doctype html>" + many.encode()),
    ):
        before = client.get(f"/v1/sessions/{one}").json()["position"]
        answer = client.post(f"/v1/sessions/{one}/append/file", content=data, headers={"Content-Type": kind})
        assert answer.status_code == 200, answer.text
        extra = 15 * (kind == "text/html") + (before == 0)
        assert answer.json()["position"] == before + expected + extra
    before = client.get(f"/v1/sessions/{one}").json()["position"]
    for kind, data, words in (
        ("text/plain", b"<!doctype html>", "the file is an HTML page"),
        ("text/plain", b"%PDF-1.4", "the file is a PDF file"),
        ("text/plain; charset=nonsense", b"abc", "there is no encoding 'nonsense'"),
    ):
        refused = client.post(f"/v1/sessions/{one}/append/file", content=data, headers={"Content-Type": kind})
        assert refused.status_code == 400
        assert words in refused.json()["error"]["message"]
    assert client.get(f"/v1/sessions/{one}").json()["position"] == before
    assert post(client, f"/v1/sessions/{one}/append", text=many)["position"] == before + expected


def test_a_frozen_twin_reads_along(client: TestClient) -> None:
    one = session(client, compare=True)
    first = post(client, f"/v1/sessions/{one}/append", text=TEXT[:50])
    found = post(client, f"/v1/sessions/{one}/append", text=TEXT[50:], bin=16)
    frozen = direct(TEXT[50:], before=TEXT[:50], learn=False)
    assert found["frozen_nll"] == pytest.approx(sum(frozen) / len(frozen), abs=1e-5)
    assert found["gain"] == pytest.approx(found["frozen_nll"] - found["nll"])
    assert first["frozen_nll"] is not None
    bins = found["bins"]
    assert bins["start"][0] == 51
    assert all(start % 16 == 0 for start in bins["start"][1:])
    weighted = sum(n * nll for n, nll in zip(bins["tokens"], bins["frozen_nll"], strict=True)) / found["tokens"]
    assert weighted == pytest.approx(found["frozen_nll"])
    assert [s["id"] for s in client.get("/v1/sessions").json()["data"]].count(one) == 1
    written = post(client, f"/v1/sessions/{one}/generate", max_tokens=5, seed=0)
    scored = post(client, f"/v1/sessions/{one}/score", text=TEXT)
    assert scored["frozen_nll"] is not None
    assert scored["start"] == written["position"]
    twin = post(client, f"/v1/sessions/{one}/fork", 201)
    assert post(client, f"/v1/sessions/{twin['id']}/append", text="x")["frozen_nll"] is not None


def test_a_slow_twin_reads_in_the_same_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So what it finds does not depend, not in the last bit, on how far behind it was."""
    with serving(tmp_path) as client:
        one = session(client, TEXT[:4], compare=True)
        engine = client.app.state.service.engine  # type: ignore[attr-defined]
        append, read = engine.append, []

        def slow(sid: str, tokens: list[int], **options: Any) -> Any:
            if sid != one:
                time.sleep(0.1)
                read.append(len(tokens))
            return append(sid, tokens, **options)

        monkeypatch.setattr(engine, "append", slow)
        found = post(client, f"/v1/sessions/{one}/append", text=TEXT[4:], bin=1)
    twin, ids, pieces = Session(make_model(), INNER, learn=False), list(TEXT[4:].encode()), [M - 5, STEPS * M]
    pieces.append(len(ids) - sum(pieces))
    twin.read([BOS, *TEXT[:4].encode()])
    assert read == pieces
    assert found["bins"]["frozen_nll"] == [
        x for part in torch.tensor(ids).split(pieces) for x in twin.read(part).tolist()
    ]


def test_a_streamed_append_shows_its_progress(client: TestClient) -> None:
    one, other = session(client, compare=True), session(client, compare=True)
    whole = post(client, f"/v1/sessions/{other}/append", text=TEXT, bin=10)
    answer = client.post(f"/v1/sessions/{one}/append", json={"text": TEXT, "bin": 10, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = events(answer)
    assert {name for name, _ in found[:-1]} == {"progress"}
    name, done = found[-1]
    assert name == "done"
    assert {k: done[k] for k in ("start", "position", "tokens")} == {
        k: whole[k] for k in ("start", "position", "tokens")
    }
    assert done["nll"] == pytest.approx(whole["nll"])
    for key in ("start", "tokens", "bytes", "nll", "frozen_nll"):
        joined = [x for _, data in found[:-1] for x in data["bins"][key]]
        assert joined == pytest.approx(whole["bins"][key])
    assert sum(len(data["grad_norms"]) for _, data in found[:-1]) == done["steps"] == len(TEXT) // M
    positions = [data["position"] for _, data in found[:-1]]
    assert positions == sorted(positions)
    assert positions[-1] == done["position"]
    unbinned = events(client.post(f"/v1/sessions/{one}/append", json={"text": TEXT, "stream": True}))
    assert max(n for _, data in unbinned[:-1] for n in data["bins"]["tokens"]) == 64


def test_an_append_sent_twice_is_read_once(client: TestClient) -> None:
    one = session(client, "beginning")
    body = {"text": TEXT, "expected_position": 10, "bin": 1}
    first, again = (post(client, f"/v1/sessions/{one}/append", **body) for _ in range(2))
    for key in ("start", "position", "tokens", "nll", "steps", "bins"):
        assert first[key] == again[key]
    error = post(client, f"/v1/sessions/{one}/append", 409, text="other", expected_position=10)["error"]
    assert error["position"] == 10 + len(TEXT)
    assert error["code"] == "wrong_position"
    stream = client.post(f"/v1/sessions/{one}/append", json={"text": "other", "expected_position": 3, "stream": True})
    assert stream.status_code == 409


def test_a_score_changes_nothing(client: TestClient) -> None:
    one = session(client, TEXT[:50])
    before = client.get(f"/v1/sessions/{one}").json()
    found = post(client, f"/v1/sessions/{one}/score", text=TEXT[50:], bin=1)
    assert found["bins"]["nll"] == pytest.approx(direct(TEXT[50:], before=TEXT[:50]), abs=1e-5)
    after = client.get(f"/v1/sessions/{one}").json()
    assert after | {"used": 0} == before | {"used": 0}
    streamed = events(client.post(f"/v1/sessions/{one}/score", json={"text": TEXT[50:], "stream": True}))
    assert streamed[-1][1]["nll"] == pytest.approx(found["nll"])


def test_what_a_session_writes_it_has_read(client: TestClient) -> None:
    reader = Session(make_model(), INNER)
    reader.read([BOS, *TEXT.encode()])
    expected = list(reader.generate(20, temperature=0))
    one = session(client, TEXT)
    found = post(client, f"/v1/sessions/{one}/generate", max_tokens=20, temperature=0, logprobs=1)
    assert found["tokens"] == expected
    assert found["text"] == bytes(expected).decode(errors="replace")
    assert found["finish_reason"] == "length"
    assert all(chosen["top"][0]["logprob"] == chosen["logprob"] for chosen in found["logprobs"])
    assert client.get(f"/v1/sessions/{one}").json()["position"] == found["position"] == reader.position
    score = post(client, f"/v1/sessions/{one}/score", text="and then")
    nll = reader.fork().read(list(b"and then"))
    assert score["nll"] == pytest.approx(nll.mean().item(), abs=1e-5)


def test_a_continuation_ends_before_a_stop_and_the_session_too(client: TestClient) -> None:
    ids = [session(client, TEXT, compare=True) for _ in range(3)]
    whole = post(client, f"/v1/sessions/{ids[0]}/generate", max_tokens=60, seed=4)
    text = whole["text"]
    stop = next(text[i : i + 2] for i in range(15, 58) if text[i : i + 2].isascii())
    found = post(client, f"/v1/sessions/{ids[1]}/generate", max_tokens=60, seed=4, stop=stop)
    assert found["text"] == text[: text.index(stop)]
    assert found["finish_reason"] == "stop"
    assert found["tokens"] == whole["tokens"][: len(found["tokens"])]
    info = client.get(f"/v1/sessions/{ids[1]}").json()
    assert info["position"] == found["position"] == found["start"] + len(found["tokens"])
    post(client, f"/v1/sessions/{ids[2]}/append", tokens=found["tokens"])
    a, b = (post(client, f"/v1/sessions/{i}/score", text="next") for i in ids[1:])
    assert (a["nll"], a["frozen_nll"]) == pytest.approx((b["nll"], b["frozen_nll"]), abs=1e-5)
    listed = [found["id"] for found in client.get("/v1/sessions").json()["data"]]
    assert set(ids) <= set(listed)
    assert len(listed) == len(set(listed))


def test_a_streamed_continuation_is_the_same(client: TestClient) -> None:
    a, b = (session(client, TEXT) for _ in range(2))
    whole = post(client, f"/v1/sessions/{a}/generate", max_tokens=15, seed=4, logprobs=2)
    found = events(
        client.post(f"/v1/sessions/{b}/generate", json={"max_tokens": 15, "seed": 4, "logprobs": 2, "stream": True})
    )
    name, done = found.pop()
    assert name == "done"
    for key in ("text", "tokens", "finish_reason", "position", "logprobs"):
        assert done[key] == whole[key]
    assert "".join(data["text"] for _, data in found) == whole["text"]
    assert [t for _, data in found for t in data["tokens"]] == whole["tokens"]


def test_a_session_that_has_read_nothing_begins_a_text(client: TestClient) -> None:
    one = session(client)
    assert post(client, f"/v1/sessions/{one}/generate", max_tokens=3, seed=0)["start"] == 1
    assert client.get(f"/v1/sessions/{one}").json()["position"] == 4


def test_forks_go_their_own_ways(client: TestClient) -> None:
    one = session(client, TEXT, label="first")
    fork = post(client, f"/v1/sessions/{one}/fork", 201)
    assert (fork["label"], fork["position"]) == ("first", 1 + len(TEXT))
    post(client, f"/v1/sessions/{fork['id']}/append", text="another way")
    assert client.get(f"/v1/sessions/{one}").json()["position"] == 1 + len(TEXT)
    found = post(client, "/v1/sessions/compare", sessions=[one, fork["id"]], text="so", bin=1)
    assert [reading["session"] for reading in found["readings"]] == [one, fork["id"]]
    assert found["difference"] == pytest.approx(found["readings"][0]["nll"] - found["readings"][1]["nll"])
    assert found["difference"] != 0
    assert found["readings"][0]["bins"]["nll"] == pytest.approx(direct("so", before=TEXT), abs=1e-5)


def test_a_session_can_be_renamed_frozen_and_deleted(client: TestClient) -> None:
    one = session(client, TEXT)
    assert client.patch(f"/v1/sessions/{one}", json={"label": "new"}).json()["label"] == "new"
    assert client.patch(f"/v1/sessions/{one}", json={"learn": False}).json()["learn"] is False
    drift = client.get(f"/v1/sessions/{one}").json()["drift"]
    assert post(client, f"/v1/sessions/{one}/append", text=TEXT)["steps"] == 0
    assert client.get(f"/v1/sessions/{one}").json()["drift"] == drift
    assert client.delete(f"/v1/sessions/{one}").json() == {"id": one, "object": "session", "deleted": True}
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/fork"), ("GET", "/file"), ("POST", "/save")):
        assert client.request(method, f"/v1/sessions/{one}{path}").status_code == 404


def test_a_downloaded_session_comes_back_exactly(client: TestClient, tmp_path: Path) -> None:
    one = session(client, TEXT)
    answer = client.get(f"/v1/sessions/{one}/file")
    assert answer.headers["content-disposition"].startswith("attachment")
    (tmp_path / "session").write_bytes(answer.content)
    reader = Session.restore(tmp_path / "session", make_model())
    assert reader.position == 1 + len(TEXT)
    back = client.post("/v1/sessions/restore", params={"label": "back"}, content=answer.content)
    assert back.status_code == 201
    assert (back.json()["label"], back.json()["position"]) == ("back", 1 + len(TEXT))
    a, b = (post(client, f"/v1/sessions/{i}/score", text="next", bin=1)["bins"] for i in (one, back.json()["id"]))
    assert a == b
    assert torch.allclose(reader.read(list(b"next")), torch.tensor(a["nll"]), atol=1e-5)
    assert post(client, f"/v1/sessions/{one}/save")["position"] == 1 + len(TEXT)


def test_losses_are_finite_json(client: TestClient) -> None:
    one = session(client)
    answer = client.post(f"/v1/sessions/{one}/append", json={"tokens": [BOS], "bin": 1})
    assert "NaN" not in answer.text
    found = answer.json()
    assert (found["nll"], found["bins"]["nll"], found["position"]) == (None, [None], 1)
    empty = post(client, f"/v1/sessions/{one}/append", text="")
    assert (empty["tokens"], empty["nll"], math.isfinite(empty["tokens_per_second"])) == (0, None, True)


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("append", {}, "neither text nor tokens is given; give one of the two"),
        ("append", {"text": "a", "tokens": [1]}, "text and tokens are both given; give one of the two"),
        ("append", {"tokens": [1.5]}, "tokens"),
        ("append", {"tokens": [True]}, "tokens"),
        ("append", {"tokens": [-1]}, "tokens"),
        ("append", {"tokens": [300]}, "token id 300"),
        ("append", {"text": "a", "expected_position": -1}, "expected_position"),
        ("append", {"text": "a", "bin": 0}, "bin is 0; it must be at least 1"),
        ("generate", {"max_tokens": -1}, "max_tokens"),
        ("generate", {"seed": 2**70}, "seed"),
        ("generate", {"top_p": 0}, "top_p"),
    ],
)
def test_a_wrong_request_changes_nothing(client: TestClient, path: str, body: dict[str, Any], words: str) -> None:
    one = session(client, TEXT)
    before = client.get(f"/v1/sessions/{one}").json()["position"]
    error = post(client, f"/v1/sessions/{one}/{path}", 400, **body)["error"]
    assert words in f"{error['param']} {error['message']}"
    assert client.get(f"/v1/sessions/{one}").json()["position"] == before


def test_losses_stay_with_a_session_and_its_forks(client: TestClient) -> None:
    one = session(client, compare=True)
    whole = post(client, f"/v1/sessions/{one}/append", text=TEXT, bin=1)
    kept = client.get(f"/v1/sessions/{one}/losses").json()
    assert kept["session"] == one
    for name in ("start", "tokens"):
        assert kept[name] == whole["bins"][name]
    for name in ("nll", "frozen_nll"):
        assert kept[name][0] is None
        assert kept[name][1:] == pytest.approx(whole["bins"][name][1:], abs=1e-6)
    assert kept["scored"] == [0] + [1] * len(TEXT)
    count = 0
    for stop in (None, "not in there"):
        for seed in range(9):
            count += len(post(client, f"/v1/sessions/{one}/generate", max_tokens=3, seed=seed, stop=stop)["tokens"])
            kept = client.get(f"/v1/sessions/{one}/losses").json()
            assert sum(kept["written"]) == count
            assert sum(kept["scored"]) == len(TEXT)
            assert kept["frozen_nll"][-1] is None or not kept["written"][-1]
    assert count > 18
    fork = post(client, f"/v1/sessions/{one}/fork", 201)["id"]
    post(client, f"/v1/sessions/{fork}/append", text="x" * 400)
    longer = client.get(f"/v1/sessions/{fork}/losses").json()
    assert sum(longer["tokens"]) == 1 + len(TEXT) + count + 400
    assert len(longer["start"]) <= 512
    assert len(longer["frozen_nll"]) == len(longer["start"])
    assert client.get("/v1/sessions/nobody/losses").status_code == 404


def test_forks_know_their_origin(client: TestClient) -> None:
    one = session(client, TEXT, compare=True)
    assert client.get(f"/v1/sessions/{one}").json()["parent"] is None
    fork = post(client, f"/v1/sessions/{one}/fork", 201, label="a branch")
    assert fork["parent"] == one
    renamed = client.patch(f"/v1/sessions/{fork['id']}", json={"label": "renamed"}).json()
    assert (renamed["parent"], renamed["compare"]) == (one, True)
    client.delete(f"/v1/sessions/{one}")
    assert client.get(f"/v1/sessions/{fork['id']}").json()["parent"] == one


@pytest.mark.parametrize("keys", [False, True])
def test_a_lost_session_of_nobody_knows_whom_is_told_of_where_all_are_one(keys: bool, tmp_path: Path) -> None:
    headers = bearer(ALICE) if keys else {}
    with serving(tmp_path, keys=keys) as client:
        client.headers.update(headers)
        one = session(client, TEXT)
    (tmp_path / "sessions" / one / "session.db").write_text("no database")
    with serving(tmp_path, keys=keys) as client:
        client.headers.update(headers)
        lost = client.get("/v1/sessions").json()["lost"]
    assert [entry["id"] for entry in lost] == ([] if keys else [one])
