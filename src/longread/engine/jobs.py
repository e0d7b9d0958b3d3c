"""A piece of work from its acceptance to its end; how owners share the device, and how long clients wait.

All of this happens under the lock; only `Jobs.is_here` and what leaves a lane let it go for a moment, for the thread
that computes.
"""

from __future__ import annotations

import bisect
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from longread.config import InnerConfig, UserError
from longread.engine.interface import BOUNDS, Appended, Busy, Finished, Limits, TimeCounts, WrongPosition
from longread.engine.lanes import Lanes
from longread.engine.memory import Tiers
from longread.engine.persistence import Persistence
from longread.engine.records import KEPT_LOSSES, Answer, Job, Reader, RecordsLock
from longread.inner_loop import begin, drift
from longread.model import Transformer

LOG = logging.getLogger(__name__)


class Jobs:
    """All sessions and what they have to do; `persistence` makes it durable."""

    def __init__(self, model: Transformer, inner: InnerConfig, limits: Limits) -> None:
        self.model, self.inner, self.limits = model, inner, limits
        self.lock = RecordsLock()
        self.readers: dict[str, Reader] = {}
        alone = limits.batch_invariant
        self.alone = model.dtype == torch.float64 if alone is None else alone
        """Whether every sequence is computed by itself."""
        self.lanes = Lanes(model, limits.max_batch, self.lock, apart=self.alone)
        self.mover = ThreadPoolExecutor(1, "longread-mover")
        self.tiers = Tiers(model, limits, self.lanes, self.mover, self.lock.run)
        self.shares, self.latencies = Shares(), LatencyHistograms()
        self.counts = dict.fromkeys(("tokens_read", "tokens_written", "steps", "rolled_back", "groups", "rounds"), 0)
        self.paused: Sequence[Job] = ()
        """Those whose text is being read and stands still for others: nothing else may happen to their sessions."""
        self.closed = False
        """Whether nobody may come in any more."""
        self.persistence: Persistence
        self._tickets = 0

    @property
    def heads(self) -> list[Job]:
        """What each session that has work does now, or next."""
        return [reader.jobs[0] for reader in list(self.readers.values()) if reader.jobs]

    @property
    def tasks(self) -> int:
        """Under way or waiting."""
        return sum(not job.replay for reader in self.readers.values() for job in reader.jobs)

    def bare(self, owner: str, label: str, learn: bool) -> Reader:
        """A reader that has read nothing and is nowhere yet."""
        window = self.model.config.window_size
        return Reader(secrets.token_hex(16), owner, label, learn, deque(maxlen=window))

    def check_tokens(self, tokens: Sequence[int]) -> None:
        """Raises `UserError` for the first that is not in the vocabulary; for any thread."""
        V = self.model.config.vocab_size
        if len(tokens) and not (min(tokens) >= 0 and max(tokens) < V):
            wrong = next(token for token in tokens if not 0 <= token < V)
            raise UserError(f"token id {wrong} is not in the vocabulary of {V}; use the model's tokenizer")

    def check_waiting(self) -> None:
        """Raises `Busy` where there are as many tasks as there may be."""
        if self.closed:
            raise closing()
        most, now = self.limits.max_waiting, self.tasks
        if most is not None and now >= most:
            raise Busy(f"{now} tasks are under way or waiting, of at most {most}; try again later")

    def submit(self, job: Job) -> None:
        """Queues a job behind the others of its session."""
        with self.lock:
            job.task._wake = self.lock.notify
            self.to_the_end(job)
            self.shares.come(job.reader.owner, {other.reader.owner for other in self.heads})
            job.reader.jobs.append(job)
            job.reader.used = time.time()
            self.lock.notify()

    def to_the_end(self, job: Job) -> None:
        """Lets all others of its owner that wait now go first."""
        self._tickets += 1
        job.ticket = self._tickets

    def begin(self, job: Job) -> None:
        """Checks that a job can be done where its session stands, and makes durable what it will read."""
        reader, job.started = job.reader, True
        if reader.state is None and not reader.nbytes:  # of a task without a session
            reader.rest(begin(self.model))
        if job.digest is not None and not job.replay:
            known = reader.answer(job.expected, job.digest, job.key)
            if known is not None and job.expected != reader.position:
                self.end(job, known)
                return
            if job.expected is not None and job.expected != reader.position:
                raise WrongPosition(job.expected, reader.position)
        if job.sampling is not None and not reader.position and not job.tokens:
            raise UserError("there is nothing to continue; give a prompt, or append a text first")
        job.begun_at = reader.position
        if reader.durable and job.tokens and not job.replay:
            event = {"at": reader.position, "tokens": list(job.tokens), "learn": reader.learn}
            if job.wrote:
                event["wrote"] = True
            if job.digest is not None:
                event |= {"digest": job.digest, "key": job.key}
            self.persistence.log(reader, [event], lambda error: self._logged(job, error))
        else:
            self._logged(job, None)

    def _logged(self, job: Job, error: UserError | None) -> None:
        if error is not None:
            self.fail(job, error)
        else:
            job.ready = True
        job.settle()

    def is_here(self, job: Job) -> bool:
        """Whether the job's session is on the device or in a lane; if not, it may be on its way."""
        reader = job.reader
        if reader.lane is not None:
            return True
        return self.tiers.bring(reader, self.readers.values(), self.persistence) and reader.state is not None

    def computing(self, job: Job, *, wrote: bool = False) -> None:
        """Notes the time of a job that is computed for, and of the token that it has written."""
        if job.replay:
            return
        now = time.perf_counter()
        if not job.computed_for:
            self.latencies.observe("waiting", now - job.accepted)
            job.computed_for = True
        if wrote:
            first = job.token_at is None
            self.latencies.observe("first_token" if first else "next_token", now - (job.token_at or job.accepted))
            job.token_at = now

    def written(self, job: Job) -> None:
        """Books that the drawn token has been read, and the inner step in its lane that it asked for."""
        reader, token = job.reader, job.next
        if token is None:
            return
        if job.refused is not None:
            reader.steps, reader.rolled_back = reader.steps + 1, reader.rolled_back + job.refused
            self.counts["steps"] += 1
            self.counts["rolled_back"] += job.refused
            job.refused = None
        reader.extend([token])
        if reader.durable:
            reader.unlogged.append(token)
        job.next, job.written = None, job.written + 1
        job.served += 1 / self.model.config.mini_batch_size
        self.counts["tokens_written"] += 1

    # the ends of a job

    def guarded(self, jobs: Sequence[Job], work: Callable[..., None], *args: Any) -> None:
        """Does `work`; if it fails, so do the jobs, and nobody else."""
        try:
            work(*args)
        except UserError as error:
            for job in jobs:
                self.fail(job, error)
        except torch.OutOfMemoryError:
            for job in jobs:
                self.fail(job, Busy("the device has no memory left for this; try again later", retry_after=10.0))
        except Exception as error:
            for job in jobs:
                self.fail(job, error)

    def end(self, job: Job, outcome: Any) -> None:
        """Gives the outcome to whoever waits for it."""
        reader = job.reader
        reader.jobs.remove(job)
        job.ready = False  # who holds it for the rest of this turn computes nothing more of it
        reader.used = time.time()
        job.task._finish(outcome)
        job.settle()
        if not reader.jobs:
            self._after_jobs(reader)
        self.lock.notify()

    def _after_jobs(self, reader: Reader) -> None:
        afterwards, reader.afterwards = reader.afterwards, []
        for work in afterwards:
            work()
        if reader.deleted and not reader.jobs:
            self.readers.pop(reader.id, None)
        elif self.persistence.wants_snapshot(reader):
            self.persistence.keep(reader, lambda kept: None)

    def fail(self, job: Job, error: BaseException) -> None:
        """Ends a job with an error; its session stays where it is, in memory and on the disk."""
        reader = job.reader
        if not reader.jobs or reader.jobs[0] is not job:
            job.task._finish(error)
            return
        if reader.lane is not None:
            try:
                self.lanes.leave(job)
            except Exception:  # the device has lost them, not only this one
                LOG.exception("lanes are given up")
                for other in self.lanes.abandon():
                    self.persistence.give_back(other.reader)
                if job not in reader.jobs:  # it was lost with its session
                    return
        if reader.state is None and reader.tier == "device":
            self.end(job, error)
        elif job.ready and reader.durable and not job.replay and job.reads:
            self.persistence.cut(reader, lambda failed: self.end(job, error))
            job.closing, job.ready = True, False
        elif job.ready and reader.unlogged:
            self.close_writing(job, error)
        else:
            self.end(job, error)

    def end_reading(self, job: Job, cancelled: bool = False) -> None:
        """Ends a job that was to read, and has."""
        reader = job.reader
        self.measure_drift(reader)
        job.closing, job.ready = True, False
        result = job.appended(cancelled)
        if cancelled and reader.durable and not job.replay:
            self.persistence.cut(reader, lambda error: self.end(job, error or result))
            return
        if job.digest is not None and not cancelled:
            kept = (
                result
                if len(result.nll) <= KEPT_LOSSES
                else Appended(result.position, [], result.steps, result.rolled_back)
            )
            reader.answers.append(Answer(job.begun_at, job.digest, job.key, kept))
        self.end(job, result)

    def end_writing(self, job: Job, reason: str) -> None:
        """Ends a job that writes; its session leaves its lane."""
        if job.reader.lane is not None:
            self.lanes.leave(job, to_host=not self.tiers.has_room_to_leave(self.readers.values()))
        self.measure_drift(job.reader)
        self.close_writing(job, Finished(reason, job.reader.position))

    def cancel_reading(self, job: Job) -> None:
        """Ends reading where it is, and with it a job that was to write afterwards."""
        if job.sampling is None:
            self.end_reading(job, cancelled=True)
        else:
            self.measure_drift(job.reader)
            self.close_writing(job, Finished("cancelled", job.reader.position))

    def close_writing(self, job: Job, outcome: Any) -> None:
        """Makes what was written durable, and then gives the outcome."""
        reader = job.reader
        job.closing, job.ready = True, False
        if not reader.durable or not reader.unlogged:
            reader.unlogged = []
            self.end(job, outcome)
            return
        start, written = reader.position - len(reader.unlogged), reader.unlogged
        event = {"at": start, "tokens": written, "learn": job.learns, "wrote": True}
        reader.unlogged = []

        def logged(error: UserError | None) -> None:
            if error is not None:  # what nobody can keep has not happened
                self.persistence.reopen(reader)
            self.end(job, error or outcome)

        self.persistence.log(reader, [event], logged)

    def measure_drift(self, reader: Reader, after: int = 1) -> None:
        """Where so many inner steps were taken since it was measured; not of a fork that nobody can ask about."""
        state, steps = reader.state, reader.steps
        if state is None or steps - reader.drift_steps < after or reader.deleted:
            return
        with self.lock.released():
            measured = drift(self.model, state.fast).item()
        reader.drift, reader.drift_steps = measured, steps


