"""The processes of one training run: rank and size, decisions that all take alike, and deadlines that name who is late.

`torchrun` (https://docs.pytorch.org/docs/stable/elastic/run.html) tells each process its place in the environment.
What ranks decide goes through a group of its own over gloo, on CPUs, so that it never waits for a GPU and a peer that
is gone is an exception and not a hang.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist

from longread.config import UserError
from longread.parallel.failure import RankFailed, agreed, first_sentence, is_agreed, is_of_peers
from longread.parallel.launch import ONE, Launch
from longread.parallel.meeting import meeting_store

DEADLINE = 600.0
"""Seconds that a rank waits for the others before it gives up, and says for whom."""
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Its name since torch 2.13."""
BETWEEN_QUESTIONS = 1e-4
"""Seconds; a step on a GPU takes a hundred times as long, and more."""
_PLACE = "longread/place/"
_UNSEEN = "not seen yet"
T = TypeVar("T")


def group_of(lines: Sequence[Sequence[int]], deadline: float) -> dist.ProcessGroup:
    """The group of this rank, of those that `lines` of ranks make. All ranks make all of them together."""
    groups = [dist.new_group(list(line), timeout=timedelta(seconds=deadline)) for line in lines]
    return next(group for line, group in zip(lines, groups, strict=True) if dist.get_rank() in line)


class World:
    """The ranks of a run. With one of them each method returns what it was given."""

    def __init__(self, launch: Launch = ONE, deadline: float = DEADLINE) -> None:
        """Several ranks need `torch.distributed` to be initialised; `joined` does so. All ranks make it together."""
        self.launch, self.deadline = launch, deadline
        self.rank, self.size = launch.rank, launch.size
        self.step = 0
        """That is being taken, from 1; for messages."""
        self.votes: Any = None
        """The group in which they decide, over gloo; None alone."""
        self._places, self._at, self._said = _PLACE, "the beginning", ""
        if self.size > 1:
            self._store = dist.distributed_c10d._get_default_store()
            self.votes = self.new_votes()

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes for all."""
        return self.rank == 0

    def new_votes(self) -> Any:
        """A group of all ranks on CPUs, for a thread that must not meet the others' decisions. All make it together."""
        with self.waiting("making a group"):
            return dist.new_group(backend="gloo", timeout=timedelta(seconds=self.deadline))

    def beside(self, name: str) -> Self:
        """The same ranks, with decisions and places apart, for a thread called `name`. All make it together."""
        other = type(self)(self.launch, self.deadline)
        other._places = f"{_PLACE}{name}/"
        return other

    def agree(self, first: float, *votes: float, at: str = "a decision") -> tuple[float, ...]:
        """The largest of each rank's votes; for flags, whether anybody has set them."""
        return self._together((first, *votes), dist.ReduceOp.MAX, at)

    def total(self, *numbers: float, at: str = "a sum") -> tuple[float, ...]:
        """The sum of each rank's numbers."""
        return self._together(numbers, dist.ReduceOp.SUM, at)

    def _together(self, numbers: tuple[float, ...], operation: Any, at: str) -> tuple[float, ...]:
        if self.size == 1:
            return tuple(float(number) for number in numbers)
        held = torch.tensor(numbers, dtype=torch.float64)
        with self.waiting(at):
            dist.all_reduce(held, operation, group=self.votes)
        return tuple(held.tolist())

    def table(self, *numbers: float, at: str = "a table") -> list[tuple[float, ...]]:
        """The numbers of every rank, in their order."""
        mine = torch.tensor(numbers, dtype=torch.float64)
        if self.size == 1:
            return [tuple(mine.tolist())]
        every = torch.empty(self.size * len(numbers), dtype=torch.float64)
        with self.waiting(at):
            all_gather(every, mine, group=self.votes)
        return [tuple(row) for row in every.view(self.size, -1).tolist()]

    def first(self, value: T, at: str = "what rank 0 says") -> T:
        """The value of rank 0, which must be made of what JSON knows."""
        if self.size == 1:
            return value
        found: T = json.loads(self._from(0, json.dumps(value) if self.is_first else "", at))
        return found

    def each(self, value: T, at: str = "what each rank says") -> list[T]:
        """The value of every rank, in their order; they must be made of what JSON knows."""
        if self.size == 1:
            return [value]
        mine = json.dumps(value)
        return [json.loads(self._from(rank, mine if rank == self.rank else "", at)) for rank in range(self.size)]

    def _from(self, rank: int, text: str, at: str) -> str:
        """The text of one rank, for all."""
        said = bytearray(text.encode()) if rank == self.rank else bytearray()
        with self.waiting(at):
            length = torch.tensor(len(said))
            dist.broadcast(length, rank, group=self.votes)
            held = torch.frombuffer(said or bytearray(max(1, int(length))), dtype=torch.uint8)
            dist.broadcast(held, rank, group=self.votes)
        return held.numpy().tobytes()[: int(length)].decode()

    @contextlib.contextmanager
    def together(self, at: str) -> Iterator[None]:
        """Whatever the block raises on any rank is raised on all: there itself, elsewhere as `RankFailed`."""
        error: Exception | None = None
        try:
            yield
        except RankFailed:  # all know it
            raise
        except Exception as caught:
            if self.size == 1 or is_agreed(caught):
                raise
            error = caught
        try:
            found = self.word(None if error is None else str(error), at)
        except RankFailed:
            if error is None:
                raise
        if error is not None:
            raise agreed(error)
        if found:
            failed = RankFailed(f"rank {found[0]} failed at {at}: {found[1]}")
            failed.is_said_elsewhere = True
            raise agreed(failed)

    def word(self, text: str | None, at: str) -> tuple[int, str] | None:
        """The lowest rank that has something to say, and what; None if none has."""
        (most,) = self.agree(0 if text is None else self.size - self.rank, at=at)
        if not most:
            return None
        rank = self.size - int(most)
        return rank, text or "" if self.size == 1 else self._from(rank, text or "", at)

    def wait(self, done: Callable[[], bool], at: str) -> None:
        """Returns when `done()`: a GPU has computed what the ranks compute together. `RankFailed` if it is late."""
        self.say(at)
        began = time.monotonic()
        while not done():
            if self.size > 1 and time.monotonic() - began > self.deadline:
                raise self.late(at, f"no answer within {self.deadline:g} seconds")
            time.sleep(BETWEEN_QUESTIONS)

    @contextlib.contextmanager
    def waiting(self, at: str) -> Iterator[None]:
        """Around a collective: says where this rank is, and turns a peer that is late or gone into one sentence."""
        if self.size == 1:
            yield
            return
        self.say(at)
        try:
            yield
        except (UserError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError) as error:
            raise self.late(at, str(error)) from error

    @contextlib.contextmanager
    def naming_the_late(self) -> Iterator[None]:
        """Around all that ranks do together: what PyTorch says of a peer that is late or gone becomes one sentence."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not is_of_peers(error):
                raise
            raise self.late(self._at, str(error)) from error

    def say(self, at: str) -> None:
        """Leaves word where this rank is, for those that wait for it."""
        said, self._at = self._said, at
        self._said = f"step {self.step}, {at}"
        if self.size > 1 and self._said != said:
            with contextlib.suppress(RuntimeError):  # the store is gone: what follows will say so
                self._store.set(f"{self._places}{self.rank}", self._said)

    def late(self, at: str, reason: str) -> RankFailed:
        """The exception of a rank that waited in vain `at` some place; `reason` is the library's."""
        mine, others = f"step {self.step}, {at}", []
        for rank in range(self.size):
            place = self._place_of(rank)
            if rank != self.rank and (place != mine or self.size == 2):
                others.append(f"rank {rank} ({place})")
        who = ", ".join(others[:8]) + (f" and {len(others) - 8} more" if len(others) > 8 else "")
        return RankFailed(
            f"rank {self.rank} waited at step {self.step}, {at}, for {who or 'a rank that is gone'}: "
            f"{first_sentence(reason)}; the checkpoints are whole, start again with --resume"
        )

    def _place_of(self, rank: int) -> str:
        with contextlib.suppress(RuntimeError):
            if self._store.check([f"{self._places}{rank}"]):
                return str(self._store.get(f"{self._places}{rank}").decode())
        return _UNSEEN


