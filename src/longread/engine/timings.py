"""How long clients wait, as counts in buckets: cheap enough to be taken at every token, and never forgotten."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Seconds; the upper ends of all buckets but the last, which has none."""


@dataclass(frozen=True)
class TimeCounts:
    """How often something took how long, since the engine started."""

    counts: tuple[int, ...]
    """Of each bucket alone (not cumulative): seconds at most `BOUNDS[i]` and above the bound before; one more for what
    took longer than all."""
    seconds: float
    """Of all together."""

    @property
    def count(self) -> int:
        """How often, however long."""
        return sum(self.counts)


class Stopwatches:
    """What is counted: `waiting`, from a task's acceptance to the first computing for it; `first_token`, from its
    acceptance to its first written token; `next_token`, from one written token to the next of the same task.
    """

    def __init__(self) -> None:
        names = ("waiting", "first_token", "next_token")
        self._counts = {name: [0] * (len(BOUNDS) + 1) for name in names}
        self._seconds = dict.fromkeys(names, 0.0)

    def note(self, name: str, seconds: float) -> None:
        """Counts one; for one thread at a time."""
        self._counts[name][bisect.bisect_left(BOUNDS, seconds)] += 1
        self._seconds[name] += seconds

    def read(self) -> dict[str, TimeCounts]:
        """All of them now."""
        return {name: TimeCounts(tuple(counts), self._seconds[name]) for name, counts in self._counts.items()}
