"""Minutes of mixed load on one engine: latencies, throughput, errors, and whether its memory grows.

    python -m benchmarks.serving_load [--minutes 10] [--sessions 64] [--out FILE]

Each session has a client of its own that appends texts, continues them, scores, forks, saves and deletes, without
pauses, in an order drawn from its seed. Memory is the process's resident set; it is flat if the last quarter of the
run holds no more than the second by 5 %. Byte budgets are tight, so sessions move between memory and disk all the time.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import tempfile
import threading
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from longread.config import InnerConfig
from longread.engine import Busy, Engine, Limits, Sampling, Task, Token, largest_session
from longread.model import Transformer, initialize
from longread.recipes import toy
from longread.record import hardware

APPENDED = (16, 64, 256, 1024)
WRITTEN = (8, 32, 96)
GROWTH = 1.05


class Load:
    """Clients, what they have seen, and the memory of the process."""

    def __init__(self, engine: Engine, end: float) -> None:
        self.engine, self.end = engine, end
        self.times: dict[str, array[float]] = defaultdict(lambda: array("d"))
        """Seconds, by what they were taken of; as Python's numbers they would be most of what memory grows by."""
        self.errors: list[str] = []
        self.busy = 0
        self.resident: list[float] = []
        """MiB, one a second."""
        self._lock = threading.Lock()

    def client(self, seed: int) -> None:
        """One session after the other until the end."""
        rng = random.Random(seed)  # noqa: S311 - no secret
        while time.monotonic() < self.end:
            try:
                self._session(rng)
            except Busy:
                with self._lock:
                    self.busy += 1
                time.sleep(0.1)
            except Exception as error:
                with self._lock:
                    self.errors.append(repr(error))

    def _session(self, rng: random.Random) -> None:
        engine, session, position = self.engine, self.engine.create().id, 0
        for _ in range(rng.randrange(4, 30)):
            if time.monotonic() >= self.end:
                break
            kind = rng.choices(("append", "generate", "score", "fork", "save", "cancel"), (8, 8, 2, 1, 1, 1))[0]
            tokens = [rng.randrange(256) for _ in range(rng.choice(APPENDED))]
            if kind == "append" or not position:
                found = self._timed(f"append {len(tokens)}", lambda: engine.append(session, tokens))  # noqa: B023
                if found.position != position + len(tokens):
                    raise RuntimeError(f"{len(tokens)} tokens led from {position} to {found.position}")
                position = found.position
            elif kind == "generate":
                count = rng.choice(WRITTEN)
                position = self._written(engine.generate(session, Sampling(max_tokens=count, top_p=0.95)))
            elif kind == "score":
                self._timed(f"score {len(tokens)}", lambda: engine.score(session, tokens))  # noqa: B023
            elif kind == "fork":
                fork = engine.fork(session)
                self._written(engine.generate(fork.id, Sampling(max_tokens=16)))
                engine.delete(fork.id)
            elif kind == "save":
                engine.save(session)
            else:
                task = engine.append(session, tokens)
                task.cancel()
                position = task.result().position
        if engine.info(session).position != position:
            raise RuntimeError(f"the session is not at {position}")
        engine.delete(session)

    def _timed(self, what: str, start: Callable[[], Task]) -> Any:
        began = time.perf_counter()
        found = start().result()
        with self._lock:
            self.times[what].append(time.perf_counter() - began)
        return found

    def _written(self, task: Task) -> int:
        last, first, gaps = time.perf_counter(), True, []
        for event in task:
            now = time.perf_counter()
            if isinstance(event, Token):
                if first:
                    with self._lock:
                        self.times["first token"].append(now - last)
                else:
                    gaps.append(now - last)
                first, last = False, now
        with self._lock:
            self.times["next token"].extend(gaps)
        return task.result().position

    def watch(self) -> None:
        """Notes the memory until the end."""
        while time.monotonic() < self.end:
            status = Path("/proc/self/status").read_text(encoding="ascii")
            line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
            self.resident.append(int(line.split()[1]) / 1024)
            time.sleep(1)

    def growth(self) -> float:
        """Memory of the last quarter of the run over that of the second."""
        quarter = len(self.resident) // 4
        if not quarter:
            return 1.0
        return statistics.median(self.resident[-quarter:]) / statistics.median(self.resident[quarter : 2 * quarter])


def latencies(times: Mapping[str, Sequence[float]]) -> str:
    """As Markdown, in milliseconds."""
    lines = ["| | n | p50 ms | p95 ms | p99 ms | most ms |", "|---|--:|--:|--:|--:|--:|"]
    for what in sorted(times, key=lambda what: (what.rstrip("0123456789"), len(what), what)):
        taken = sorted(times[what])
        at = [taken[min(len(taken) - 1, int(q * len(taken)))] for q in (0.5, 0.95, 0.99, 1)]
        lines.append(f"| {what} | {len(taken):,} | " + " | ".join(f"{1e3 * x:,.0f}" for x in at) + " |")
    return "\n".join(lines)


def main() -> None:
    """Prints the page and writes it; exits with 1 after an error, or where memory grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--sessions", type=int, default=64)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = Transformer(toy().model)
    initialize(model, seed=0)
    size = largest_session(model)
    limits = Limits(device_bytes=48 * size, host_bytes=16 * size, max_batch=16, max_sessions=3 * options.sessions)
    with (
        tempfile.TemporaryDirectory() as folder,
        Engine(model, InnerConfig(), directory=folder, limits=limits) as engine,
    ):
        load = Load(engine, time.monotonic() + 60 * options.minutes)
        threads = [threading.Thread(target=load.client, args=(seed,)) for seed in range(options.sessions)]
        threads.append(threading.Thread(target=load.watch))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = engine.stats()
    seconds, growth = 60 * options.minutes, load.growth()
    page = f"""# An engine under mixed load, {options.sessions} sessions, {date.today()}

`python -m benchmarks.serving_load --minutes {options.minutes:g} --sessions {options.sessions}` on
{json.dumps(hardware())}; Python {platform.python_version()}, torch {torch.__version__}.

The toy (0.8M parameters, float32); {size:,} bytes a session, 48 of them in memory, 16 lanes. Clients make no pauses, so
these are latencies at saturation.

{latencies(load.times)}

- {len(load.errors)} errors, {load.busy} times busy
- read {stats["tokens_read"] / seconds:,.0f} tokens/s, written {stats["tokens_written"] / seconds:,.0f} tokens/s, \
{stats["steps"] / seconds:,.0f} inner steps/s
- memory: {load.resident[len(load.resident) // 4]:,.0f} MiB after a quarter, {load.resident[-1]:,.0f} at the end, \
{load.resident[0]:,.0f} at the start; the last quarter holds {growth:.3f} times the second
"""
    print(page)
    for error in load.errors[:5]:
        print(error)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(page, encoding="utf-8")
    if load.errors or growth > GROWTH:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
