"""Starts the ranks of a run: as torchrun does it, or by torchrun itself."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from torch.distributed import TCPStore

from tests.drill import injection
from tests.drill.injection import ATTEMPT, SLOW, Injection
from tests.forked import PROCESSES

ROOT = Path(__file__).parent.parent.parent
LONGEST = 240.0
"""Seconds that ranks may take; a drill that takes longer hangs."""
SETTLING = 60.0
"""Seconds in which ranks end whose torchrun is gone: those that lost nothing else finish the run."""


class Hangs(Exception):
    """Ranks did not end."""


class Start(ABC):
    """The ranks of one start; each has an empty place for what it leaves."""

    def __init__(self, arguments: Sequence[str], place: Path, faults: Sequence[Injection] = (), ranks: int = 2) -> None:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        self.place, self.arguments, self.ranks = place, list(arguments), ranks
        self.environment = {
            "DRILL_PLACE": str(place),
            "DRILL_FAULTS": json.dumps([dataclasses.asdict(fault) for fault in faults]),
            "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
            "OMP_NUM_THREADS": "1",
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3",
        }
        self.faults = list(faults)

    @abstractmethod
    def wait(self) -> list[int]:
        """The exit statuses, negative numbers are signals. Raises `Hangs`, and kills what hangs."""

    @property
    def processes(self) -> list[int]:
        """Those of ranks that have begun."""
        return [int(path.name.partition("-")[2]) for path in self.place.glob("process-*")]

    @property
    def happened(self) -> bool:
        """Whether every fault came."""
        return all((self.place / fault.mark).exists() for fault in self.faults if fault.seconds != SLOW)

    def said(self) -> dict[str, str]:
        """What each rank said on stderr, by rank and start."""
        return {path.name.partition("-")[2]: path.read_text() for path in sorted(self.place.glob("said-*"))}

    def left_over(self) -> list[int]:
        """Processes of ranks that do not end; they are killed."""
        end = time.monotonic() + SETTLING
        while (found := [number for number in self.processes if state_of(number) != "Z"]) and time.monotonic() < end:
            time.sleep(0.05)
        for number in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        return found


def state_of(process: int | None) -> str:
    """As the system calls it: R runs, S sleeps, T is stopped, Z is dead, as is what is no more."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


class Forked(Start):
    """Ranks that are forks of a process which has imported torch; they meet at a store of ours, as at torchrun's."""

    def __init__(self, arguments: Sequence[str], place: Path, faults: Sequence[Injection] = (), ranks: int = 2) -> None:
        super().__init__(arguments, place, faults, ranks)
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port)}
        sizes = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), ATTEMPT: "0"}
        self._started = []
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_USE_AGENT_STORE": "True"}
            environment = self.environment | meeting | sizes | own
            self._started.append(PROCESSES.Process(target=_serve, args=(self.arguments, environment)))
            self._started[-1].start()

    def wait(self) -> list[int]:
        end = time.monotonic() + LONGEST
        while time.monotonic() < end and (running := [each for each in self._started if each.exitcode is None]):
            running[0].join(0.1)
            if all(state_of(each.pid) == "T" for each in running):  # the others have given up: they may go on
                for each in running:
                    os.kill(each.pid, signal.SIGCONT)
        hung = [rank for rank, process in enumerate(self._started) if process.exitcode is None]
        for process in self._started:
            process.kill()
            process.join()
        if hung:
            raise Hangs(f"ranks {hung} did not end within {LONGEST:g} s: {self.said()}")
        return [process.exitcode for process in self._started]


def _serve(arguments: list[str], environment: dict[str, str]) -> None:
    os.environ |= environment
    gc.freeze()  # what is imported by now stays
    sys.argv = ["longread", *arguments]
    sys.exit(injection.main())


class Torchrun(Start):
    """torchrun, and the ranks that it starts, again after a fault where `restarts` are left."""

    def __init__(
        self,
        arguments: Sequence[str],
        place: Path,
        faults: Sequence[Injection] = (),
        ranks: int = 2,
        restarts: int = 0,
    ) -> None:
        super().__init__(arguments, place, faults, ranks)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += ["--max-restarts", str(restarts), "-m", "tests.drill.injection", *self.arguments]
        with (place / "torchrun").open("w") as said:
            self.launcher = subprocess.Popen(
                command, env=os.environ | self.environment, stdout=said, stderr=said, start_new_session=True
            )

    def wait(self) -> list[int]:
        try:
            return [self.launcher.wait(LONGEST)]
        except subprocess.TimeoutExpired:
            self.launcher.kill()
            self.launcher.wait()
            raise Hangs(f"torchrun did not end within {LONGEST:g} s: {self.said()}") from None
