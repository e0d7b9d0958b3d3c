"""The thread that computes: it chooses who comes next, so that nobody waits for somebody else's long text.

A turn is one token of every session that writes, after the inner steps of a few of them, and then a piece of text of
some that read. A piece of several mini-batches stands still after each mini-batch's work for a turn of all others, so
that long, and those few steps, is the most that a token waits (on a GPU the piece is one mini-batch instead). Owners
share the device by the time that it has worked for them; the sessions of one owner come in the order in which they have
waited.

Everything known of sessions is under one lock, which this thread lets go whenever it computes. So who only asks, or
changes what needs no computing, never waits for it. What must happen between two tokens or pieces is a command.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from longread.engine.interface import Busy, Token
from longread.engine.jobs import Jobs
from longread.engine.pieces import TextPieces, state_of
from longread.engine.records import Job, Reader
from longread.session.sampling import Drawn, Sampling, draw, seeded

PATIENCE = 8
"""Pieces of text, or mini-batches of written tokens, after which a job may have to stand back for another owner's."""
QUIET = 1.0
"""Seconds without a writer after which all is as if nobody wrote: who asks for one token at a time is still there."""
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
                make_way(jobs, job)
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
        worked = slices.read(heads) or worked
        jobs.tiers.balance(jobs.readers.values(), jobs.persistence)
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


