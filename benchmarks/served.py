"""A server in a process of its own, its plain HTTP clients, and how long they wait; for the benchmarks of serving."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

HERE = Path(__file__).parent.parent
_TIMEOUT = 900.0
_IDLE = 2.0
"""Seconds after which a connection is not used again: the server closes it after five."""


class Server:
    """`longread serve` on a free port of this machine; leaving the context stops it.

    Args:
        options: of `longread serve`, the model among them.
        source: the checkout whose code runs.
        threads: that it computes with; None leaves that to torch.

    Raises:
        RuntimeError: it did not start, with what it said.
    """

    def __init__(self, *options: str, source: Path = HERE, threads: int | None = None) -> None:
        self._command = [sys.executable, "-m", "longread", "serve", "--port", "0", "--device", "cpu", *options]
        self._environment = os.environ | {"PYTHONPATH": str(source.resolve() / "src"), "OMP_WAIT_POLICY": "PASSIVE"}
        if threads is not None:
            self._environment["OMP_NUM_THREADS"] = str(threads)

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True, env=self._environment)
        self.port, said = 0, []
        for line in self._process.stderr or ():
            said.append(line)
            if found := re.search(r" is served at http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
                break
        else:
            raise RuntimeError("the server did not start: " + "".join(said))
        threading.Thread(target=list, args=(self._process.stderr,), daemon=True).start()  # a full pipe would stop it
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._process.terminate()
        try:
            self._process.wait(180)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def memory(self) -> dict[str, float]:
        """MiB that are resident now, and the most that ever were."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii").splitlines()
        sizes = {line[:5]: float(line.split()[1]) / 1024 for line in lines if line.startswith(("VmRSS", "VmHWM"))}
        return {"resident": sizes["VmRSS"], "most": sizes["VmHWM"]}


class Refused(Exception):
    """The server is busy: 429 or 503."""


@dataclass(frozen=True)
class Written:
    """What a session wrote."""

    times: list[float]
    """Seconds from the request to the first token, and then from each to the next."""
    position: int
    """Of the session, now."""


class Client:
    """One connection, kept open. Calls raise `Refused` for 429 and 503 and `RuntimeError` for any other refusal."""

    def __init__(self, server: Server) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=_TIMEOUT)
        self._used = time.monotonic()

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """The answer to a request, both JSON."""
        return json.loads(self._send(method, path, body).read())

    def write(self, session: str, **sampling: Any) -> Written:
        """Lets a session write, and watches its tokens come.

        Raises:
            RuntimeError: the stream ended with an error, or before it was done.
        """
        times, name, then = [], b"", time.perf_counter()
        answer = self._send("POST", f"/v1/sessions/{session}/generate", sampling | {"stream": True})
        for line in answer:
            name = line[7:].strip() if line.startswith(b"event: ") else name
            if not line.startswith(b"data: "):
                continue
            if name == b"done":
                answer.read()
                return Written(times, json.loads(line[6:])["position"])
            if name != b"token":
                raise RuntimeError(line.decode())
            now = time.perf_counter()
            times.append(now - then)
            then = now
        raise RuntimeError("a stream of tokens ended before it was done")

    def _send(self, method: str, path: str, body: Any) -> http.client.HTTPResponse:
        if time.monotonic() - self._used > _IDLE:
            self._connection.close()  # the next request opens it again
        data = None if body is None else json.dumps(body).encode()
        self._connection.request(method, path, data, {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        self._used = time.monotonic()
        if answer.status >= 400:
            told = answer.read().decode(errors="replace")
            if answer.status in (429, 503):
                raise Refused(told)
            raise RuntimeError(f"{method} {path}: {answer.status} {told}")
        return answer


class Waits:
    """Seconds that clients of one server waited, by what for, and what went wrong."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.times: dict[str, list[float]] = {}
        self.problems: list[str] = []
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def client(self) -> Client:
        """Another connection."""
        return Client(self._server)

    def timed(self, what: str, call: Callable[[], Any]) -> Any:
        """The answer to a call, whose time is noted."""
        began = time.perf_counter()
        answer = call()
        self.note(what, time.perf_counter() - began)
        return answer

    def note(self, what: str, *seconds: float) -> None:
        """Adds times."""
        with self._lock:
            self.times.setdefault(what, []).extend(seconds)

    def count(self, what: str, number: int = 1) -> None:
        """Adds to a count."""
        with self._lock:
            self.counts[what] += number

    def write(self, client: Client, session: str, tokens: int, **sampling: Any) -> int:
        """Lets a session write, notes the times of its tokens, and says where the session is then."""
        written = client.write(session, max_tokens=tokens, **sampling)
        self.note("first token", *written.times[:1])
        self.note("next token", *written.times[1:])
        self.count("written", len(written.times))
        return written.position

    def together(self, *clients: Callable[[], None]) -> float:
        """Runs clients at once until all have ended; the seconds that took. What one raises is a problem of the run."""

        def guarded(client: Callable[[], None]) -> None:
            try:
                client()
            except Exception as error:
                self.problems.append(repr(error))

        began = time.perf_counter()
        threads = [threading.Thread(target=guarded, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - began

    def summary(self) -> dict[str, dict[str, float]]:
        """n, p50, p99 and the longest of every kind, in seconds."""
        return {what: _quantiles(times) for what, times in sorted(self.times.items())}


def _quantiles(times: list[float]) -> dict[str, float]:
    taken = sorted(times)
    at = {name: taken[min(len(taken) - 1, int(q * len(taken)))] for name, q in (("p50", 0.5), ("p99", 0.99))}
    return {"n": len(taken), **at, "max": taken[-1]}
