"""Seconds of the parts of a step, on a GPU by its own clock, with nothing waited for.

A GPU is behind the program: what is asked of it after the last wait of a step, the update, runs while the next step
begins, and is read with that. A part is a range of the same name in a profile, too.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch
from torch.profiler import record_function

OUTER_STEP = "outer step"
"""The gradient of a batch in a profile, where inner steps and what is computed again have ranges of their own."""
PARTS = ("gradient", "reduce", "update", "gather")
"""The gradient of the outer loss; its sum over ranks, with its norm; clipping and AdamW; new weights to all ranks."""

TOGETHER = ("reduce", "gather")
"""Those of several ranks."""


class StepClock:
    """Takes the time of parts that follow one another."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._on_gpu = device, device.type == "cuda"
        self._events: dict[str, tuple[torch.cuda.Event, torch.cuda.Event]] = {}
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Around one of `PARTS`. One that fails leaves no time."""
        with record_function(OUTER_STEP if name == "gradient" else name):
            if not self._on_gpu:
                began = time.perf_counter()
                yield
                self._seconds[name] = time.perf_counter() - began
                return
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(torch.cuda.current_stream(self._device))
            yield
            end.record(torch.cuda.current_stream(self._device))
            self._events[name] = begin, end

    def settle(self) -> None:
        """To be called where the device has computed all that it was asked so far."""
        for name, (begin, end) in self._events.items():
            self._seconds[name] = begin.elapsed_time(end) / 1e3
        self._events.clear()

    def take(self) -> dict[str, float]:
        """Seconds by part since the last call; on a GPU of the parts up to the last `settle`."""
        found, self._seconds = self._seconds, {}
        return found