class Slices:
    """Computes for jobs, with the lock let go; `Jobs` begins and ends them.

    Args:
        turn: what others do while a long piece of text stands still.
    """

    def __init__(self, jobs: Jobs, turn: Callable[[], object]) -> None:
        self._jobs, self._lanes, self._pieces, self._turn = jobs, jobs.lanes, TextPieces(jobs), turn
        self._short_first: defaultdict[str, bool] = defaultdict(lambda: True)
        self._wrote_at = -math.inf
        self._launches = jobs.model.device.type == "cuda"
        """Whether a device computes by itself what it is given: clients are told meanwhile."""

    def write(self, heads: list[Job]) -> bool:
        """Draws and reads the next token of all that write; says whether any does.

        A token that asks for an inner step is read after it. A few of these are taken now, the other tokens wait.
        """
        jobs, lanes = self._jobs, self._lanes
        writers = [job for job in heads if job.ready and not job.reads and job.sampling is not None]
        for job in [job for job in writers if job.next is None]:
            if job.task.cancelled or job.written >= sampling_of(job).max_tokens:
                reason = "cancelled" if job.task.cancelled else "length"
                jobs.guarded([job], jobs.end_writing, job, reason)
        if any(job.sampling is not None for job in heads):
            self._wrote_at = time.perf_counter()
        going = [job for job in writers if job.ready]
        for job in going:
            if lanes.possible and job.reader.lane is None and jobs.is_here(job):
                jobs.guarded([job], self._enter, job)
        late = next((job for job in going if job.ready and job.reader.lane is None), None)
        if lanes.possible and late is not None and len(lanes.jobs) == lanes.lanes:
            make_way(jobs, late, lane=True)
        loose = [job for job in going if job.ready and not lanes.possible and jobs.is_here(job)]
        present = [*lanes.jobs, *loose]
        if not present:
            return any(not job.ready for job in writers)
        news: list[tuple[Job, Token]] = []
        self._timed(present, self._draw, [job for job in present if job.next is None], news)
        due = sorted((job for job in lanes.jobs if job.next is not None and lanes.due(job)), key=lambda job: job.ticket)
        if due or not self._launches:
            self._tell(news)
        for job in due[: self._pieces.most(jobs.model.config.mini_batch_size, hurried=True)]:
            self._timed([job], self._step, job)
        self._timed(present, self._read_drawn, news)
        self._read_loose([job for job in loose if job.ready and job.next is not None])
        jobs.counts["rounds"] += 1
        return True

    def _timed(self, group: list[Job], work: Callable[..., None], *args: Any) -> None:
        """Does `work`, which fails these jobs alone and is charged to their owners."""
        began = time.perf_counter()
        self._jobs.guarded(group, work, *args)
        self._charge(group, began)

    def _enter(self, job: Job) -> None:
        if self._jobs.tiers.make_lane(self._jobs.readers.values()):
            self._lanes.enter(job)

    def _draw(self, drawing: list[Job], news: list[tuple[Job, Token]]) -> None:
        """Draws the next tokens; what clients are to be told of them is added to `news`."""
        for job, drawn in zip(drawing, self._drawn(drawing), strict=True):
            if drawn.id in sampling_of(job).stop_ids:
                self._jobs.end_writing(job, "stop")
                continue
            job.next = drawn.id
            self._jobs.computing(job, wrote=True)
            news.append((job, Token(drawn.id, drawn.logprob, drawn.top, job.reader.position + 1)))

    def _step(self, job: Job) -> None:
        """Takes the inner step that the drawn token of a job in a lane asks for; it counts once that token is read."""
        jobs = self._jobs
        with jobs.lock.released():
            job.refused = self._lanes.step(job, jobs.inner)
        jobs.to_the_end(job)  # of those whose steps are due

    def _tell(self, news: list[tuple[Job, Token]]) -> None:
        """Tells clients what was not told yet."""
        while news:
            job, token = news.pop(0)
            job.task._emit(token)

    def _read_drawn(self, news: list[tuple[Job, Token]]) -> None:
        """Reads the drawn tokens of all in lanes whose inner step is not due; clients are told while a GPU computes."""
        jobs, lanes = self._jobs, self._lanes
        others = [job for job in lanes.jobs if job.next is not None and not lanes.due(job)]
        try:
            if jobs.alone:
                for job in others:
                    jobs.guarded([job], self._read_one, job)
                return
            lanes.first(others)
            with jobs.lock.released():
                lanes.read(len(others))
            for job in others:
                self._jobs.written(job)
        finally:
            self._tell(news)

    def _read_one(self, job: Job) -> None:
        with self._jobs.lock.released():
            self._lanes.read_one(job)
        self._jobs.written(job)

    def _drawn(self, drawing: list[Job]) -> list[Drawn]:
        """The next token of each of these jobs, in lanes or not."""
        if not drawing:
            return []
        jobs = self._jobs
        rows = [job.reader.lane for job in drawing if job.reader.lane is not None]
        outputs = [state_of(job.reader).output for job in drawing if job.reader.lane is None]
        settings = [sampling_of(job) for job in drawing]
        if not outputs and all(s.takes_likeliest for s in settings):
            with jobs.lock.released():
                likeliest = self._lanes.likeliest(max(rows) + 1)
            return [Drawn(*likeliest[row], []) for row in rows]
        recent = [job.reader.recent for job in drawing]
        generators = [self._generator(job) for job in drawing]
        with jobs.lock.released():
            parts = []
            if rows:
                logits = self._lanes.logits()
                parts.append(logits if rows == list(range(len(logits))) else logits[rows])
            if outputs:
                parts += map(jobs.model.logits, outputs if jobs.alone else [torch.cat(outputs)])
            logits = torch.cat(parts) if len(parts) > 1 else parts[0]
            size, found = 1 if jobs.alone else len(drawing), []
            for first in range(0, len(drawing), size):
                here = slice(first, first + size)
                found += draw(logits[here], settings[here], recent[here], generators[here])
        return found

    def _generator(self, job: Job) -> torch.Generator:
        if job.generator is None:
            job.generator = seeded(sampling_of(job).seed, self._jobs.model.device)
        return job.generator

    def _read_loose(self, waiting: list[Job]) -> None:
        """Reads the drawn tokens of a model that has no lanes; of those that ask for an inner step one group's."""
        pieces = self._pieces
        due = sorted((job for job in waiting if pieces.step_is_due(job)), key=lambda job: job.ticket)
        quiet = [job for job in waiting if job not in due]
        while quiet:
            group = pieces.group(quiet, 1, hurried=True)
            self._timed(group, pieces.read, group, 1)
            quiet = [job for job in quiet if job not in group]
        if due:
            group = pieces.group(due, 1, hurried=True)
            self._timed(group, pieces.read, group, 1)
            for job in group:
                self._jobs.to_the_end(job)

    def read(self, heads: list[Job]) -> bool:
        """Reads a piece of text with a group of readers; says whether there was any.

        While another text stands still only a prompt, which somebody waits to see continued, and a short piece of it;
        and not of an owner who has had more than those of that text.
        """
        jobs = self._jobs
        readers = [job for job in heads if job.ready and job.reads and job.next is None]
        for job in readers:
            if self._pieces.stops(job):
                jobs.guarded([job], jobs.cancel_reading, job)
        readers = [job for job in readers if job.ready]
        if jobs.paused:
            had = min(jobs.shares.had(job.reader.owner) for job in jobs.paused)
            readers = [job for job in readers if job.sampling is not None and jobs.shares.had(job.reader.owner) <= had]
        if not readers or (jobs.paused and jobs.alone):  # there no piece is short
            return False
        owner = min(readers, key=lambda job: (jobs.shares.had(job.reader.owner), job.ticket)).reader.owner
        # every other time: a short text need not wait until all long ones of its owner have had a turn
        short_first, self._short_first[owner] = self._short_first[owner], not self._short_first[owner]
        readers.sort(
            key=lambda job: (
                jobs.shares.had(job.reader.owner),
                job.reader.owner == owner and short_first and len(job.tokens) - job.done > self._pieces.long,
                job.ticket,
            )
        )
        here = [job for job in readers if jobs.is_here(job)]
        if not here:
            return False
        hurried = bool(jobs.paused) or self._is_hurried(heads, here[0])
        size = self._pieces.short if jobs.paused or (hurried and not self._pieces.pauses) else self._pieces.long
        group = self._pieces.group(here, size, hurried=hurried)
        began = time.perf_counter()

        def between() -> None:
            nonlocal began
            self._charge(group, began)
            jobs.paused = group
            try:
                self._turn()
            finally:
                jobs.paused = ()
                began = time.perf_counter()

        pausing = self._pieces.pauses and not jobs.paused
        jobs.guarded(group, self._pieces.read, group, size, between if pausing else None)
        self._charge(group, began)
        for job in group:
            jobs.to_the_end(job)
        return True

    def _is_hurried(self, heads: list[Job], first: Job) -> bool:
        """Whether anybody but the first waits for a token, or did a moment ago."""
        if time.perf_counter() - self._wrote_at < QUIET and first.sampling is None:
            return True
        return any(job.sampling is not None for job in heads if job is not first)

    def _charge(self, group: list[Job], began: float) -> None:
        self._jobs.shares.charge([job.reader.owner for job in group], time.perf_counter() - began)


def sampling_of(job: Job) -> Sampling:
    """The settings of a job that writes."""
    if job.sampling is None:
        raise LookupError("this job does not write")
    return job.sampling


def make_way(jobs: Jobs, waiting: Job, *, lane: bool = False) -> None:
    """Where an owner with fewer jobs on the device waits, one of the owner with most of them stands back: so nobody
    has to wait for the end of somebody else's text. Not before it has been served for a while.

    Args:
        lane: it waits for a lane only, and so do those that stand back.
    """
    here = [job for job in (jobs.lanes.jobs if lane else jobs.heads) if job.admitted]
    held = Counter(job.reader.owner for job in here)
    fewer = held[waiting.reader.owner]
    others = [
        job
        for job in here
        if job not in jobs.paused
        and job.ready
        and job.next is None
        and held[job.reader.owner] > fewer
        and job.served >= PATIENCE
    ]
    if not others:
        return
    job = max(others, key=lambda job: (held[job.reader.owner], job.served))
    if job.reader.lane is not None:
        jobs.guarded([job], jobs.lanes.leave, job)
    job.admitted, job.served = lane, 0.0
    jobs.to_the_end(job)
