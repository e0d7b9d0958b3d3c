"""Functions and commands as processes that are forked where all is imported: they begin at once, torch at hand."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from longread.cli import main

PROCESSES = multiprocessing.get_context("forkserver")
"""Forks of one process, which has imported by then what they need."""
PROCESSES.set_forkserver_preload(
    [
        "torch._dynamo",
        "torch.distributed.fsdp",
        "tokenizers",
        "rich.progress",
        "pytest",
        "safetensors.torch",
        "longread.server.running",
        "longread.thinking",
        "longread.train",
    ]
)


class Forked:
    """A function of a module in a process and session of its own; what it returns is the exit status.

    It has pipes for `stdin`, `stdout` and `stderr`, and begins in the working directory of this process.
    """

    def __init__(self, function: Callable[..., int | None], *args: Any) -> None:
        (theirs, stdin), (stdout, out), (stderr, err) = (PROCESSES.Pipe(duplex=False) for _ in range(3))
        ends = theirs, out, err
        self._process = PROCESSES.Process(target=_run, args=(ends, Path.cwd(), function, args), daemon=True)
        self._process.start()
        for end in ends:
            end.close()
        self.stdin, self.stdout, self.stderr = _file(stdin, "w"), _file(stdout, "r"), _file(stderr, "r")
        self.pid: int = self._process.pid  # type: ignore[assignment]

    @property
    def returncode(self) -> int | None:
        """The exit status of one that has ended."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, when it has ended; raises `subprocess.TimeoutExpired`."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout or 0.0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What is left of its output, of some kilobytes, once it has ended; its `stdin` is closed."""
        self.stdin.close()
        self.wait(timeout)
        return self.stdout.read(), self.stderr.read()

    def send_signal(self, number: int) -> None:
        """Nothing happens to one that has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def command(*arguments: object) -> Forked:
    """`longread` with some arguments."""
    return Forked(main, [str(argument) for argument in arguments])


def _file(end: Connection, mode: str) -> Any:
    file = os.fdopen(os.dup(end.fileno()), mode)
    end.close()
    return file


def _run(
    ends: tuple[Connection, ...], directory: Path, function: Callable[..., int | None], args: tuple[Any, ...]
) -> None:
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # what is imported by now stays
    os.setsid()
    os.chdir(directory)
    for place, end in enumerate(ends):
        os.dup2(end.fileno(), place)
        end.close()
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - there is none in a process that is forked
    sys.exit(function(*args))
