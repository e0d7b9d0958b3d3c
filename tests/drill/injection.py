"""Puts a fault into a rank: `python -m tests.drill.injection train ...` is `python -m longread train ...` with it.

The environment says where the ranks of a start leave their process numbers and what they say (`DRILL_PLACE`), and what
is to happen (`DRILL_FAULTS`).
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from longread.checkpoint import saving
from longread.parallel import DividedRows, World, world
from longread.record import MetricsLog
from longread.train import outer_step

PLACES: dict[str, list[tuple[Any, str]]] = {
    "meeting": [(world.dist, "init_process_group")],
    "gradient": [(outer_step, "accumulate_gradient")],
    "decision": [(World, "_together"), (World, "table")],
    "sum": [(DividedRows, "reduce")],
    "norm": [(DividedRows, "norm")],
    "gather": [(DividedRows, "gather")],
    "row": [(MetricsLog, "append")],
    "copy": [(saving.CheckpointWriter, "save")],
    "disk": [(os, "fsync"), (os, "replace"), (Path, "mkdir"), (Path, "unlink"), (Path, "rmdir"), (Path, "write_text")],
}
"""What a rank passes through, and the calls that are there; those of "disk" are every touch of the library."""
SLOW = 0.4
"""Seconds that a step sleeps which is to last: no fault."""
ATTEMPT = "TORCHELASTIC_RESTART_COUNT"


@dataclasses.dataclass(frozen=True)
class Injection:
    """One fault: what rank `rank` does the `count`-th time that it comes to `place`, before the call or after it."""

    act: str
    rank: int
    place: str
    count: int
    after: bool = False
    seconds: float = 0.0
    attempt: int = 0
    """How often torchrun has started all ranks again before."""

    @property
    def mark(self) -> str:
        """The name of a file that says it has come."""
        return f"done-{self.rank}-{self.attempt}-{self.act}-{self.place}-{self.count}"

    def __str__(self) -> str:
        again = f", start {self.attempt + 1}" if self.attempt else ""
        return f"rank {self.rank}, {'after' if self.after else 'before'} {self.place} {self.count}{again}"


class Injector:
    """Counts what this rank passes through, and acts."""

    def __init__(self, rank: int, attempt: int, faults: list[Injection], place: Path) -> None:
        self.rank, self.place = rank, place
        self.faults = [fault for fault in faults if (fault.rank, fault.attempt) == (rank, attempt)]
        self.counts = dict.fromkeys(PLACES, 0)
        self._lock = threading.Lock()

    def install(self) -> None:
        for name, calls in PLACES.items():
            for owner, attribute in calls:
                setattr(owner, attribute, self._watched(name, getattr(owner, attribute)))

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Any:
            with self._lock:
                self.counts[name] += 1
                due = [fault for fault in self.faults if (fault.place, fault.count) == (name, self.counts[name])]
            for fault in due:
                if not fault.after:
                    self._act(fault, args)
            found = call(*args, **options)
            for fault in due:
                if fault.after:
                    self._act(fault, args)
            return found

        return watched

    def _act(self, fault: Injection, args: tuple[Any, ...]) -> None:
        (self.place / fault.mark).touch()
        ACTS[fault.act](self, fault, args)

    def everybody(self) -> list[int]:
        """The processes of all ranks, this one last."""
        found = [int(path.name.partition("-")[2]) for path in self.place.glob("process-*")]
        return [*(number for number in found if number != os.getpid()), os.getpid()]


def _send(number: int) -> Callable[[Injector, Injection, Any], None]:
    return lambda injector, fault, args: os.kill(os.getpid(), number)


def _send_all(number: int, launcher: bool = False) -> Callable[[Injector, Injection, Any], None]:
    def send(injector: Injector, fault: Injection, args: Any) -> None:
        for process in [os.getppid()] * launcher + injector.everybody():
            os.kill(process, number)

    return send


def _send_launcher(number: int) -> Callable[[Injector, Injection, Any], None]:
    return lambda injector, fault, args: os.kill(os.getppid(), number)


def _sleep(injector: Injector, fault: Injection, args: Any) -> None:
    time.sleep(fault.seconds)


def _lack_memory(injector: Injector, fault: Injection, args: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def _fill_disk(injector: Injector, fault: Injection, args: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _limit_files(injector: Injector, fault: Injection, args: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))


def _spoil_gradient(injector: Injector, fault: Injection, args: Any) -> None:
    args[0].final_norm.weight.grad[3] = math.nan


ACTS: dict[str, Callable[[Injector, Injection, Any], None]] = {
    "kill": _send(signal.SIGKILL),
    "kill all": _send_all(signal.SIGKILL),
    "kill all and torchrun": _send_all(signal.SIGKILL, launcher=True),
    "kill torchrun": _send_launcher(signal.SIGKILL),
    "terminate torchrun": _send_launcher(signal.SIGTERM),
    "interrupt all and torchrun": _send_all(signal.SIGINT, launcher=True),
    "stop": _send(signal.SIGSTOP),
    "terminate": _send(signal.SIGTERM),
    "terminate all": _send_all(signal.SIGTERM),
    "sleep": _sleep,
    "lack memory": _lack_memory,
    "fill disk": _fill_disk,
    "limit files": _limit_files,
    "spoil gradient": _spoil_gradient,
}


def main() -> int:
    """A rank, with what it says in a file of its own."""
    torch.set_num_threads(1)
    rank, attempt = (int(os.environ.get(name, 0)) for name in ("RANK", ATTEMPT))
    place = Path(os.environ["DRILL_PLACE"])
    (place / f"process-{os.getpid()}").touch()
    said = os.open(place / f"said-{rank}-{attempt}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(said, 2)
    faults = [Injection(**fault) for fault in json.loads(os.environ["DRILL_FAULTS"])]
    injector = Injector(rank, attempt, faults, place)
    injector.install()
    from longread.cli import main as run

    status = run(sys.argv[1:])
    (place / f"counts-{rank}").write_text(json.dumps(injector.counts))
    return status


if __name__ == "__main__":
    sys.exit(main())
