"""The thread that computes: it chooses who comes next, so that nobody waits for somebody else's long text.

A turn is one token of every session that writes, then either the inner step of some of them or a piece of text of some
that read. A piece of several mini-batches stands still after each mini-batch's work for a turn of all others, so that
long is the most that a token waits (on a GPU the piece is one mini-batch instead). Owners share the device by the time
that it has worked for them; the sessions of one owner come in the order in which they have waited.

Everything known of sessions is under one lock, which this thread lets go whenever it computes. So who only asks, or
changes what needs no computing, never waits for it. What must happen between two tokens or pieces is a command.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch

from longread.engine.interface import Busy
from longread.engine.jobs import Jobs
from longread.engine.reader import Job, Reader
from longread.engine.slices import Slices

LOG = logging.getLogger(__name__)

T = TypeVar("T")


class Scheduler(threading.Thread):
    """Reads and writes until it is told to stop."""

    def __init__(self, jobs: Jobs) -> None:
        super().__init__(name="longread-engine", daemon=True)
        self._jobs, self._lock, self._slices = jobs, jobs.lock, Slices(jobs, self._turn)
        self._commands: deque[tuple[Callable[[], None], Reader | None]] = deque()
        self._closing = self._ended = False

    def command(self, function: Callable[[], T], reader: Reader | None = None) -> Future[T]:
        """Runs `function` in this thread with the lock held, between two slices; its result, or what it raises.

        Whoever waits for it must not hold the lock. Raises `Busy` once the thread has ended.

        Args:
            reader: which alone is touched: then it is not waited for the end of another's piece of text.
        """
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        with self._lock:
            if self._ended:
                raise Busy("the engine is closed; start it again")
            self._commands.append((run, reader))
            self._lock.notify()
        return future

    def stop(self) -> None:
        """Ends the thread once nothing is under way."""
        self._closing = True
        self._lock.notify()

    def run(self) -> None:
        """Works until it is told to stop."""
        if self._jobs.model.device.type == "cuda":
            torch.cuda.set_device(self._jobs.model.device)
        with torch.no_grad(), self._lock:
            while not self._ended:
                if self._turn() or self._commands:
                    continue
                if self._closing and not any(r.jobs or r.moving for r in self._jobs.readers.values()):
                    self._ended = True
                else:
                    self._lock.wait(1.0)

    @property
    def _present(self) -> list[Job]:
        """What sessions do now or next, but for those whose text stands still."""
        return [job for job in self._jobs.heads if job not in self._jobs.paused]

    def _admit(self) -> None:
        """Lets as many jobs as fit on the device begin, or go on."""
        jobs = self._jobs
        waiting = [job for job in jobs.heads if not job.admitted]
        for job in sorted(waiting, key=lambda job: (jobs.shares.had(job.reader.owner), not job.started, job.ticket)):
            if not jobs.tiers.admits(jobs.readers.values()):
                jobs.make_way(job)
                return
            job.admitted, job.served = True, 0.0
            if not job.started:
                jobs.guarded([job], jobs.begin, job)

    def _turn(self) -> bool:
        """Does the next pieces of work of all whose text is not standing still; says whether there were any."""
        try:
            self._admit()
            self._obey()
            return self._work()
        except Exception as error:
            LOG.exception("a turn of the engine failed")
            return self._give_up_all(error)

    def _obey(self) -> None:
        """Runs the commands that need not wait for the end of a piece."""
        paused = {job.reader for job in self._jobs.paused}
        for _ in range(len(self._commands)):
            run, reader = command = self._commands.popleft()
            if paused and (reader is None or reader in paused):
                self._commands.append(command)
            else:
                run()

    def _work(self) -> bool:
        jobs, slices = self._jobs, self._slices
        heads = sorted((job for job in self._present if job.ready and job.admitted), key=self._order)
        worked = False
        for job in [job for job in heads if not job.reads and job.sampling is None]:  # it only wanted to be here
            if jobs.is_here(job):
                jobs.guarded([job], jobs.end_reading, job)
                worked = True
        worked = slices.write(heads) or worked
        worked = slices.step(heads) or slices.read(heads) or worked
        jobs.tiers.balance(jobs.readers.values(), jobs.files)
        return worked

    def _order(self, job: Job) -> tuple[float, int]:
        return self._jobs.shares.had(job.reader.owner), job.ticket

    def _give_up_all(self, error: Exception) -> bool:
        """Fails all jobs under way after an error that belongs to none; says that there may be others."""
        for job in self._present:
            try:
                self._jobs.fail(job, error)
            except Exception:
                LOG.exception("a job could not be ended")
        return True
