"""Who comes in, and with how much: keys, tenants, limits, hostile hosts and hostile files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from safetensors.torch import save_file

from longread.config import UserError
from longread.engine import Limits
from longread.server import Keys, ServerLimits, read_keys, tenants
from longread.server.running import listen
from tests.disk import Disk, refusing
from tests.held import Held
from tests.server import ALICE, BOB, TEXT, bearer, post, serving, session


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with serving(tmp_path_factory.mktemp("sessions"), keys=True) as client:
        yield client


def routes(client: TestClient) -> list[tuple[str, str]]:
    paths = client.get("/openapi.json", headers=bearer(ALICE)).json()["paths"]
    return [(method.upper(), path) for path, methods in paths.items() for method in methods]


def test_every_route_but_health_wants_a_key(guarded: TestClient) -> None:
    found = routes(guarded)
    assert len(found) > 20
    for method, path in [*found, ("GET", "/openapi.json"), ("GET", "/nothing"), ("OPTIONS", "/v1/models")]:
        for headers in ({}, bearer("wrong-wrong-wrong-wrong"), {"Authorization": ALICE}, {"Authorization": "Bearer"}):
            answer = guarded.request(method, path.replace("{", "").replace("}", ""), headers=headers)
            assert answer.status_code == (200 if path == "/health" else 401), path
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("keys", [True, False])
def test_metrics_can_have_keys_of_their_own(tmp_path: Path, keys: bool) -> None:
    scraper = "scraper-scraper-scraper"
    with serving(tmp_path, keys=keys, metrics_keys=[("alice", scraper)]) as client:
        for method in ("GET", "HEAD"):
            answer = client.request(method, "/metrics", headers=bearer(scraper))
            assert answer.status_code == 200
        for headers in ({}, bearer(ALICE), bearer("wrong-wrong-wrong-wrong")):
            refused = client.get("/metrics", headers=headers)
            assert refused.status_code == 401
            assert "key of /metrics" in refused.json()["error"]["message"]
        assert client.get("/v1/sessions", headers=bearer(scraper)).status_code == (401 if keys else 200)
        assert client.get("/v1/sessions", headers=bearer(ALICE)).status_code == 200


def test_tenants_cannot_see_each_other(guarded: TestClient) -> None:
    made = guarded.post("/v1/sessions", json={"label": "secret", "compare": True}, headers=bearer(ALICE)).json()
    one = made["id"]
    guarded.post(f"/v1/sessions/{one}/append", json={"text": "the secret is 4711"}, headers=bearer(ALICE))
    bodies: dict[str, Any] = {
        "/append": {"text": "x"},
        "/score": {"text": "x"},
        "/generate": {"max_tokens": 1},
        "/append/file": None,
    }
    for method, path in routes(guarded):
        if "{session}" not in path:
            continue
        end = path.partition("{session}")[2]
        body = {"json": bodies.get(end, {})} if bodies.get(end, {}) is not None else {"content": b"x"}
        answer = guarded.request(method, path.replace("{session}", one), headers=bearer(BOB), **body)  # type: ignore[arg-type]
        unknown = guarded.request(method, path.replace("{session}", "0" * 32), headers=bearer(BOB), **body)  # type: ignore[arg-type]
        assert (answer.status_code, answer.json()) == (404, unknown.json()), path
    mine = guarded.post("/v1/sessions", headers=bearer(BOB)).json()["id"]
    compare = {"sessions": [mine, one], "text": "x"}
    assert guarded.post("/v1/sessions/compare", json=compare, headers=bearer(BOB)).status_code == 404
    assert [s["id"] for s in guarded.get("/v1/sessions", headers=bearer(BOB)).json()["data"]] == [mine]
    assert guarded.get(f"/v1/sessions/{one}", headers=bearer(ALICE)).json()["position"] == 19


def test_a_twin_is_no_session(guarded: TestClient) -> None:
    one = guarded.post("/v1/sessions", json={"compare": True}, headers=bearer(ALICE)).json()["id"]
    engine = guarded.app.state.service.engine  # type: ignore[attr-defined]
    hidden = [info.id for info in engine.sessions("alice") if 'hidden": true' in info.label]
    assert hidden
    for twin in hidden:
        assert guarded.get(f"/v1/sessions/{twin}", headers=bearer(ALICE)).status_code == 404
    count = len(engine.sessions("alice"))
    guarded.delete(f"/v1/sessions/{one}", headers=bearer(ALICE))
    assert len(engine.sessions("alice")) == count - 2


def test_a_secret_leaks_into_no_other_session(guarded: TestClient) -> None:
    """What one tenant's sessions read does not move the last bit of another's."""

    def score(text: str) -> Any:
        one = guarded.post("/v1/sessions", headers=bearer(BOB)).json()["id"]
        guarded.post(f"/v1/sessions/{one}/append", json={"text": "public"}, headers=bearer(BOB))
        answer = guarded.post(f"/v1/sessions/{one}/score", json={"text": text, "bin": 1}, headers=bearer(BOB))
        return answer.json()["bins"]

    before = score("the secret is 4711")
    one = guarded.post("/v1/sessions", headers=bearer(ALICE)).json()["id"]
    guarded.post(f"/v1/sessions/{one}/append", json={"text": "the secret is 4711. " * 30}, headers=bearer(ALICE))
    assert score("the secret is 4711") == before


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "127.0.0.1"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": "localhost:8000", "Origin": "http://localhost:8000"}, 200),
        ({"Host": "localhost:8000", "Origin": "http://evil.example"}, 403),
        ({"Host": "localhost:8000", "Origin": "null"}, 403),
    ],
)
def test_without_keys_only_this_machine_is_answered(tmp_path: Path, headers: dict[str, str], status: int) -> None:
    with serving(tmp_path) as client:
        assert client.get("/v1/models", headers=headers).status_code == status


def test_without_keys_there_is_no_public_address() -> None:
    for host in ("0.0.0.0", "::"):
        with pytest.raises(UserError, match="there are no keys"):
            listen(host, 0, has_keys=False)
    listen("0.0.0.0", 0, has_keys=True).close()
    with listen("127.0.0.1", 0, has_keys=False) as listener, pytest.raises(UserError, match="cannot listen"):
        listen("127.0.0.1", listener.getsockname()[1], has_keys=False)


def test_keys_come_from_a_private_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.touch(mode=0o600)
    file.write_text(f"# keys\n\nalice {ALICE}\nalice {BOB}\n")
    found = read_keys(file)
    assert (found.tenant(ALICE), found.tenant(BOB), found.tenant("else")) == ("alice", "alice", None)
    for text, words in (
        ("alice\n", "line 1"),
        ("alice short\n", "not usable"),
        ("a/b " + ALICE, "no name"),
        ("", "has no keys"),
        ("\udcff", "is not UTF-8 text; write lines of a tenant and a key"),
        (f"a {ALICE}\nb {ALICE}", "twice"),
    ):
        file.write_text(text, errors="surrogateescape")
        with pytest.raises(UserError, match=words):
            read_keys(file)
    file.chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        read_keys(file)
    with pytest.raises(UserError, match="cannot read"):
        read_keys(tmp_path / "none")
    assert ALICE not in repr(vars(Keys([("alice", ALICE)])))


def test_a_key_is_compared_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose hash differs in a single byte, wherever that is, opens nothing."""
    assert tenants._hashed(ALICE) == hashlib.sha256(ALICE.encode()).digest()
    known = bytes(range(32))
    hashes = {ALICE: known} | {f"key {i}": known[:i] + b"\xff" + known[i + 1 :] for i in range(32)}
    hashes |= {"first half": known[:16], "first byte": known[:1], "longer": known + b"\0", "none": b""}
    monkeypatch.setattr(tenants, "_hashed", hashes.__getitem__)
    opened = [key for key in hashes if Keys([("alice", ALICE)]).tenant(key) is not None]
    assert opened == [ALICE]