ALONE = World()


@contextlib.contextmanager
def _ended_by_interrupts() -> Iterator[None]:
    """Ctrl-C ends the process at once: Python would not hear of it before the others have come, and nothing is lost."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def joined(device: str | torch.device = "auto", *, deadline: float = DEADLINE) -> Iterator[tuple[World, str]]:
    """The world of this process and the device that it computes on; leaves again what it has joined.

    Where `torchrun` has started several, they meet here: over gloo, and over NCCL where there are GPUs, one for each
    process of a machine. A `torch.distributed` that was initialised before is taken as it is, and left so. What PyTorch
    raises in the block because a rank is late or gone becomes a `RankFailed`.

    Raises `UserError` if a machine has fewer GPUs than processes, or another number of processes than others.
    """
    launch = Launch.from_environment()
    if launch.size == 1:
        yield World(launch, deadline), str(device)
        return
    name = str(device)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda:"):
        raise UserError(f"device {name} is one for {launch.size} processes; give cuda, and each takes a GPU of its own")
    if name == "cuda":
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")  # graphs with sums do not go with expandable segments else
        if launch.local_size > torch.cuda.device_count():
            raise UserError(
                f"{launch.local_size} processes share {torch.cuda.device_count()} GPUs; "
                f"start torchrun with --nproc-per-node {torch.cuda.device_count()}, or give --device cpu"
            )
        name = f"cuda:{launch.local_rank}"
        torch.cuda.set_device(launch.local_rank)
    began = not dist.is_initialized()
    if began:
        on_gpu = name.startswith("cuda")
        with _ended_by_interrupts():
            store = meeting_store(launch.rank, launch.size, deadline)
            try:
                dist.init_process_group(
                    "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                    store=store,
                    rank=launch.rank,
                    world_size=launch.size,
                    timeout=timedelta(seconds=deadline),
                )
            except RuntimeError as error:
                if not is_of_peers(error):
                    raise
                reason = first_sentence(str(error))
                raise RankFailed(
                    f"rank {launch.rank} lost another while they met: {reason}; start all again"
                ) from error
    try:
        world = World(launch, deadline)
        with world.naming_the_late():
            most, fewest = (number for (number,) in map(world.agree, (launch.local_size, -launch.local_size)))
            if most != -fewest or launch.size % most:
                raise UserError(
                    f"machines have {-fewest:g} to {most:g} of {launch.size} processes; start as many on each"
                )
            yield world, name
    finally:
        if began:
            dist.destroy_process_group()
