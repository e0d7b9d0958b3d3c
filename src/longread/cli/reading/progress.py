"""How far a reading is and how long it will take: a line that changes on a terminal, a line now and then in a log."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence

from longread.cli.reading.pieces import Inputs
from longread.evaluate import Measurement

ON_TERMINAL, IN_LOG = 0.2, 30.0
"""Seconds between two lines."""
LONG = 60.0
"""Seconds to come of a reading whose length is said as soon as its pace is known."""
ENOUGH = 1.0
"""Seconds from which the pace is known."""


class ReadingProgress:
    """Says on stderr how far a reading is.

    The first piece sets the clock: what it takes to begin, and what an earlier command has read, is no measure.

    Args:
        inputs: what is read.
        clock: seconds, of any beginning.
    """

    def __init__(self, inputs: Inputs, *, quiet: bool, clock: Callable[[], float] = time.perf_counter) -> None:
        self._inputs, self._clock = inputs, clock
        self._quiet = quiet or sys.stderr is None
        self._terminal = not self._quiet and sys.stderr.isatty()
        self._first: tuple[float, float] | None = None  # seconds and bytes after the first piece
        self._shown, self._tokens, self._estimated = -math.inf if self._terminal else clock(), 0, False

    def add(self, tokens: int, share: float, position: int, measurements: Sequence[Measurement]) -> None:
        """A piece has been read: with it, this `share` of what has come."""
        now, done = self._clock(), self._inputs.num_bytes_read * share
        if self._first is None:
            self._first = now, done
            return
        self._tokens += tokens
        seconds = max(now - self._first[0], 1e-9)
        size, pace = self._inputs.size, (done - self._first[1]) / seconds
        left = max(0.0, size - done) / pace if size and pace else None
        if left is not None and seconds >= ENOUGH and not self._estimated:
            self._estimated = True
            if left >= LONG:
                self._say(f"reading takes about {_span(left)} more, at {self._tokens / seconds:,.0f} tokens/s")
        if now - self._shown < (ON_TERMINAL if self._terminal else IN_LOG):
            return
        self._shown = now
        parts = [f"{min(99, int(100 * done / size))} %"] if size else []
        parts += [f"{position:,} tokens", f"{self._tokens / seconds:,.0f} tokens/s"]
        parts += [f"{_span(left)} left"] if left is not None else []
        self._say(", ".join([*parts, *_found(measurements)]), passing=True)

    def clear(self) -> None:
        """Takes the changing line away."""
        if self._terminal:
            self._write("\r\x1b[K")

    def _say(self, line: str, *, passing: bool = False) -> None:
        """Prints a line; on a terminal one that is `passing` gives way to the next."""
        if self._quiet:
            return
        if self._terminal:
            self._write(f"\r\x1b[K{line}" if passing else f"\r\x1b[K{line}\n")
        else:
            self._write(f"{line}\n")

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


def _found(measurements: Sequence[Measurement]) -> list[str]:
    nats, _, num_bytes = measurements[0].losses[0].total()
    if not num_bytes:
        return []
    bits = 1 / (math.log(2) * num_bytes)
    found = [f"{nats * bits:.3f} bits per byte"]
    if len(measurements) > 1:
        found.append(f"{(measurements[1].losses[0].total()[0] - nats) * bits:+.3f} gained by learning")
    return found


def _span(seconds: float) -> str:
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    if seconds < 100 * 60:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"
