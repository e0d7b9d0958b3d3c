"""What goes into an engine and what comes out: limits, facts about sessions, events, times, errors; without torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from longread.config import UserError

TopTokens = list[tuple[int, float]]
"""The likeliest tokens of one place and their log-probabilities, likeliest first."""
BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Of `TimeCounts`, in seconds: the upper ends of all buckets but the last, which has none."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What an engine may use; None: no limit, but for memory."""

    device_bytes: int | None = None
    """Of sessions where the model computes; beyond it the least recently used move to the host's memory. None: 70 % of
    what is free there when the engine starts, in its container if that has a limit."""
    host_bytes: int | None = None
    """Of sessions in the host's memory beside those; beyond it the least recently used move to the disk, and without a
    disk none can be created. None: 70 % of what is free; on a CPU, what `device_bytes` leaves of that."""
    disk_bytes: int | None = None
    """Of session files; beyond it no session can be created."""
    max_sessions: int | None = None
    max_batch: int = 32
    """Sequences that are computed together."""
    max_waiting: int | None = None
    """Tasks under way or waiting."""
    batch_invariant: bool | None = None
    """Computes every sequence by itself, at the cost of speed: what a session gives is then bit for bit what it gives
    alone. None: where the model computes in float64. Otherwise products of several sequences may sum in another order
    than those of one."""


@dataclass(frozen=True, kw_only=True)
class Quota:
    """What one owner may have; None: what the engine has."""

    sessions: int | None = None
    nbytes: int | None = None
    """Of all that the owner's sessions remember; beyond it none is created."""
    room: int = 1
    """How many more sessions there must be room for, where more than the one are to follow."""
    uncounted: str | None = None
    """The label of sessions that do not count among `sessions`."""


@dataclass(frozen=True)
class SessionInfo:
    """Facts about one session at one moment."""

    id: str
    owner: str
    label: str
    position: int
    """Tokens read."""
    learn: bool
    nbytes: int
    """Of everything it remembers; the same at every length, once windows are full."""
    drift: float
    """‖W − W_0‖ / ‖W_0‖ of its fast weights."""
    steps: int
    """Inner steps taken."""
    rolled_back: int
    """Inner steps that were not taken because they would have done damage."""
    tier: str
    """Where it is now: "device", "host" or "disk"."""
    created: float
    used: float
    """Seconds since the epoch."""


@dataclass(frozen=True)
class Progress:
    """Event: some more tokens of a text have been read."""

    position: int
    """Of the session, after them."""
    nll: list[float]
    """−log p of each, in nats; NaN for the first token of all, which nothing predicts."""
    grad_norms: list[float]
    """Of the inner steps taken with them, before clipping."""
    seconds: float
    """That reading them took."""
    top: list[TopTokens] = field(default_factory=list)
    """For each token, what was likeliest in its place; empty unless `logprobs` were asked for."""


@dataclass(frozen=True)
class Appended:
    """Result: a text has been read, or scored."""

    position: int
    nll: list[float]
    """As in `Progress`, of all tokens read; empty where a very long append is asked for a second time."""
    steps: int
    rolled_back: int
    cancelled: bool = False
    """Reading stopped at the end of a mini-batch before all tokens were read."""


@dataclass(frozen=True)
class Token:
    """Event: a token has been written."""

    id: int
    logprob: float
    """log p under the model, before temperature and penalties."""
    top: TopTokens
    position: int
    """Of the session, after it."""


@dataclass(frozen=True)
class Finished:
    """Result: a text has been continued."""

    reason: str
    """"stop", "length" or "cancelled"."""
    position: int


@dataclass(frozen=True)
class Lost:
    """What could not be restored when the engine started, or when a session was wanted."""

    id: str
    owner: str
    position: int
    """Tokens that the session had read, as far as is known."""
    restored: int
    """Tokens of these that it still has; 0 where nothing is left and the session is gone."""
    reason: str


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


class Busy(UserError):
    """There is no room now; try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class OverQuota(UserError):
    """The owner has as much as it may; others may have room."""


class UnknownSession(UserError):
    """There is no such session, or it belongs to somebody else."""


class WrongPosition(UserError):
    """The session is not where the caller believes it is, but at `position`."""

    def __init__(self, expected: int, position: int) -> None:
        super().__init__(
            f"the session is at position {position}, not at {expected}; read its position and go on from there"
        )
        self.position = position


class TooLarge(UserError):
    """More was asked for than the engine can ever hold."""