def test_a_body_may_be_so_long(tmp_path: Path) -> None:
    with serving(tmp_path, limits=ServerLimits(body_bytes=1000, session_file_bytes=2000)) as client:
        one = session(client)
        for answer in (
            client.post("/v1/completions", json={"model": "tiny", "prompt": "x" * 1000}),
            client.post(f"/v1/sessions/{one}/append/file", content=(b"x" * 100 for _ in range(11))),
            client.post("/v1/sessions/restore", content=b"x" * 2001),
            client.post("/v1/sessions/restore", content=(b"x" * 100 for _ in range(21))),
        ):
            assert answer.status_code == 413
            assert "longer than" in answer.json()["error"]["message"]
        assert client.post(f"/v1/sessions/{one}/append/file", content=b"x" * 1000).status_code == 200
        assert list((tmp_path / "passing").iterdir()) == []


def test_a_request_may_cost_so_many_tokens(tmp_path: Path) -> None:
    with serving(tmp_path, limits=ServerLimits(tokens=100)) as client:
        one = session(client)
        post(client, f"/v1/sessions/{one}/append", 413, tokens=[1] * 101)
        post(client, f"/v1/sessions/{one}/append", tokens=[1] * 100)
        post(client, f"/v1/sessions/{one}/generate", 413, max_tokens=101)
        for body in (
            {"prompt": "x", "max_tokens": 99},
            {"prompt": ["x"] * 5, "max_tokens": 16, "n": 2},
            {"prompt": "x", "logprobs": 5},
        ):
            assert client.post("/v1/completions", json={"model": "tiny", **body}).status_code == 413


