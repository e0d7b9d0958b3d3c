"""How long clients of a server wait: alone, beside a long text that is being read, and among 64 of them.

    python -m benchmarks.serving_waits --out after.json [--source CHECKOUT] [--before before.json]

Starts the server of a checkout (this one, unless `--source` says otherwise) as a process, with its sessions on the
disk, and talks to it over HTTP as any client does. Writes the figures as JSON; with `--before`, the figures of another
checkout from the same machine, also a page that compares them. `--minutes 10` makes the load long enough to see whether
memory grows. Gate: whatever is read beside it, a text gets the loss that it gets alone, and no session is ever at
another position than its client. Five minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.served import HERE, Client, Refused, Server, Waits
from benchmarks.serving_waits_page import write_page
from longread.record import hardware

PAUSE = 0.2
"""Seconds between two calls of the same kind beside a reader: what is measured must not be the load."""
TOLERANCE = 0.01
"""Nats between two readings of a text; what is computed together with others sums in another order."""
WORDS = """the a one that every no old small second northern boat pilot lamp harbour river letter clerk engine winter
bridge carried found measured wrote left kept crossed waited slowly again before under behind without because and but"""


def text_of(characters: int, seed: int) -> str:
    """Sentences of common words in an order drawn from the seed."""
    rng, pieces, length = random.Random(seed), [], 0  # noqa: S311 - no secret
    while length < characters:
        words = " ".join(rng.choices(WORDS.split(), k=rng.randrange(4, 16)))
        pieces.append(f"{words.capitalize()}{rng.choice(('.', '.', '?', '; ' + str(rng.randrange(999)) + '.'))} ")
        length += len(pieces[-1])
    return "".join(pieces)[:characters]


def calls(waits: Waits, client: Client, session: str) -> dict[str, Callable[[], None]]:
    """What computes nothing, by its name; each is timed. A session that was created is deleted again."""

    def create() -> None:
        made = waits.timed("create", lambda: client.call("POST", "/v1/sessions"))["id"]
        client.call("DELETE", f"/v1/sessions/{made}")

    def label() -> None:
        given = f"label {random.random()}"  # noqa: S311 - no secret
        if waits.timed("label", lambda: client.call("PATCH", path, {"label": given}))["label"] != given:
            raise RuntimeError("a label was not taken")

    path = f"/v1/sessions/{session}"
    return {
        "create": create,
        "get": lambda: waits.timed("get", lambda: client.call("GET", path)),
        "list": lambda: waits.timed("list", lambda: client.call("GET", "/v1/sessions")),
        "label": label,
    }


def alone(server: Server, rounds: int) -> dict[str, Any]:
    """One client after the other, with 16 sessions there."""
    waits, client = Waits(server), Client(server)
    session, *_ = [client.call("POST", "/v1/sessions")["id"] for _ in range(16)]
    client.call("POST", f"/v1/sessions/{session}/append", {"text": text_of(2000, seed=1)})
    for call in calls(waits, client, session).values():
        for _ in range(rounds):
            call()
    for _ in range(max(rounds // 20, 1)):
        waits.write(client, session, 128, seed=1)
    return {"waits": waits.summary(), "problems": waits.problems}


def reading(server: Server, text: str, *, probes: bool, writers: int) -> dict[str, Any]:
    """One text read at once, with clients beside it as long as that takes."""
    waits, client = Waits(server), Client(server)
    book = client.call("POST", "/v1/sessions")["id"]
    others = [client.call("POST", "/v1/sessions")["id"] for _ in range(max(writers, 1))]
    for seed, other in enumerate(others):
        client.call("POST", f"/v1/sessions/{other}/append", {"text": text_of(2000, seed)})
    over = threading.Event()
    answer: dict[str, Any] = {"tokens": 0, "nll": None, "seconds": math.inf}

    def read() -> None:
        try:
            began = time.perf_counter()
            answer.update(client.call("POST", f"/v1/sessions/{book}/append", {"text": text}))
            answer["seconds"] = time.perf_counter() - began
        finally:
            over.set()

    def repeated(name: str) -> None:
        call = calls(waits, waits.client(), others[0])[name]
        while not over.wait(PAUSE):
            call()

    def write(session: str) -> None:
        own = waits.client()
        while not over.is_set():
            waits.write(own, session, 64)

    clients: list[Callable[[], None]] = [read]
    clients += [lambda name=name: repeated(name) for name in ("create", "get", "list", "label") if probes]  # type: ignore[misc]
    clients += [lambda other=other: write(other) for other in others[:writers]]  # type: ignore[misc]
    took = waits.together(*clients)
    for session in (book, *others):
        client.call("DELETE", f"/v1/sessions/{session}")
    rates = {"read": answer["tokens"] / answer["seconds"], "written": waits.counts["written"] / took}
    return {"waits": waits.summary(), "problems": waits.problems, "tokens_per_second": rates, "nll": answer["nll"]}


def load(server: Server, clients: int, seconds: float) -> dict[str, Any]:
    """Clients without pauses, each with a session of its own, that append, write, look, and now and then begin anew."""
    waits, end = Waits(server), time.monotonic() + seconds
    resident: list[float] = []

    def watch() -> None:
        while time.monotonic() < end:
            resident.append(server.memory()["resident"])
            time.sleep(min(1.0, max(0.0, end - time.monotonic())))

    def one(seed: int) -> None:
        work = _load_client(waits, seed)
        while time.monotonic() < end:
            try:
                next(work)
            except Refused:
                waits.count("refused")
                time.sleep(0.1)
                work = _load_client(waits, seed)

    took = waits.together(watch, *[lambda seed=seed: one(seed) for seed in range(clients)])  # type: ignore[misc]
    rates = {what: waits.counts[what] / took for what in ("read", "written")}
    quarter = max(len(resident) // 4, 1)
    growth = statistics.median(resident[-quarter:]) / statistics.median(resident[quarter : 2 * quarter] or resident)
    return {
        "waits": waits.summary(),
        "problems": waits.problems,
        "tokens_per_second": rates,
        "refused": waits.counts["refused"],
        "memory_growth": growth,
    }


def _load_client(waits: Waits, seed: int) -> Iterator[None]:
    """One call at each step. Raises if the session is not where the calls must have led it."""
    rng, client = random.Random(seed), waits.client()  # noqa: S311 - no secret
    while True:
        session, position = waits.timed("create", lambda: client.call("POST", "/v1/sessions"))["id"], 0
        path = f"/v1/sessions/{session}"
        yield
        for _ in range(rng.randrange(4, 30)):
            kind = rng.choices(("append", "generate", "get", "score", "save", "fork"), (8, 8, 8, 1, 1, 1))[0]
            text = text_of(rng.choice((64, 256, 1024)), rng.randrange(10**6))
            if kind == "append" or not position:
                body = {"text": text, "expected_position": position}
                read = waits.timed(f"append {len(text)}", lambda: client.call("POST", f"{path}/append", body))  # noqa: B023
                position = read["position"]
                waits.count("read", read["tokens"])
            elif kind == "generate":
                position = waits.write(client, session, rng.choice((8, 32, 96)), top_p=0.95)
            elif kind == "score":
                read = waits.timed("score", lambda: client.call("POST", f"{path}/score", {"text": text}))  # noqa: B023
                waits.count("read", read["tokens"])
            elif kind == "save":
                waits.timed("save", lambda: client.call("POST", f"{path}/save"))  # noqa: B023
            elif kind == "fork":
                fork = waits.timed("fork", lambda: client.call("POST", f"{path}/fork"))["id"]  # noqa: B023
                client.call("DELETE", f"/v1/sessions/{fork}")
            else:
                found = waits.timed("get", lambda: client.call("GET", path))["position"]  # noqa: B023
                if found != position:
                    raise RuntimeError(f"a session is at {found} and not at {position}")
            yield
        waits.timed("delete", lambda: client.call("DELETE", path))  # noqa: B023
        yield


def measure(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one server; its problems, of which there must be none, among them."""
    text = text_of(options.characters, seed=0)
    found = {
        "alone": alone(server, options.rounds),
        "reading": reading(server, text, probes=False, writers=0),
        "beside a reader": reading(server, text, probes=True, writers=1),
        "four writers and a reader": reading(server, text[: len(text) // 4], probes=False, writers=4),
        f"{options.clients} clients": load(server, options.clients, 60 * options.minutes),
    }
    problems = [f"{phase}: {problem}" for phase, figures in found.items() for problem in figures.pop("problems")]
    first, second = found["reading"]["nll"], found["beside a reader"]["nll"]
    if None in (first, second) or abs(first - second) > TOLERANCE:
        problems.append(f"a text has loss {first} alone and {second} beside others")
    return {"phases": found, "problems": problems, "memory": server.memory()}


def about(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """What was measured, on what."""
    git = ["git", "-C", str(options.source), "describe", "--always", "--dirty=+changes", "--abbrev=7"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    client = Client(server)
    version, (model,) = client.call("GET", "/version"), client.call("GET", "/v1/models")["data"]
    return {
        "commit": commit,
        "date": str(date.today()),
        "command": shlex.join(["python", "-m", "benchmarks.serving_waits", *sys.argv[1:]]),
        "hardware": hardware() | {"threads": options.threads},
        "versions": {"python": platform.python_version(), "torch": version["torch"], "longread": version["longread"]},
        "model": model["id"],
        "mini_batch_size": model["mini_batch_size"],
    }


def main(arguments: list[str] | None = None) -> int:
    """Measures and writes; 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--source", type=Path, default=HERE, metavar="CHECKOUT", help="whose code the server runs")
    parser.add_argument(
        "--before", type=Path, metavar="FILE.json", help="writes a page beside --out, compared to these"
    )
    parser.add_argument("--model", type=Path, default=HERE / "models" / "longread-small")
    parser.add_argument("--threads", type=int, default=2, help="of the server (default 2)")
    parser.add_argument("--characters", type=int, default=300_000, help="of the long text")
    parser.add_argument("--rounds", type=int, default=100, help="calls of each kind by a client alone")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=2.0, help="of the load")
    parser.add_argument(
        "--serve", default="", metavar="OPTIONS", help='more of `longread serve`: "--device-memory 0.1"'
    )
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as home:
        limits = ["--limit", f"concurrent={options.clients + 16}", "--limit", "per_minute=1000000000"]
        served = ["--model", str(options.model.resolve()), "--directory", str(Path(home) / "sessions"), *limits]
        with Server(*served, *shlex.split(options.serve), source=options.source, threads=options.threads) as server:
            figures = about(server, options) | measure(server, options)
    options.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    before = json.loads(options.before.read_text(encoding="utf-8")) if options.before else None
    print(page := write_page(figures, before))
    if before is not None:
        options.out.with_suffix(".md").write_text(page, encoding="utf-8")
    for problem in figures["problems"]:
        print(problem, file=sys.stderr)
    return int(bool(figures["problems"]))


if __name__ == "__main__":
    sys.exit(main())