def closing() -> Busy:
    """What to say at the end."""
    return Busy("the engine is closing; try again when it is back", retry_after=10.0)


class Shares:
    """Seconds of the device that each owner has had. Time away is no credit: who comes back begins with the least that
    any owner has who has work under way.
    """

    def __init__(self) -> None:
        self._had: dict[str, float] = {}

    def had(self, owner: str) -> float:
        """The smaller, the sooner it is an owner's turn."""
        return self._had.get(owner, 0.0)

    def come(self, owner: str, others: Collection[str]) -> None:
        """An owner begins to have work; `others` have some already."""
        self._had = {other: self.had(other) for other in (*others, owner)}
        if owner not in others:
            self._had[owner] = max(self._had[owner], min(map(self.had, others), default=0.0))

    def charge(self, owners: Sequence[str], seconds: float) -> None:
        """The device has worked so long for all of these, a part each; who had several parts is named as often."""
        for owner in owners:
            self._had[owner] = self.had(owner) + seconds / len(owners)


class LatencyHistograms:
    """What is counted: `waiting`, from a task's acceptance to the first computing for it; `first_token`, from its
    acceptance to its first written token; `next_token`, from one written token to the next of the same task.
    """

    def __init__(self) -> None:
        names = ("waiting", "first_token", "next_token")
        self._counts = {name: [0] * (len(BOUNDS) + 1) for name in names}
        self._seconds = dict.fromkeys(names, 0.0)

    def observe(self, name: str, seconds: float) -> None:
        """Counts one; for one thread at a time."""
        self._counts[name][bisect.bisect_left(BOUNDS, seconds)] += 1
        self._seconds[name] += seconds

    def read(self) -> dict[str, TimeCounts]:
        """All of them now."""
        return {name: TimeCounts(tuple(counts), self._seconds[name]) for name, counts in self._counts.items()}
