"""Figures of a step on each rank, and on all together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from longread.train.step_clock import PARTS


class Seen(NamedTuple):
    """Figures of a step on one rank, for all."""

    left: float = 0
    """It was left: a signal came first."""
    loss: float = 0.0
    """Its part of the loss of all; nan if an inner gradient is not finite."""
    norm: float = 0.0
    """Of the gradient of all; rank 0's counts."""
    inner_steps: float = 0
    inner_norm: float = 0.0
    inner_clipped: float = 0
    """As in `InnerSums`."""
    due: float = 0
    """Time for a checkpoint."""
    peak: float = 0
    """Bytes of memory that it has taken."""
    gradient: float = 0.0
    reduce: float = 0.0
    update: float = 0.0
    gather: float = 0.0
    """Seconds, as in `PARTS`; the last two of the step before."""

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by part."""
        return {name: getattr(self, name) for name in PARTS}


def seen_by_all(table: Sequence[Sequence[float]]) -> Seen:
    """The figures of all ranks of a `World.table` together: sums, and the norm of rank 0.

    Of memory it is the highest peak, of computing the slowest, of what ranks do together what the last to come saw.
    """
    every = [Seen(*numbers) for numbers in table]
    most, least = (Seen(*map(choice, zip(*every, strict=True))) for choice in (max, min))
    return Seen(*map(sum, zip(*every, strict=True)))._replace(
        norm=every[0].norm,
        peak=most.peak,
        gradient=most.gradient,
        reduce=least.reduce,
        update=most.update,
        gather=least.gather,
    )
