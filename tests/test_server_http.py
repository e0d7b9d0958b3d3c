"""HTTP itself: what heads, headers, queries and bodies may look like, and what is made of the others."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import httpx2
import pytest

from tests.server import TEXT, Listening

TEXT_A = b'{"text":"a"}'
CHUNKED = b"c\r\n%s\r\n0\r\n\r\n" % TEXT_A
JSON = b"Content-Type: application/json"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Listening]:
    with Listening(tmp_path_factory.mktemp("sessions")) as server:
        yield server


@pytest.fixture(scope="module")
def one(server: Listening) -> str:
    one: str = server.client.post("/v1/sessions").json()["id"]
    server.client.post(f"/v1/sessions/{one}/append", json={"text": TEXT})
    return one


def asked(server: Listening, line: bytes, *headers: bytes, body: bytes = b"", goes_on: bool = False) -> bytes:
    host = [] if any(header.lower().startswith(b"host:") for header in headers) else [b"Host: localhost"]
    lines = [line + b" HTTP/1.1", *host, *headers, *([] if goes_on else [b"Connection: close"])]
    return server.raw(b"\r\n".join(lines) + b"\r\n\r\n" + body)


def status(answer: bytes) -> int:
    return int(answer.split(b" ")[1])


def test_every_route_that_is_read_answers_head(server: Listening, one: str) -> None:
    paths = server.client.get("/openapi.json").json()["paths"]
    read = [path for path, methods in paths.items() if "get" in methods]
    body = {"items": [{"role": "user", "content": "Who?"}]}
    responses = {"conversation": server.client.post("/v1/conversations", json=body).json()["id"]}
    items = server.client.get(f"/v1/conversations/{responses['conversation']}/items").json()
    responses["item"] = items["first_id"]
    body = {"input": "Who?", "max_output_tokens": 1}
    responses["response"] = server.client.post("/v1/responses", json=body).json()["id"]
    assert len(read) > 7
    kept = {"session": one, "model": "tiny", **responses}
    for path in [*read, "/", "/page/index.html"]:
        url = path.format(**kept).encode()
        answer = asked(server, b"HEAD " + url)
        assert status(answer) == 200, path
        assert answer.endswith(b"\r\n\r\n"), path
    assert status(asked(server, b"HEAD /v1/completions")) == 405
    metrics = server.client.get("/metrics").text
    assert 'longread_requests_total{method="HEAD",route="/health",status="200"}' in metrics


@pytest.mark.parametrize(
    "content_type", ["application/x-www-form-urlencoded", "text/plain", "", "nonsense", "text/json"]
)
@pytest.mark.parametrize("path", ["/tokenize", "/v1/completions", "/v1/chat/completions", "/v1/sessions"])
def test_json_is_declared_as_json(server: Listening, path: str, content_type: str) -> None:
    answer = server.client.post(path, content=TEXT_A, headers={"content-type": content_type})
    assert answer.status_code == 415
    message = answer.json()["error"]["message"]
    assert message == "the body is not declared as JSON; send it with Content-Type: application/json"


@pytest.mark.parametrize("kind", [b"application/json", b"APPLICATION/JSON; charset=utf-8", b"application/vnd.x+json"])
def test_json_may_be_declared_in_several_ways(server: Listening, kind: bytes) -> None:
    body = [b"Content-Type: " + kind, b"Content-Length: 12"]
    assert status(asked(server, b"POST /tokenize", *body, body=TEXT_A)) == 200


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([b"Origin: http://localhost"], 200),
        ([b"Host: LOCALHOST:80", b"Origin: http://LOCALHOST:80"], 200),
        ([b"Host: [::1]:8000", b"Origin: http://[::1]:8000"], 200),
        ([b"Host: 127.0.0.1"], 200),
        ([b"Origin: http://["], 403),
        ([b"Origin: null"], 403),
        ([b"Origin: "], 403),
        ([b"Origin: //localhost"], 403),
        ([b"Origin: http://localhost@evil"], 403),
        ([b"Origin: http://localhost:81"], 403),
        ([b"Origin: http://\xff"], 403),
        ([b"Host: ["], 403),
        ([b"Host: "], 403),
        ([b"Host: evil"], 403),
        ([b"Host: localhost:999999"], 403),
        ([b"Host: evil@localhost"], 403),
        ([b"Host: localhost.evil"], 403),
        ([b"Host: localhost\xb9"], 403),
        ([b"Host: localhost", b"Host: localhost"], 400),
        ([b"Origin: http://localhost", b"Origin: http://evil"], 400),
        ([b"Authorization: Bearer a", b"Authorization: Bearer b"], 400),
        ([b"If-None-Match: *", b"If-Modified-Since: never", b"Range: bytes=0-1"], 200),
    ],
)
def test_headers_that_are_decided_by(server: Listening, headers: list[bytes], expected: int) -> None:
    answer = asked(server, b"GET /v1/models", *headers)
    assert status(answer) == expected
    if expected != 200:
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]


@pytest.mark.parametrize(
    ("headers", "body", "expected"),
    [
        ([b"Content-Length: 12"], TEXT_A, 200),
        ([b"Transfer-Encoding: chunked"], CHUNKED, 200),
        ([b"Content-Length: 12", b"Transfer-Encoding: chunked"], CHUNKED, 400),
        ([b"Transfer-Encoding: chunked", b"Content-Length: 0"], CHUNKED, 400),
        ([b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"], CHUNKED, 400),
        ([b"Transfer-Encoding: gzip, chunked"], CHUNKED, 400),
        ([b"Transfer-Encoding: identity", b"Content-Length: 12"], TEXT_A, 400),
        ([b"Transfer-Encoding: chunked"], b"zz\r\n" + CHUNKED, 400),
        ([b"Content-Length: 12", b"Content-Length: 13"], TEXT_A, 400),
        ([b"Content-Length: +12"], TEXT_A, 400),
        ([b"Content-Length: 0x0c"], TEXT_A, 400),
        ([b"Content-Length: -1"], TEXT_A, 400),
        ([b"Content-Length : 12"], TEXT_A, 400),
        ([b"Content-Length: 12", b"Content-Encoding: gzip"], TEXT_A, 415),
        ([b"Content-Length: 12", JSON], TEXT_A, 400),
    ],
)
def test_how_long_a_request_is(server: Listening, headers: list[bytes], body: bytes, expected: int) -> None:
    """A request whose end is in doubt ends its connection: what follows it is answered by nobody."""
    smuggled = b"POST /smuggled HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    answer = asked(server, b"POST /tokenize", JSON, *headers, body=body + smuggled, goes_on=True)
    assert status(answer) == expected
    assert answer.count(b"HTTP/1.1 404") == (1 if expected == 200 else 0)
    if expected != 200:
        assert b"\r\nconnection: close\r\n" in answer.lower()
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


def test_chunks_of_http_1_0_are_refused(server: Listening) -> None:
    head = b"POST /tokenize HTTP/1.0\r\nHost: localhost\r\n%s\r\nTransfer-Encoding: chunked\r\n\r\n" % JSON
    assert status(server.raw(head + CHUNKED)) == 400


@pytest.mark.parametrize(
    "head",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
        b"GET /health\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"G\xffT / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\0b\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_no_http_is_answered_as_every_error(server: Listening, head: bytes) -> None:
    answer = server.raw(head)
    assert status(answer) == 400
    assert b"content-type: application/json" in answer
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert error["message"] == "this is no HTTP/1.1 request; send it with an HTTP client"


@pytest.mark.parametrize(
    ("method", "path", "words"),
    [
        ("GET", "?limit=5", "there is no query parameter 'limit' here; there are none"),
        ("POST", "/{one}/append?bin=1", "there is no query parameter 'bin' here; there are none"),
        ("POST", "/{one}/append/file?bin=1&bin=2", "the query parameter bin is given 2 times"),
        ("POST", "/{one}/append/file?expected_positon=1", "there are expected_position, skip, bin, stream"),
        ("POST", "/{one}/append/file?bin=%D9%A1", "it must be a whole number"),
        ("POST", "/{one}/append/file?stream=perhaps", "it must be true or false"),
        ("POST", "/restore?label=%ff", "the query is not UTF-8"),
        ("POST", "/restore?%ff=x", "the query is not UTF-8"),
        ("POST", "/restore?=x", "there is no query parameter ''"),
    ],
)
def test_queries_are_as_strict_as_bodies(server: Listening, one: str, method: str, path: str, words: str) -> None:
    answer = server.client.request(method, "/v1/sessions" + path.format(one=one))
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_a_session_is_downloaded_whole(server: Listening, one: str) -> None:
    """Parts of two answers would be parts of two states."""
    url = f"/v1/sessions/{one}/file"
    whole = server.client.get(url)
    for value in ("bytes=0-9", "bytes=-1", "bytes=99999999-", "nonsense"):
        part = server.client.get(url, headers={"range": value})
        assert (part.status_code, part.headers["accept-ranges"]) == (200, "none")
        assert part.content == whole.content


def test_answers_do_not_wait_for_acknowledgements(server: Listening) -> None:
    """Else a small answer on a connection that goes on would wait for up to 40 ms."""
    with httpx2.Client(base_url=server.url) as client:
        client.get("/health")
        connections = list(server.server.server_state.connections)
        assert connections
        for connection in connections:
            own = connection.transport.get_extra_info("socket")
            assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
