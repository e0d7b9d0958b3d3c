"""Where sessions are: with the model, in the host's memory, or on the disk; and how many fit, also before there is an
engine.

Where there is no room, one of the owner who holds most moves down, the least recently used of its own: nobody loses a
place to another's thousandth session. Moves take long, so they are made by a thread of their own, from one value to
another; the thread that computes only decides.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Executor
from typing import NamedTuple

import torch

from longread.config import UserError
from longread.engine.copies import beside, carried
from longread.engine.interface import Limits
from longread.engine.lanes import HOST, Lanes, fast_nbytes, largest_session
from longread.engine.persistence import Persistence
from longread.engine.records import Reader
from longread.inner_loop import ReadingState
from longread.inner_loop.places import place_nbytes
from longread.model import Transformer, free_bytes

SHARE = 0.7
"""Of free memory that sessions may take where no limit is given; the rest is for computing, and for copies."""
MOST_TOGETHER = Limits().max_batch
"""Sessions that are computed together, however much memory there is."""
REFUSED_SECONDS = 30.0
"""After a disk has taken no session until it is tried again."""


def least_device_bytes(model: Transformer) -> int:
    """Bytes without which an engine cannot work: a session, and the place where it writes."""
    return 2 * largest_session(model)


def budget(model: Transformer, limits: Limits) -> tuple[int, int]:
    """Bytes for sessions on the device, and beside it in the host's memory; a share of what is free now, by default.

    On a CPU both are one memory: by default it is all the device's, and sessions go from there to the disk.
    """
    device, host = limits.device_bytes, limits.host_bytes
    free = int(SHARE * free_bytes(HOST))
    if model.device.type == "cuda":
        if device is None:
            device = int(SHARE * free_bytes(model.device))
        return device, free if host is None else host
    if device is None:
        device = max(least_device_bytes(model), free - (host or 0))
    return device, max(0, free - device) if host is None else host


class Tiers:
    """The budget of an engine."""

    def __init__(
        self,
        model: Transformer,
        limits: Limits,
        lanes: Lanes,
        mover: Executor,
        post: Callable[[Callable[[], None]], object],
    ) -> None:
        self.model, self.limits, self.lanes, self._mover, self._post = model, limits, lanes, mover, post
        self.largest = largest_session(model)
        self.device_bytes, self.host_bytes = budget(model, limits)
        self._disk_refuses_until = 0.0
        least = least_device_bytes(model)
        if self.device_bytes < least:
            raise UserError(
                f"device_bytes is {self.device_bytes}; one session of this model and the place where it writes "
                f"need {least}, so allow at least that"
            )

    def usage(self, readers: Iterable[Reader]) -> dict[str, int]:
        """Bytes of sessions by tier; lanes are on the device."""
        used = {"device": self.lanes.nbytes, "host": 0, "disk": 0}
        for reader in readers:
            if reader.lane is None:
                used[reader.tier] += reader.nbytes
        return used

    def bring(self, reader: Reader, readers: Iterable[Reader], persistence: Persistence) -> bool:
        """Whether the reader is on the device; if not, it is on its way, or room is being made for it."""
        if reader.moving:
            return False
        if reader.tier == "device":
            return True
        readers = list(readers)
        others = [other for other in readers if other is not reader]
        used = self.usage(others)
        if used["host"] > self.host_bytes and any(other.moving and other.tier == "host" for other in others):
            return False  # until the disk has taken them
        too_much = self._without_empty_lanes(readers, used["device"] + self.largest - self.device_bytes)
        if too_much > 0 and (self._relieve(others, too_much) or any(self._in_use(other) for other in others)):
            return False
        if reader.tier == "disk":
            persistence.fetch(reader)
        else:
            self._carry(reader, self.model.device, "device")
        return False

    def admits(self, readers: Iterable[Reader]) -> bool:
        """Whether work for one more session can begin: all that is under way must fit on the device when it is done."""
        admitted = sum(reader.lane is None and any(job.admitted for job in reader.jobs) for reader in readers)
        return not admitted or self.lanes.nbytes + (admitted + 1) * self.largest <= self.device_bytes

    def has_room_to_leave(self, readers: Iterable[Reader]) -> bool:
        """Whether one of those that write can leave its lane and lie on the device; its fast weights do already."""
        readers = list(readers)
        used = self.usage(readers)["device"] + self.largest - fast_nbytes(self.model)
        return self._without_empty_lanes(readers, used - self.device_bytes) <= 0

    @property
    def disk_refuses(self) -> bool:
        """Whether the disk has just failed to take a session."""
        return time.monotonic() < self._disk_refuses_until

    def make_lane(self, readers: Iterable[Reader]) -> bool:
        """Whether there is an empty lane; if not, room may be being made for one."""
        lanes, readers = self.lanes, list(readers)
        count = len(lanes.jobs)
        if count < lanes.lanes:
            return True
        if count >= lanes.most:
            return False
        used = self.usage(readers)["device"]
        for more in (max(1, min(count, lanes.most - count)), 1):
            too_much = used + more * lanes.lane_nbytes - self.device_bytes
            if too_much <= 0 or (count == 0 and more == 1 and not self._relieve(readers, too_much)):
                lanes.resize(lanes.lanes + more)
                return True
        self._relieve(readers, too_much)
        return False

    def balance(self, readers: Iterable[Reader], persistence: Persistence) -> None:
        """Moves down what is too much."""
        readers = list(readers)
        used = self.usage(readers)
        too_much = self._without_empty_lanes(readers, used["device"] - self.device_bytes)
        if too_much > 0:
            self._relieve(readers, too_much)
        too_much = used["host"] - self.host_bytes
        if too_much <= 0:
            return
        for reader in leaving([reader for reader in readers if reader.tier == "host"]):
            if too_much <= 0 or self.disk_refuses:
                break
            if reader.moving or self._can_be_dropped(reader):
                too_much -= reader.nbytes
                if not reader.moving:
                    self._drop(reader, persistence)

    def _can_be_dropped(self, reader: Reader) -> bool:
        return reader.durable and not any(job.started or job.replay for job in reader.jobs)

    def _in_use(self, reader: Reader) -> bool:
        return reader.tier == "device" and (reader.moving or reader.lane is not None or bool(reader.jobs))

    def _without_empty_lanes(self, readers: Iterable[Reader], too_much: int) -> int:
        """The bytes that are still too much when the lanes that nobody is in or waits for have been given back for it.

        Copying the others takes milliseconds; moving a session to the host and back takes seconds.
        """
        lanes = self.lanes
        if too_much <= 0 or len(lanes.jobs) == lanes.lanes:
            return too_much
        loose = (reader for reader in readers if reader.lane is None)
        needed = len(lanes.jobs) + sum(any(job.admitted and job.writes for job in reader.jobs) for reader in loose)
        if needed < lanes.lanes:
            before = lanes.nbytes
            lanes.resize(needed)
            too_much -= before - lanes.nbytes
        return too_much

    def _relieve(self, readers: Iterable[Reader], too_much: int) -> bool:
        """Moves idle readers to the host, or those whose work has to wait; says whether any is on its way."""
        on_the_way = False
        for reader in leaving([reader for reader in readers if reader.tier == "device"]):
            if too_much <= 0:
                break
            if reader.lane is not None:
                continue
            if not reader.moving:
                if reader.state is None or any(job.admitted for job in reader.jobs):
                    continue
                self._carry(reader, torch.device("cpu"), "host")
            on_the_way = True
            too_much -= reader.nbytes
        if too_much > 0 and not self.lanes.jobs and self.lanes.nbytes:
            self.lanes.resize(0)
            return True
        return on_the_way

    def _carry(self, reader: Reader, device: torch.device, tier: str) -> None:
        """Between the device and the host."""
        state, reader.moving = reader.state, True
        if state is None:
            raise LookupError(f"session {reader.id} has no state to move")

        def work() -> None:
            moved: ReadingState | None = None
            try:
                moved = self._copy(state, device)
            finally:
                self._post(lambda: arrived(moved))

        def arrived(moved: ReadingState | None) -> None:
            reader.moving = False
            if moved is not None and reader.state is state:
                reader.rest(moved)
                reader.tier = "host" if tier == "host" else "device"

        self._mover.submit(work)

    def _copy(self, state: ReadingState, device: torch.device) -> ReadingState:
        with beside(self.model.device):
            return carried(state, device)

    def _drop(self, reader: Reader, persistence: Persistence) -> None:
        state, reader.moving = reader.state, True

        def done(kept: bool | UserError) -> None:
            reader.moving = False
            if isinstance(kept, UserError):
                self._disk_refuses_until = time.monotonic() + REFUSED_SECONDS
            elif kept and reader.state is state and self._can_be_dropped(reader):
                reader.state, reader.tier = None, "disk"

        persistence.keep(reader, done)


def leaving(readers: Collection[Reader]) -> Iterator[Reader]:
    """The readers of one tier in the order in which they leave it: those without work first; of these, always one of
    the owner that then holds most bytes there, and of its own the least recently used.
    """
    held: Counter[str] = Counter()
    for reader in readers:
        held[reader.owner] += reader.nbytes
    for busy in (False, True):
        waiting: defaultdict[str, deque[Reader]] = defaultdict(deque)
        for reader in sorted(readers, key=lambda reader: reader.used):
            if bool(reader.jobs) == busy:
                waiting[reader.owner].append(reader)
        while waiting:
            owner = max(waiting, key=lambda owner: (held[owner], -waiting[owner][0].used))
            reader = waiting[owner].popleft()
            held[owner] -= reader.nbytes
            if not waiting[owner]:
                del waiting[owner]
            yield reader


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
    if not config.decodes_in_place:
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
