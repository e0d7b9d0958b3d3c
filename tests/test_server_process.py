"""The server as a process: real clients, clients that stall or vanish, and a process that is stopped or killed."""

from __future__ import annotations

import builtins
import itertools
import json
import random
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import psutil
import pytest

from longread.checkpoint import save_model
from longread.cli import main
from longread.extras import install_command
from longread.session import Session
from longread.tokenizer import ByteTokenizer
from tests.server import ALICE, BOB, BOS, INNER, TEXT, Process, bearer, direct, make_model, until

SHORT_LIMITS = ("--limit", "stall_seconds=1", "--limit", "concurrent=8")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with Process(tmp_path_factory.mktemp("home"), *SHORT_LIMITS, keys=True) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Process) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=ALICE, max_retries=0)


def test_the_openai_client_completes(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    found = client.completions.create(
        model="tiny", prompt=TEXT, echo=True, logprobs=3, max_tokens=8, temperature=0, user="somebody"
    )
    choice = found.choices[0]
    assert choice.text.startswith(TEXT)
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    given = choice.logprobs.token_logprobs[: len(TEXT)]
    assert given == pytest.approx([-x for x in direct(TEXT)], abs=1e-5)
    assert found.usage is not None
    assert found.usage.total_tokens == 1 + len(TEXT) + 8
    chunks = list(
        client.completions.create(
            model="tiny", prompt=TEXT, max_tokens=8, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == choice.text[len(TEXT) :]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8


def test_the_openai_client_chats(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Who?"}],
        max_tokens=9,
        seed=3,
        logprobs=True,
        top_logprobs=2,
    )
    assert whole.choices[0].logprobs is not None
    assert whole.choices[0].logprobs.content is not None
    assert len(whole.choices[0].logprobs.content) == 9
    assert whole.choices[0].finish_reason == "length"
    stream = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Who?"}], max_completion_tokens=9, seed=3, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole.choices[0].message.content


def test_the_openai_client_understands_what_is_wrong(server: Process, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="tiny", prompt="x", temperature=-1)
    with pytest.raises(openai.AuthenticationError, match="API key"):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()


def test_a_harness_that_scores_prompts_of_tokens_finds_direct_scores(server: Process) -> None:
    """The requests that lm-eval's local-completions sends for loglikelihood tasks, and how it reads the answers."""
    tasks = [(f"Question {i}: what is {i}? Answer:".encode(), f" {i * i}.".encode()) for i in range(4)]
    reader = Session(make_model(), INNER)
    reader.read([BOS, *tasks[0][0]])
    tasks.append((tasks[0][0], bytes(list(reader.generate(6, temperature=0)))))  # one that is greedy
    prompts = [[BOS, *context, *answer] for context, answer in tasks]
    body = {
        "model": "tiny",
        "prompt": prompts,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1,
        "echo": True,
    }
    choices = sorted(server.client.post("/v1/completions", json=body).json()["choices"], key=lambda c: c["index"])
    found = []
    for (context, answer), choice in zip(tasks, choices, strict=True):
        logprobs = choice["logprobs"]["token_logprobs"][1 + len(context) : -1]
        likeliest = choice["logprobs"]["top_logprobs"][1 + len(context) : -1]
        reader = Session(make_model(), INNER)
        reader.read([BOS, *context])
        assert sum(logprobs) == pytest.approx(-reader.read(list(answer)).sum().item(), abs=1e-4)
        found.append(all(own == max(top.values()) for own, top in zip(logprobs, likeliest, strict=True)))
    assert found == [False] * 4 + [True]


def raw(server: Process, data: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=300)
    connection.sendall(data)
    return connection


def head(path: str, length: int, *, method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {ALICE}"]
    lines += ["Content-Type: application/json", f"Content-Length: {length}"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def under_way(server: Process) -> float:
    """Requests that the server is answering, this one left out."""
    lines = server.client.get("/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("longread_requests_under_way ")) - 1


def tasks(server: Process) -> float:
    lines = server.client.get("/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("longread_engine_tasks "))


def test_a_body_that_does_not_come_is_not_waited_for(server: Process) -> None:
    with raw(server, head("/v1/completions", 1000) + b'{"model"') as connection:
        assert b" 408 " in connection.recv(4096).splitlines()[0]
    assert until(lambda: under_way(server) == 0)


def test_a_client_that_takes_nothing_is_left(server: Process) -> None:
    body = json.dumps({"text": TEXT * 100, "stream": True, "bin": 1}).encode()
    one = server.client.post("/v1/sessions", json={"learn": False}).json()["id"]
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.port))
    with connection:
        connection.sendall(head(f"/v1/sessions/{one}/append", len(body)) + body)
        assert until(lambda: under_way(server) == 1)
        assert until(lambda: under_way(server) == 0)
    assert until(lambda: tasks(server) == 0)
    assert server.client.get(f"/v1/sessions/{one}").json()["position"] > 0


@pytest.mark.parametrize("path", ["/v1/completions", "generate", "score", "streamed append"])
def test_a_client_that_goes_ends_what_it_asked_for(server: Process, path: str) -> None:
    one = server.client.post("/v1/sessions").json()["id"]
    bodies = {
        "/v1/completions": {"model": "tiny", "prompt": "x", "max_tokens": 1_000_000, "temperature": 0},
        "generate": {"max_tokens": 1_000_000, "temperature": 0},
        "score": {"text": TEXT * 5000},
        "streamed append": {"text": TEXT * 5000, "stream": True},
    }
    body = json.dumps(bodies[path]).encode()
    url = path if path.startswith("/") else f"/v1/sessions/{one}/{path.split()[-1]}"
    with raw(server, head(url, len(body)) + body):
        assert until(lambda: tasks(server) >= 1)
    assert until(lambda: tasks(server) == 0 and under_way(server) == 0)
    position = server.client.get(f"/v1/sessions/{one}").json()["position"]
    assert position < 1 + 5000 * len(TEXT)
    answer = server.client.post(f"/v1/sessions/{one}/append", json={"text": "and on", "expected_position": position})
    assert answer.status_code == 200


def test_an_append_outlives_its_client(server: Process) -> None:
    one = server.client.post("/v1/sessions").json()["id"]
    request = {"text": TEXT * 20, "expected_position": 0}
    body = json.dumps(request).encode()
    with raw(server, head(f"/v1/sessions/{one}/append", len(body)) + body):
        assert until(lambda: tasks(server) or server.client.get(f"/v1/sessions/{one}").json()["position"])
    again = server.client.post(f"/v1/sessions/{one}/append", json=request)
    assert again.json()["position"] == 1 + 20 * len(TEXT)
    assert server.client.get(f"/v1/sessions/{one}").json()["position"] == 1 + 20 * len(TEXT)


def test_what_runs_can_be_cancelled(server: Process) -> None:
    one = server.client.post("/v1/sessions", json={"compare": True}).json()["id"]
    found: list[httpx2.Response] = []
    url = f"/v1/sessions/{one}/append"
    work = threading.Thread(target=lambda: found.append(server.client.post(url, json={"text": TEXT * 2000})))
    work.start()
    assert until(lambda: server.client.get(f"/v1/sessions/{one}").json()["position"] > 0)
    assert server.client.post(f"/v1/sessions/{one}/cancel").status_code == 200
    work.join()
    reading = found[0].json()
    assert reading["cancelled"] is True
    assert 0 < reading["tokens"] < 2000 * len(TEXT)
    assert server.client.get(f"/v1/sessions/{one}").json()["position"] == reading["position"]
    assert server.client.post(url, json={"text": "and on"}).json()["frozen_nll"] is not None


def test_garbage_does_no_harm(server: Process) -> None:
    for data in (
        b"\0" * 100,
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000,
        b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    ):
        with raw(server, data) as connection:
            connection.settimeout(5)
            assert b" 4" in (connection.recv(64) or b" 4")
    length = head("/v1/tokenize", 10).replace(b"Content-Length: 10", b"Content-Length: " + b"9" * 30)
    with raw(server, length) as connection:
        assert connection.recv(16).startswith(b"HTTP/1.1 4")
    assert server.client.get("/health").json() == {"status": "ok"}


def test_the_log_holds_no_secrets(server: Process) -> None:
    server.client.post("/v1/completions", json={"model": "tiny", "prompt": "the secret is 4711", "max_tokens": 1})
    log = "".join(server.log)
    assert not any(secret in log for secret in (ALICE, BOB, "4711"))
    assert "Traceback" not in log


@pytest.mark.parametrize("python", [(), pytest.param(("-O",), marks=pytest.mark.slow)], ids=str)
def test_a_graceful_stop_keeps_everything(python: tuple[str, ...], tmp_path: Path) -> None:
    """Also with assertions switched off: imports of a process that is begun so are compiled anew."""
    with Process(tmp_path) as server:
        one = server.client.post("/v1/sessions", json={"label": "kept", "compare": True}).json()["id"]
        server.client.post(f"/v1/sessions/{one}/append", json={"text": TEXT})
        before = server.client.post(f"/v1/sessions/{one}/score", json={"text": "next", "bin": 1}).json()
        file = server.client.get(f"/v1/sessions/{one}/file").content
        assert server.stop() == 0
        assert "Traceback" not in "".join(server.log)
    with Process(tmp_path, python=python) as server:
        info = server.client.get(f"/v1/sessions/{one}").json()
        assert (info["label"], info["compare"], info["position"]) == ("kept", True, 1 + len(TEXT))
        after = server.client.post(f"/v1/sessions/{one}/score", json={"text": "next", "bin": 1}).json()
        assert after["bins"] == before["bins"]
        assert server.client.get(f"/v1/sessions/{one}/file").content == file
        for wrong in (b"", file[:-1], b"\x80" + file[1:], bytes(len(file))):
            assert server.client.post("/v1/sessions/restore", content=wrong).status_code == 400
        refused = server.client.post(f"/v1/sessions/{one}/append", json={"tokens": [300]})
        assert refused.status_code == 400
        assert server.stop(signal.SIGINT) == 0


@pytest.mark.slow
def test_a_stop_in_the_midst_of_a_text(tmp_path: Path) -> None:
    """However far it came: the status is 0, the answer is true, and all that it speaks of is there afterwards."""
    with Process(tmp_path) as server:
        one = server.client.post("/v1/sessions").json()["id"]
        found: list[httpx2.Response] = []
        url, body = f"/v1/sessions/{one}/append", {"text": TEXT * 40}
        work = threading.Thread(target=lambda: found.append(server.client.post(url, json=body)))
        work.start()
        assert until(lambda: server.client.get(f"/v1/sessions/{one}").json()["position"] > 0)
        assert server.stop() == 0
        work.join()
        answer = found[0].json()
        assert found[0].status_code in (200, 503)
        position = answer["position"] if found[0].status_code == 200 else answer["error"]["position"]
        assert found[0].status_code == 503 or position == 1 + 40 * len(TEXT)
    with Process(tmp_path) as server:
        assert server.client.get(f"/v1/sessions/{one}").json()["position"] == position


def kill_and_restart(home: Path, rounds: int) -> None:
    """Kills the server during appends and continuations; whatever was acknowledged is there, and whole."""
    draw = random.Random(0)
    acknowledged: dict[str, list[int]] = {}
    for number in range(rounds):
        with Process(home) as server:
            client = server.client
            listed = {s["id"]: s for s in client.get("/v1/sessions").json()["data"]}
            for one, read in acknowledged.items():
                assert listed[one]["position"] >= len(read), "an acknowledged append is lost"
                if read and listed[one]["position"] == len(read):
                    reader = Session(make_model(), INNER)
                    reader.read(read)
                    expected = reader.read(list(b"and then")).tolist()
                    score = client.post(f"/v1/sessions/{one}/score", json={"text": "and then", "bin": 1}).json()
                    assert score["bins"]["nll"] == pytest.approx(expected, abs=1e-4)
            ones = [client.post("/v1/sessions").json()["id"] for _ in range(3)]
            acknowledged = {one: [] for one in ones}
            killer = threading.Timer(draw.uniform(0.02, 0.4), server.process.kill)
            killer.start()
            try:
                for step in itertools.count():
                    one = ones[step % 3]
                    read = acknowledged[one]
                    if step % 4 == 3 and read:
                        answer = client.post(f"/v1/sessions/{one}/generate", json={"max_tokens": 9, "seed": step})
                        read += answer.json()["tokens"]
                    elif step % 5 == 4 and read:
                        client.post(f"/v1/sessions/{one}/save").raise_for_status()
                    else:
                        tokens = [BOS] * (not read) + list(f"Round {number}, step {step}. ".encode())
                        body = {"tokens": tokens, "expected_position": len(read)}
                        client.post(f"/v1/sessions/{one}/append", json=body).raise_for_status()
                        read += tokens
            except httpx2.TransportError:
                killer.join()
                server.process.wait()


def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    kill_and_restart(tmp_path, rounds=2)


@pytest.mark.slow
def test_kill_9_fifty_times(tmp_path: Path) -> None:
    kill_and_restart(tmp_path, rounds=50)


@pytest.mark.slow
def test_an_hour_of_clients_in_a_minute_leaks_nothing(tmp_path: Path) -> None:
    """Memory, threads and open files after many requests, vanished clients among them, are what they were."""
    with Process(tmp_path, "--limit", "concurrent=64") as server:
        process = psutil.Process(server.process.pid)

        def load(number: int) -> None:
            for i in range(number):
                one = server.client.post("/v1/sessions").json()["id"]
                server.client.post(f"/v1/sessions/{one}/append", json={"text": TEXT})
                server.client.post("/v1/completions", json={"model": "tiny", "prompt": TEXT, "max_tokens": 4})
                body = json.dumps({"max_tokens": 10_000, "temperature": 0}).encode()
                raw(server, head(f"/v1/sessions/{one}/generate", len(body)) + body).close()
                server.client.delete(f"/v1/sessions/{one}")
                if i % 10 == 0:
                    assert server.client.get("/health").status_code == 200

        load(60)
        before = process.memory_info().rss, process.num_threads(), process.num_fds()
        load(400)
        assert until(lambda: tasks(server) == 0)
        after = process.memory_info().rss, process.num_threads(), process.num_fds()
        assert after[0] < before[0] * 1.1 + 2**24
        assert after[1] <= before[1] + 4
        assert after[2] <= before[2] + 8


def test_wrong_options_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "keys").touch(mode=0o600)
    for options, words in (
        (["--host", "0.0.0.0"], "there are no keys"),
        (["--keys", str(tmp_path / "keys")], "has no keys"),
        (["--metrics-keys", str(tmp_path / "keys")], "has no keys"),
        (["--limit", "colour=1"], "there is no such limit"),
        (["--limit", "tokens=many"], "is not a number"),
        (["--device-memory", "-1"], "--device-memory is -1; give GiB, above 0"),
        (["--port", "99999"], "--port is 99999; give 1 to 65535, or 0 for a free one"),
        (["--port", "-1"], "--port is -1; give 1 to 65535"),
        (["--name", ""], "--name is ''; give 1 to 200 printable characters"),
        (["--name", "a\n"], "printable"),
        (["--directory", str(tmp_path / "keys")], "keys is no directory; give a new name"),
        (["--directory", str(tmp_path)], "holds other things, keys for one; give a new name"),
        ([], "there is no model"),
    ):
        assert main(["serve", "--model", str(tmp_path / "none"), "--port", "0", *options]) == 2
        errors = capsys.readouterr().err
        assert len(errors.splitlines()) == 1
        assert words in errors


def test_a_budget_that_is_too_small_is_said_in_the_words_of_the_option(
    server: Process, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "tiny"
    model.mkdir()
    save_model(model, make_model(), INNER, ByteTokenizer.fingerprint)
    ByteTokenizer().save(model)
    options = ["--model", str(model), "--port", "0", "--device", "cpu", "--device-memory", "0.000001"]
    assert main(["serve", *options]) == 2
    error = capsys.readouterr().err
    assert "--device-memory is 1e-06 GiB; one session of this model and the place where it writes need 0.001," in error


def test_a_missing_uvicorn_is_said_before_a_model_is_opened(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "--model", "none"]) == 2
    assert "serving needs uvicorn; run pip install fastapi uvicorn " in capsys.readouterr().err


def test_without_the_packages_it_says_how_to_install_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "longread.server.app", None)
    monkeypatch.delitem(sys.modules, "longread.server.running", raising=False)
    error = ModuleNotFoundError("No module named 'fastapi'", name="fastapi")
    real = builtins.__import__

    def missing(name: str, *more: Any) -> Any:
        if name == "longread.server.app":
            raise error
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert main(["serve", "--model", "none"]) == 2
    assert "serving needs fastapi; run pip install fastapi uvicorn " in capsys.readouterr().err
    text = (Path(__file__).parent.parent / "docs" / "serving.md").read_text()
    assert install_command("serve") in text
    assert "longread[" not in text  # there is no such package in an index


def test_two_servers_cannot_share_a_directory(server: Process, capsys: pytest.CaptureFixture[str]) -> None:
    one, home = server.client.post("/v1/sessions").json()["id"], server.home
    options = ["--model", str(home / "tiny"), "--directory", str(home / "sessions"), "--device", "cpu"]
    assert main(["serve", *options, "--port", "0"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        "longread: error: .*/sessions is in use by another server; stop that one, or give another directory", error
    )
    answer = server.client.post(f"/v1/sessions/{one}/append", json={"text": TEXT, "expected_position": 0})
    assert answer.json()["position"] == 1 + len(TEXT)


@pytest.mark.slow
def test_a_server_that_was_killed_leaves_its_directory_to_the_next(tmp_path: Path) -> None:
    with Process(tmp_path) as server:
        one = server.client.post("/v1/sessions").json()["id"]
        answer = server.client.post(f"/v1/sessions/{one}/append", json={"text": TEXT, "expected_position": 0})
        assert answer.json()["position"] == 1 + len(TEXT)
        server.process.kill()
        server.process.wait()
    with Process(tmp_path) as server:  # nothing of the lock outlives the process
        found = server.client.get("/v1/sessions").json()
        assert [(entry["id"], entry["position"]) for entry in found["data"]] == [(one, 1 + len(TEXT))]
        assert found["lost"] == []


def test_a_key_of_the_other_tenant_opens_only_its_own(server: Process) -> None:
    one = server.client.post("/v1/sessions").json()["id"]
    assert server.client.get(f"/v1/sessions/{one}", headers=bearer(BOB)).status_code == 404
