"""Ranks for tests: processes that stay, joined with one another, and run one function together."""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from tests.forked import PROCESSES


class Ranks:
    """`size` processes; use it in a `with`. A rank that fails ends them all: the others may wait for it."""

    def __init__(self, size: int, directory: Path, backend: str = "gloo") -> None:
        """`directory` is where they meet; a new one. With NCCL in `backend` each has a GPU of its own."""
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            mine, theirs = PROCESSES.Pipe()
            process = PROCESSES.Process(
                target=_serve, args=(theirs, rank, size, directory / "store", backend), daemon=True
            )
            process.start()
            self._pipes.append(mine)
            self._processes.append(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(*args)` on each rank; what each returns, in their order. The function is one of a module."""
        for pipe in self._pipes:
            pipe.send((function, args))
        found = [pipe.recv() if pipe.poll(300) else (False, "no answer") for pipe in self._pipes]
        failed = [f"rank {rank}: {answer}" for rank, (good, answer) in enumerate(found) if not good]
        if failed:
            raise AssertionError("\n".join(failed))
        return [answer for _, answer in found]


def _serve(pipe: Connection, rank: int, size: int, store: Path, backend: str) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
    }
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if "nccl" in backend else None
    if device is not None:
        torch.cuda.set_device(device)
    meeting = dist.FileStore(str(store), size)
    dist.init_process_group(backend, store=meeting, rank=rank, world_size=size, device_id=device)
    function, args = pipe.recv()
    gc.freeze()  # what is imported by now stays, and every run looks for garbage at its end
    while True:
        try:
            pipe.send((True, function(*args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
        function, args = pipe.recv()