def test_a_tenant_may_have_so_many_sessions(tmp_path: Path) -> None:
    with serving(tmp_path, keys=True, limits=ServerLimits(sessions=3)) as client:
        made = [client.post("/v1/sessions", headers=bearer(ALICE)) for _ in range(4)]
        assert [answer.status_code for answer in made] == [201, 201, 201, 429]
        assert int(made[3].headers["retry-after"]) >= 1
        assert made[3].json()["error"]["code"] == "insufficient_quota"
        one = made[0].json()["id"]
        assert client.post(f"/v1/sessions/{one}/fork", headers=bearer(ALICE)).status_code == 429
        assert client.post("/v1/sessions", json={"compare": True}, headers=bearer(BOB)).status_code == 201
        client.delete(f"/v1/sessions/{one}", headers=bearer(ALICE))
        assert client.post("/v1/sessions", headers=bearer(ALICE)).status_code == 201


def test_a_tenant_may_have_so_many_bytes(tmp_path: Path) -> None:
    with serving(tmp_path, limits=ServerLimits(tenant_bytes=1)) as client:
        assert client.post("/v1/sessions").status_code == 201
        assert client.post("/v1/sessions").status_code == 429


def test_the_engine_may_be_full(tmp_path: Path) -> None:
    with serving(tmp_path, engine_limits=Limits(max_sessions=1)) as client:
        one = session(client)
        answer = client.post("/v1/sessions")
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert client.get(f"/v1/sessions/{one}").status_code == 200


def test_requests_may_come_so_often(tmp_path: Path) -> None:
    with serving(tmp_path, keys=True, limits=ServerLimits(per_minute=5)) as client:
        answers = [client.get("/v1/models", headers=bearer(ALICE)) for _ in range(7)]
        assert [answer.status_code for answer in answers] == [200] * 5 + [429] * 2
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 12
        assert answers[-1].json()["error"]["type"] == "rate_limit_error"
        assert client.get("/v1/models", headers=bearer(BOB)).status_code == 200
        assert client.get("/health").status_code == 200


def test_so_many_requests_may_be_under_way(tmp_path: Path) -> None:
    with serving(tmp_path, limits=ServerLimits(concurrent=1)) as client, ThreadPoolExecutor(1) as pool:
        one, service = session(client), client.app.state.service  # type: ignore[attr-defined]
        service.encode = held = Held(service.encode)
        busy = pool.submit(client.post, f"/v1/sessions/{one}/append", json={"text": TEXT})
        assert held.entered.wait(60)
        refused = client.get("/v1/models")
        held.go()
        assert busy.result(60).status_code == 200
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert client.get("/v1/models").status_code == 200


