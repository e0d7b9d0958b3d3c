"""What an engine knows of its sessions and of the work that it has accepted for them, and the lock over all of it."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from longread.engine.curve import Curve
from longread.engine.interface import Appended, SessionInfo
from longread.inner_loop import ReadingState
from longread.inner_loop.state import shapes_of
from longread.session.sampling import Sampling

Tier = Literal["device", "host", "disk"]

KEPT_ANSWERS = 4
"""Appends of a session that are answered a second time without being read a second time: the newest."""
KEPT_LOSSES = 4096
"""Most tokens of an append whose losses are kept for that."""

Callback = Callable[[Any], None]
LOG = logging.getLogger(__name__)


class RecordsLock:
    """The lock over all records, for bookkeeping: the thread that computes holds it but for when it computes. It can be
    waited on.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.RLock())

    def __enter__(self) -> None:
        self._changed.acquire()

    def __exit__(self, *error: object) -> None:
        self._changed.release()

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """Lets others in while something is computed. For whoever holds it once."""
        self._changed.release()
        try:
            yield
        finally:
            self._changed.acquire()

    def notify(self) -> None:
        """Wakes whoever waits: something has changed."""
        with self._changed:
            self._changed.notify_all()

    def wait(self, seconds: float | None = None) -> None:
        """Waits for a change, with the lock held before and after."""
        self._changed.wait(seconds)

    def run(self, work: Callable[[], object]) -> None:
        """Does a piece of bookkeeping in the thread that calls, which something else has made necessary."""
        with self._changed:
            try:
                work()
            except Exception:
                LOG.exception("a piece of the engine's bookkeeping failed")
            self._changed.notify_all()


class Task:
    """One append, generation or score under way.

    Events go to whoever asks: to all subscribers if there are any, else they wait for the iterator. The last thing a
    subscriber is given is the outcome: the result, or the exception.
    """

    def __init__(self) -> None:
        lock = threading.RLock()
        self._changed, self._ended = threading.Condition(lock), threading.Condition(lock)
        self._events: deque[Any] = deque()
        self._subscribers: list[Callback] = []
        self._outcome: Any = None
        self._done = False
        self.cancelled = False
        """Whether somebody has asked it to stop."""
        self._wake: Callable[[], None] = lambda: None

    @property
    def done(self) -> bool:
        """Whether there is a result, or an error."""
        return self._done

    def cancel(self) -> None:
        """Asks it to stop: a text being read at the end of the mini-batch, a text being written after this token."""
        self.cancelled = True
        self._wake()

    def result(self, timeout: float | None = None) -> Any:
        """Waits for the result. Raises what went wrong, or `TimeoutError` after `timeout` seconds."""
        with self._changed:
            if not self._ended.wait_for(lambda: self._done, timeout):
                raise TimeoutError(f"the task is not finished after {timeout} seconds")
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome

    def __iter__(self) -> Iterator[Any]:
        """Events, in order, until there is an outcome; `result` gives it, and raises what went wrong."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._events or self._done)
                if not self._events:
                    return
                event = self._events.popleft()
            yield event

    def subscribe(self, callback: Callback) -> None:
        """Calls `callback` with every event, and then with the outcome; in the engine's thread, so it must not wait."""
        with self._changed:
            waiting = list(self._events)
            self._events.clear()
            if self._done:
                waiting.append(self._outcome)
            self._subscribers.append(callback)
            for event in waiting:
                self._tell(callback, event)

    def _emit(self, event: Any) -> None:
        with self._changed:
            if self._done:
                return
            if not self._subscribers:
                self._events.append(event)
                self._changed.notify_all()
            for callback in list(self._subscribers):
                self._tell(callback, event)

    def _finish(self, outcome: Any) -> None:
        with self._changed:
            if self._done:
                return
            self._outcome, self._done = outcome, True
            self._changed.notify_all()
            self._ended.notify_all()
            for callback in list(self._subscribers):
                self._tell(callback, outcome)

    def _tell(self, callback: Callback, event: Any) -> None:
        """A subscriber that fails, because its connection is gone say, hears no more; the engine goes on."""
        try:
            callback(event)
        except Exception:
            with contextlib.suppress(ValueError):
                self._subscribers.remove(callback)


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
    """Nobody can ask for it any more, or ever could: one of those that end with their task."""
    afterwards: list[Callable[[], None]] = field(default_factory=list)
    """What is to be done once it has no work any more."""
    links: set[Future[Any]] = field(default_factory=set)
    """Forks whose files are being made from its own, which must stay as they are for so long."""

    def rest(self, state: ReadingState) -> None:
        """Takes a new state."""
        self.state, self.shapes, self.nbytes = state, shapes_of(state), state.nbytes

    def extend(self, tokens: Sequence[int], nll: Sequence[float] | None = None) -> None:
        """Tokens have been read, with these losses; None: the session wrote them itself."""
        self.position += len(tokens)
        self.recent.extend(tokens)
        if self.deleted:
            return
        if nll is None:
            self.losses.add_written(len(tokens))
        else:
            self.losses.add(nll)

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
    """Pieces of text read, or mini-batches written, since it was admitted or has been in its lane."""
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
    refused: bool | None = None
    """Whether the inner step that `next` has asked for was refused; None: none was taken for it."""
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
    def writes(self) -> bool:
        """Whether it writes, or will when it has read."""
        return self.sampling is not None and not self.closing

    @property
    def learns(self) -> bool:
        return self.reader.learn if self.learn is None else self.learn

    def appended(self, cancelled: bool = False) -> Appended:
        """The result of reading."""
        return Appended(self.reader.position, self.nll, self.steps, self.rolled_back, cancelled)
