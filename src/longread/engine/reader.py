"""What an engine knows of one session, and of one piece of work for it."""

from __future__ import annotations

import hashlib
import time
from array import array
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from longread.engine.curve import Curve
from longread.engine.interface import Appended, SessionInfo
from longread.engine.task import Task
from longread.inner_loop import ReadingState
from longread.inner_loop.batches import shapes_of
from longread.session.sampling import Sampling

Tier = Literal["device", "host", "disk"]

KEPT_ANSWERS = 4
"""Appends of a session that are answered a second time without being read a second time: the newest."""
KEPT_LOSSES = 4096
"""Most tokens of an append whose losses are kept for that."""


@dataclass
class Answer:
    """An append that has been acknowledged."""

    start: int
    digest: str
    key: str | None
    result: Appended

    def answers(self, start: int | None, digest: str, key: str | None) -> bool:
        """Whether this is the same append once more."""
        same = self.start == start or (key is not None and self.key == key)
        return same and self.digest == digest


def digest_of(tokens: Sequence[int]) -> str:
    """SHA-256, in hex, of token ids."""
    return hashlib.sha256(array("q", tokens).tobytes()).hexdigest()


@dataclass(eq=False)
class Reader:
    """One session. What it has read is changed by the thread that computes alone, and always under the lock."""

    id: str
    owner: str
    label: str
    learn: bool
    recent: deque[int]
    """The newest tokens, a window of them."""
    durable: bool = False
    """Whether it has files."""
    state: ReadingState | None = None
    """Where `tier` says; None on the disk, and while it is in a lane."""
    shapes: Hashable = None
    """Of the state."""
    position: int = 0
    steps: int = 0
    rolled_back: int = 0
    nbytes: int = 0
    tier: Tier = "device"
    created: float = field(default_factory=time.time)
    used: float = field(default_factory=time.time)
    lane: int | None = None
    moving: bool = False
    """Between tiers; nothing else may happen to it."""
    jobs: deque[Job] = field(default_factory=deque)
    """The first is under way."""
    answers: deque[Answer] = field(default_factory=lambda: deque(maxlen=KEPT_ANSWERS))
    losses: Curve = field(default_factory=Curve)
    """Of all that it has read."""
    unlogged: list[int] = field(default_factory=list)
    """Tokens written since the database was."""
    drift: float = 0.0
    """As it was last measured, after `drift_steps` inner steps."""
    drift_steps: int = 0
    logged: int = 0
    """Tokens in the database since the newest snapshot."""
    deleted: bool = False
    afterwards: list[Callable[[], None]] = field(default_factory=list)
    """What is to be done once it has no work any more."""
    links: set[Future[Any]] = field(default_factory=set)
    """Forks whose files are being made from its own, which must stay as they are for so long."""

    def rest(self, state: ReadingState) -> None:
        """Takes a new state."""
        self.state, self.shapes, self.nbytes = state, shapes_of(state), state.nbytes

    @property
    def job(self) -> Job | None:
        """The work under way, or to be started next."""
        return self.jobs[0] if self.jobs else None

    @property
    def restoring(self) -> bool:
        """Whether what came after its snapshot is still being read again."""
        return any(job.replay for job in self.jobs)

    def info(self) -> SessionInfo:
        """Facts about it now."""
        return SessionInfo(
            id=self.id,
            owner=self.owner,
            label=self.label,
            position=self.position + sum(len(job.tokens) - job.done for job in self.jobs if job.replay),
            learn=self.learn,
            nbytes=self.nbytes,
            drift=self.drift,
            steps=self.steps,
            rolled_back=self.rolled_back,
            tier=self.tier,
            created=self.created,
            used=self.used,
        )

    def answer(self, start: int | None, digest: str, key: str | None) -> Appended | None:
        """What was answered to the same append before."""
        return next((kept.result for kept in self.answers if kept.answers(start, digest, key)), None)


@dataclass(eq=False)
class Job:
    """Some tokens to read, some to write, or both, for one reader."""

    task: Task
    reader: Reader
    tokens: Sequence[int] = ()
    sampling: Sampling | None = None
    expected: int | None = None
    key: str | None = None
    logprobs: int = 0
    replay: bool = False
    """Reads what came after a snapshot: nothing is logged or counted as new."""
    wrote: bool = False
    """Whether its tokens were written by the session."""
    learn: bool | None = None
    """None: as the session does."""
    ticket: int = 0
    """Of the jobs of one owner the one with the smallest is next."""
    admitted: bool = False
    """Whether it may have its session on the device now."""
    served: float = 0.0
    """TextPieces read, or mini-batches written, since it was admitted or has been in its lane."""
    started: bool = False
    ready: bool = False
    """Its tokens are in the database, or need not be."""
    begun_at: int = 0
    digest: str | None = None
    done: int = 0
    nll: list[float] = field(default_factory=list)
    steps: int = 0
    rolled_back: int = 0
    generator: torch.Generator | None = None
    written: int = 0
    next: int | None = None
    """Drawn, and not yet read."""
    accepted: float = field(default_factory=time.perf_counter)
    computed_for: bool = False
    """Whether anything was computed for it yet."""
    token_at: float | None = None
    """When its newest token was written."""
    closing: bool = False
    """Nothing is left to do but to make the result durable."""

    once_settled: list[Callable[[], None]] = field(default_factory=list)
    """What is to be done once its tokens are durable, or it has ended."""

    def settle(self) -> None:
        """Does what has waited for that."""
        waiting, self.once_settled = self.once_settled, []
        for work in waiting:
            work()

    @property
    def reads(self) -> bool:
        """Whether it still has tokens of a text to read."""
        return self.done < len(self.tokens)

    @property
    def learns(self) -> bool:
        return self.reader.learn if self.learn is None else self.learn

    def appended(self, cancelled: bool = False) -> Appended:
        """The result of reading."""
        return Appended(self.reader.position, self.nll, self.steps, self.rolled_back, cancelled)