def test_limits_are_positive() -> None:
    for wrong in (0, -1, float("inf"), float("nan")):
        with pytest.raises(UserError, match="seconds is"):
            ServerLimits(seconds=wrong)


def test_while_it_stops_it_says_when_to_come_back(tmp_path: Path) -> None:
    with serving(tmp_path) as client:
        client.app.state.service.stopping = True  # type: ignore[attr-defined]
        for path in ("/ready", "/v1/models"):
            answer = client.get(path)
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1
        assert client.get("/health").status_code == 200


def test_the_page_is_open_and_nothing_else_is(guarded: TestClient) -> None:
    for path in (
        "/page/../app.py",
        "/page/..%2fapp.py",
        "/page/%2e%2e/app.py",
        "/page//etc/passwd",
        "/page/none.js",
    ):
        assert guarded.get(path).status_code in (401, 404), path
    for path, kind in (("/", "text/html"), ("/page/index.html", "text/html"), ("/page/app.js", "text/javascript")):
        answer = guarded.get(path)
        assert (answer.status_code, answer.headers["content-type"]) == (200, f"{kind}; charset=utf-8")
        assert "script-src 'self'" in answer.headers["content-security-policy"]
    for path in ("/page/none.js", "/v1/models"):
        headers = guarded.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
    assert guarded.get("/v1/models").headers["cache-control"] == "no-store"


