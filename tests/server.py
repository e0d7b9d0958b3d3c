"""What the tests of the server share: a tiny model, an application around it, and a process that serves it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
from fastapi.testclient import TestClient

from longread.checkpoint import save_model
from longread.config import InnerConfig, ModelConfig
from longread.engine import Engine, Limits
from longread.model import Transformer, initialize
from longread.server import Keys, ServerLimits
from longread.server.app import create_app
from longread.server.running import listen, make_server
from longread.server.service import Service
from longread.session import Session
from longread.tokenizer import ByteTokenizer
from tests.forked import Forked, command

BOS = ByteTokenizer.bos_id
INNER = InnerConfig(lr=0.5)
M = 16
ALICE, BOB = "alice-alice-alice-alice", "bob-bob-bob-bob-bob"
KEYS = [("alice", ALICE), ("bob", BOB)]
TEXT = "It was read once, and it was asked many times. " * 4


def make_model(seed: int = 0) -> Transformer:
    config = ModelConfig(
        vocab_size=257,
        width=16,
        num_blocks=2,
        num_heads=2,
        mlp_hidden=16,
        window_size=32,
        mini_batch_size=M,
        num_suffix_blocks=1,
    )
    model = Transformer(config)
    initialize(model, seed=seed)
    return model.requires_grad_(False)


def make_service(
    directory: Path,
    *,
    keys: bool = False,
    metrics_keys: Sequence[tuple[str, str]] = (),
    limits: ServerLimits = ServerLimits(),  # noqa: B008 - frozen
    engine_limits: Limits = Limits(),  # noqa: B008 - frozen
) -> Service:
    model = make_model()
    engine = Engine(model, INNER, directory=directory, limits=engine_limits)
    return Service(
        engine=engine,
        tokenizer=ByteTokenizer(),
        config=model.config,
        name="tiny",
        fingerprint=engine.fingerprint,
        device="cpu",
        scratch=directory / "passing",
        keys=Keys(KEYS if keys else []),
        metrics_keys=Keys(metrics_keys),
        limits=limits,
    )


@contextlib.contextmanager
def serving(directory: Path, **options: object) -> Iterator[TestClient]:
    """A client of an application in this process."""
    with TestClient(create_app(make_service(directory, **options)), base_url="http://localhost") as client:  # type: ignore[arg-type]
        yield client


class Listening:
    """An application on a socket, in a thread of this process: what it does can be held at any point."""

    def __init__(self, directory: Path, **options: object) -> None:
        self.service = make_service(directory, **options)  # type: ignore[arg-type]
        listener = listen("127.0.0.1", 0, has_keys=bool(self.service.keys))
        self.port = listener.getsockname()[1]
        self.server = make_server(self.service, listener)
        serve = self.server.serve(sockets=[listener])
        self.thread = threading.Thread(target=lambda: asyncio.run(serve), daemon=True)
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx2.Client(base_url=self.url, timeout=300)

    def signal(self) -> None:
        """What the process does on SIGTERM."""
        self.server.handle_exit(signal.SIGTERM, None)

    def raw(self, data: bytes) -> bytes:
        """Everything that is answered to some bytes, until the connection is closed."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=300) as connection:
            connection.sendall(data)
            return b"".join(iter(lambda: connection.recv(65536), b""))

    def __enter__(self) -> Listening:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join(60)
        self.server.force_exit = True  # a test has failed and left something under way
        self.thread.join(60)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def direct(text: str, *, learn: bool = True, before: str = "") -> list[float]:
    """Losses of `text`, after `before`, as the library finds them."""
    session = Session(make_model(), INNER, learn=learn)
    session.read([BOS, *before.encode()])
    return session.read(list(text.encode())).tolist()


def post(client: TestClient, path: str, status: int = 200, **body: Any) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def session(client: TestClient, text: str = "", **body: Any) -> str:
    one = post(client, "/v1/sessions", 201, **body)["id"]
    if text:
        post(client, f"/v1/sessions/{one}/append", text=text)
    return one


def events(answer: Any) -> list[tuple[str, Any]]:
    """Names and contents of the events of a stream."""
    found = []
    for block in answer.text.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines())
        found.append(
            (lines.get("event", ""), lines["data"] if lines["data"] == "[DONE]" else json.loads(lines["data"]))
        )
    return found


class Process:
    """`longread serve` as a process of its own, begun anew where `python` has options for it."""

    def __init__(
        self, home: Path, *options: str, python: tuple[str, ...] = (), keys: bool = False, device: str = "cpu"
    ) -> None:
        self.home, model = home, home / "tiny"
        if not model.exists():
            model.mkdir(parents=True)
            save_model(model, make_model(), INNER, ByteTokenizer.fingerprint)
            ByteTokenizer().save(model)
        arguments = ["serve", "--model", str(model), "--directory", str(home / "sessions"), "--port", "0", *options]
        if keys:
            file = home / "keys"
            file.touch(mode=0o600)
            file.write_text("".join(f"{tenant} {key}\n" for tenant, key in KEYS))
            arguments += ["--keys", str(file)]
        arguments += ["--device", device]
        self.process: Forked | subprocess.Popen[str]
        if python:
            environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent / "src"), "OMP_NUM_THREADS": "1"}
            anew = [sys.executable, *python, "-m", "longread", *arguments]
            self.process = subprocess.Popen(anew, stderr=subprocess.PIPE, text=True, env=environment)
        else:
            self.process = command(*arguments)
        self.log: list[str] = []
        self._port: int | None = None
        self._started = threading.Event()
        threading.Thread(target=self._read_log, daemon=True).start()
        if not self._started.wait(300) or self._port is None:
            raise RuntimeError("the server did not start: " + "".join(self.log))
        self.url = f"http://127.0.0.1:{self._port}"
        self.port = self._port
        self.client = httpx2.Client(base_url=self.url, timeout=300, headers=bearer(ALICE) if keys else {})

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                self._port = int(found[1])
                self._started.set()
        self._started.set()

    def stop(self, number: int = signal.SIGTERM, timeout: float = 120) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def until(condition: object, seconds: float = 60.0) -> bool:
    """Waits until a condition holds; says whether it did."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.02)
    return False
