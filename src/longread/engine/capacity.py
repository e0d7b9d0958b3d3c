"""How many sessions an engine holds and lets write at once, by its own arithmetic, before there is an engine."""

from __future__ import annotations

from typing import NamedTuple

from longread.engine.interface import Limits
from longread.engine.lanes import fast_nbytes, largest_session
from longread.engine.tiers import SHARE
from longread.inner_loop.places import place_nbytes
from longread.model import Transformer

MOST_TOGETHER = Limits().max_batch
"""Sessions that are computed together, however much memory there is."""


class SessionBytes(NamedTuple):
    """Of one session, in bytes, when it has read much."""

    resting: int
    """Its state."""
    place: int
    """What it is copied into when it writes; 0 for a model that writes without lanes."""
    beside: int
    """Of its state, what it keeps beside its place: fast weights in their own precision."""

    @property
    def writing(self) -> int:
        """Once it has entered its place."""
        return self.place + self.beside if self.place else self.resting


class Capacity(NamedTuple):
    """What fits on a device, and how much of it sessions may take."""

    budget: int
    resting: int
    writing: int


def session_sizes(model: Transformer, position: int) -> SessionBytes:
    """Sizes of a session after `position` tokens, which count where attention has no window. `model` may be on no
    device."""
    config, itemsize = model.config, model.dtype.itemsize
    endless = sum(config.window_of(i) is None for i in range(config.num_blocks))
    resting = largest_session(model) + 2 * endless * position * config.kv_width * itemsize
    if config.mixer != "attention":
        return SessionBytes(resting, 0, 0)
    return SessionBytes(resting, place_nbytes(model, position), fast_nbytes(model))


def capacity(free: int, session: SessionBytes) -> Capacity:
    """What fits into `free` bytes beside the parameters, with the default limits.

    Sessions take a share; the rest is for computing: workspace, graphs, activations of texts that are read. The last
    session to write must lie beside the place that it enters, and the others be in theirs (`Tiers.make_lane`).
    """
    budget = max(0, int(SHARE * free))
    resting = budget // session.resting
    if not session.place:
        return Capacity(budget, resting, min(resting, MOST_TOGETHER))
    left = budget - session.resting - session.place
    return Capacity(budget, resting, 0 if left < 0 else min(1 + left // session.writing, MOST_TOGETHER))