def hostile_files(good: bytes, tmp_path: Path) -> Iterator[tuple[str, bytes]]:
    """Session files that somebody might send instead of a good one."""
    size = int.from_bytes(good[:8], "little")
    yield "empty", b""
    yield "truncated", good[: len(good) // 2]
    yield "without its last byte", good[:-1]
    yield "longer", good + b"\0"
    for place in (9, 8 + size // 2, 8 + size + 1, len(good) - 1):
        yield f"changed at {place}", good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :]
    yield "a huge header", (2**62).to_bytes(8, "little") + good[8:]
    yield "a pickle", b"\x80\x04\x95" + bytes(100)
    yield "a zip", b"PK\x03\x04" + bytes(100)
    yield "text", b"../../etc/passwd"
    save_file({"../../evil": torch.zeros(3)}, tmp_path / "foreign")
    yield "foreign", (tmp_path / "foreign").read_bytes()
    header = good[8 : 8 + size].replace(b'"F32"', b'"F64"', 1)
    yield "other types", good[:8] + header + good[8 + size :]


def test_hostile_session_files_are_refused(tmp_path: Path) -> None:
    with serving(tmp_path / "server") as client:
        one = session(client, TEXT)
        good = client.get(f"/v1/sessions/{one}/file").content
        for name, content in hostile_files(good, tmp_path):
            answer = client.post("/v1/sessions/restore", content=content)
            assert answer.status_code == 400, name
            message = answer.json()["error"]["message"]
            assert message.startswith("the file "), message
            assert message.endswith("; send one that GET /v1/sessions/{id}/file of a server with this model gave")
            assert message.count(";") == 1
            assert not any(word in message for word in (str(tmp_path), "passing", "upload")), message
        assert [s["id"] for s in client.get("/v1/sessions").json()["data"]] == [one]
        assert list((tmp_path / "server" / "passing").iterdir()) == []
        assert client.post("/v1/sessions/restore", content=good).status_code == 201


def test_no_answer_says_where_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even of a directory that was given as a relative path, and whose name has a space in it."""
    monkeypatch.chdir(tmp_path)
    place = Path("my sessions")
    with serving(place) as client:
        one = session(client, TEXT)
        engine = client.app.state.service.engine  # type: ignore[attr-defined]
        where = engine.directory / "sessions" / one / "snapshot-1.safetensors"
        for error in (UserError(f"{where} is damaged: x; restore it"), UserError(f"cannot read {where}: Input/output")):

            def fail(*_: object, error: UserError = error, **__: object) -> None:
                raise error

            with monkeypatch.context() as patch:
                patch.setattr(engine, "fork", fail)
                answer = client.post(f"/v1/sessions/{one}/fork").text
                patch.setattr(engine, "score", fail)
                stream = client.post(f"/v1/sessions/{one}/score", json={"text": "x", "stream": True}).text
            for text in (answer, stream):
                assert not any(word in text for word in ("my ", one, "snapshot", str(tmp_path))), text
                assert "the file is damaged: x" in text or "cannot read the file: Input/output" in text
        content = client.get(f"/v1/sessions/{one}/file").content
        assert "my " not in client.post("/v1/sessions/restore", content=content[:-1]).text
    for path in place.glob("sessions/*/snapshot-*"):
        path.write_bytes(path.read_bytes()[:-1])
    with serving(place) as client:
        (lost,) = client.get("/v1/sessions").json()["lost"]
        assert lost["reason"].startswith("the file is truncated: ")


def test_ids_are_looked_up_and_are_no_paths(guarded: TestClient) -> None:
    for one in ("..", "%2e%2e%2f%2e%2e%2fetc", "a" * 10_000, "%00", "'; drop", "\N{SNOWMAN}"):
        assert guarded.get(f"/v1/sessions/{one}", headers=bearer(ALICE)).status_code in (200, 404)
        answer = guarded.get(f"/v1/sessions/{one}/file", headers=bearer(ALICE))
        assert answer.status_code == 404


def test_errors_inside_say_nothing_of_the_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path) as client:

        def fail(*_: object) -> None:
            raise RuntimeError("the inside")

        monkeypatch.setattr(client.app.state.service.engine, "sessions", fail)  # type: ignore[attr-defined]
        answer = client.get("/v1/sessions")
        assert answer.status_code == 500
        assert "the inside" not in answer.text
        assert answer.json()["error"]["type"] == "server_error"


def test_a_full_disk_is_no_fault_of_the_client(tmp_path: Path, disk: Disk) -> None:
    with serving(tmp_path / "server") as client:
        one = session(client, TEXT)
        usual, disk.hook = disk.hook, refusing()
        for method, path, body in (("POST", "/append", {"text": "more"}), ("POST", "/save", None)):
            answer = client.request(method, f"/v1/sessions/{one}{path}", json=body)
            assert answer.status_code == 503, answer.text
            assert answer.headers["retry-after"] == "60"
            assert str(tmp_path) not in answer.text
        answer = client.patch(f"/v1/sessions/{one}", json={"label": "lost later", "learn": False})
        assert answer.status_code == 503, answer.text
        shown = client.get(f"/v1/sessions/{one}").json()
        assert (shown["label"], shown["learn"]) == ("", True)
        disk.hook = usual
        assert client.get(f"/v1/sessions/{one}").json()["position"] == 1 + len(TEXT)
        assert post(client, f"/v1/sessions/{one}/append", text="more")["start"] == 1 + len(TEXT)


def test_what_is_lost_is_said_to_whom_it_belonged(tmp_path: Path) -> None:
    with serving(tmp_path, keys=True) as client:
        made = client.post("/v1/sessions", headers=bearer(ALICE)).json()["id"]
        body = {"text": TEXT}
        client.post(f"/v1/sessions/{made}/append", json=body, headers=bearer(ALICE)).raise_for_status()
        kept = client.post("/v1/sessions", headers=bearer(ALICE)).json()["id"]
    files = [path for path in tmp_path.rglob("*.safetensors") if made in str(path)]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[:-20] + bytes(10))
    with serving(tmp_path, keys=True) as client:
        client.get(f"/v1/sessions/{made}", headers=bearer(ALICE))
        client.post(f"/v1/sessions/{made}/score", json={"text": "x"}, headers=bearer(ALICE))
        lost = client.get("/v1/sessions", headers=bearer(ALICE)).json()
        assert [entry["id"] for entry in lost["lost"]] == [made]
        assert str(tmp_path) not in str(lost)
        assert kept in [entry["id"] for entry in lost["data"]]
        assert client.get("/v1/sessions", headers=bearer(BOB)).json()["lost"] == []
