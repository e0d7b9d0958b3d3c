"""The engine's thread: takes the work there is in turns, so that nobody waits for somebody else's long text.

A turn is: one token of every session that writes, with the inner step where one is due, then some mini-batches of one
group of sessions that read. Sessions are a group when what they are about to read has the same length and what they
remember the same shapes; with `Limits.batch_invariant`, each is a group of its own. While somebody writes, reading gets
half of the time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from longread.config import InnerConfig, UserError
from longread.engine.interface import Appended, Busy, Finished, Limits, WrongPosition
from longread.engine.lanes import Lanes
from longread.engine.reader import KEPT_LOSSES, Answer, Job, Reader, digest_of
from longread.engine.tiers import Tiers
from longread.engine.timings import Stopwatches
from longread.engine.turns import Turns
from longread.model import Transformer

LOG = logging.getLogger(__name__)


class Worker(threading.Thread):
    """Reads and writes; `files` is where it makes things durable."""

    def __init__(self, model: Transformer, inner: InnerConfig, limits: Limits) -> None:
        super().__init__(name="longread-engine", daemon=True)
        self.model, self.inner, self.limits = model, inner, limits
        self.readers: dict[str, Reader] = {}
        alone = limits.batch_invariant
        self.alone = model.dtype == torch.float64 if alone is None else alone
        """Whether every sequence is computed by itself."""
        self.lanes = Lanes(model, limits.max_batch, apart=self.alone)
        self.mover = ThreadPoolExecutor(1, "longread-mover")
        self.tiers = Tiers(model, limits, self.lanes, self.mover, self.post)
        self.counts = dict.fromkeys(("tokens_read", "tokens_written", "steps", "rolled_back", "groups", "rounds"), 0)
        self.stopwatches = Stopwatches()
        self.files: Any = None
        self._inbox: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._ended = False
        self.turns = Turns(self)

    # what other threads may call

    def post(self, work: Callable[[], None]) -> bool:
        """Runs `work` in this thread, between two pieces of work; says False where the thread has ended."""
        with self._changed:
            if not self._ended:
                self._inbox.append(work)
                self._changed.notify()
            return not self._ended

    def call(self, function: Callable[[], Any]) -> Any:
        """What `function` gives when it has run in this thread.

        If that is a future, what comes of it; if that can be called, what it gives in the thread of the caller.
        """
        future: Future[Any] = Future()

        def work() -> None:
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        if not self.post(work):
            raise Busy("the engine is closed; start it again")
        found: Any = future
        while isinstance(found, Future) or callable(found):
            found = found.result() if isinstance(found, Future) else found()
        return found

    def wake(self) -> None:
        """Lets the thread look for work."""
        self.post(lambda: None)

    def stop(self) -> None:
        """Ends the thread once nothing is under way."""
        self._closing = True
        self.wake()

    # the loop

    def run(self) -> None:
        """Works until it is told to stop."""
        if self.model.device.type == "cuda":
            torch.cuda.set_device(self.model.device)
        with torch.no_grad():
            while True:
                with self._changed:
                    inbox, self._inbox = self._inbox, deque()
                for work in inbox:
                    try:
                        work()
                    except Exception:
                        LOG.exception("a piece of the engine's work failed")
                try:
                    worked = self._turn()
                except Exception as error:
                    LOG.exception("a turn of the engine failed")
                    worked = self._give_up_all(error)
                if worked:
                    continue
                with self._changed:
                    if self._closing and not self._inbox and not any(r.jobs or r.moving for r in self.readers.values()):
                        self._ended = True
                        return
                    if not self._inbox:
                        self._changed.wait(1.0)

    def _give_up_all(self, error: Exception) -> bool:
        """Fails all jobs under way after an error that belongs to none; says that there may be others."""
        for reader in list(self.readers.values()):
            if reader.jobs:
                try:
                    self.fail(reader.jobs[0], error)
                except Exception:
                    LOG.exception("a job could not be ended")
        return True

    def _turn(self) -> bool:
        """Does the next pieces of work; says whether there were any."""
        jobs = [reader.jobs[0] for reader in list(self.readers.values()) if reader.jobs]
        for job in sorted(jobs, key=lambda job: job.reader.used):
            if not job.started and self.tiers.admits(self.readers.values()):
                self.guarded([job], self._begin, job)
        jobs = [reader.jobs[0] for reader in list(self.readers.values()) if reader.jobs and reader.jobs[0].ready]
        jobs.sort(key=lambda job: job.reader.served)
        worked = False
        for job in [job for job in jobs if not job.reads and job.sampling is None]:  # it only wanted to be here
            if self.is_here(job):
                self.guarded([job], self.end_reading, job)
                worked = True
        worked = self.turns.write(jobs) or worked
        worked = self.turns.read(jobs) or worked
        self.tiers.balance(self.readers.values(), self.files)
        return worked

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

    def computed(self, job: Job, *, wrote: bool = False) -> None:
        """Notes the time of a job that has been computed for, and of the token that it may have written."""
        if job.replay:
            return
        now = time.perf_counter()
        if not job.computed_for:
            self.stopwatches.note("waiting", now - job.accepted)
            job.computed_for = True
        if wrote:
            first = job.token_at is None
            self.stopwatches.note("first_token" if first else "next_token", now - (job.token_at or job.accepted))
            job.token_at = now

    # from the start of a job to its end

    def submit(self, job: Job) -> None:
        """Queues a job behind the others of its reader."""
        job.task._wake = self.wake
        job.reader.jobs.append(job)
        job.reader.used = time.time()

    def _begin(self, job: Job) -> None:
        reader, job.started = job.reader, True
        if job.expected is not None or job.key is not None:
            job.digest = digest_of(job.tokens)
            known = reader.answer(job.expected, job.digest, job.key)
            if known is not None and job.expected != reader.position:
                self._end(job, known)
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
            self.files.log(reader, [event], lambda error: self._logged(job, error))
        else:
            self._logged(job, None)

    def _logged(self, job: Job, error: UserError | None) -> None:
        if error is not None:
            self.fail(job, error)
            return
        job.ready = True

    def _end(self, job: Job, outcome: Any) -> None:
        reader = job.reader
        reader.jobs.remove(job)
        job.ready = False  # who holds it for the rest of this turn computes nothing more of it
        reader.used = time.time()
        job.task._finish(outcome)
        if not reader.jobs:
            self._after_jobs(reader)

    def _after_jobs(self, reader: Reader) -> None:
        waiting, reader.waiting = reader.waiting, []
        for work in waiting:
            work()
        if reader.deleted and not reader.jobs:
            self.readers.pop(reader.id, None)
        elif self.files.wants_snapshot(reader):
            self.files.keep(reader, lambda kept: None)

    def fail(self, job: Job, error: BaseException) -> None:
        """Ends a job with an error; its reader stays where it is, in memory and on the disk."""
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
                    self.files.give_back(other.reader)
                if job not in reader.jobs:  # it was lost with its reader
                    return
        if reader.state is None and reader.tier == "device":
            self._end(job, error)
        elif job.ready and reader.durable and not job.replay and job.reads:
            self.files.cut(reader, lambda failed: self._end(job, error))
            job.closing, job.ready = True, False
        elif job.ready and reader.unlogged:
            self.close_writing(job, error)
        else:
            self._end(job, error)

    def end_reading(self, job: Job, cancelled: bool = False) -> None:
        reader = job.reader
        job.closing, job.ready = True, False
        result = job.appended(cancelled)
        if cancelled and reader.durable and not job.replay:
            self.files.cut(reader, lambda error: self._end(job, error or result))
            return
        if job.digest is not None and not cancelled:
            kept = (
                result
                if len(result.nll) <= KEPT_LOSSES
                else Appended(result.position, [], result.steps, result.rolled_back)
            )
            reader.answers.append(Answer(job.begun_at, job.digest, job.key, kept))
        self._end(job, result)

    def end_writing(self, job: Job, reason: str) -> None:
        if job.reader.lane is not None:
            self.lanes.leave(job, to_host=not self.tiers.has_room(self.readers.values()))
        self.close_writing(job, Finished(reason, job.reader.position))

    def cancel_reading(self, job: Job) -> None:
        """Ends reading where it is, and with it a job that was to write afterwards."""
        if job.sampling is None:
            self.end_reading(job, cancelled=True)
        else:
            self.close_writing(job, Finished("cancelled", job.reader.position))

    def close_writing(self, job: Job, outcome: Any) -> None:
        reader = job.reader
        job.closing, job.ready = True, False
        if not reader.durable or not reader.unlogged:
            reader.unlogged = []
            self._end(job, outcome)
            return
        start, written = reader.position - len(reader.unlogged), reader.unlogged
        event = {"at": start, "tokens": written, "learn": job.learns, "wrote": True}
        reader.unlogged = []

        def logged(error: UserError | None) -> None:
            if error is not None:  # what nobody can keep has not happened
                self.files.reopen(reader)
            self._end(job, error or outcome)

        self.files.log(reader, [event], logged)

    def is_here(self, job: Job) -> bool:
        """Whether the job's reader is on the device or in a lane; if not, it may be on its way."""
        reader = job.reader
        if reader.lane is not None:
            return True
        return self.tiers.bring(reader, self.readers.values(), self.files) and reader.state is not None
