"""What the device is given at a time: a token of all that write, then an inner step of some, or a piece of text."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable

import torch

from longread.engine.interface import Token
from longread.engine.jobs import Jobs
from longread.engine.pieces import TextPieces, state_of
from longread.engine.reader import Job
from longread.session.sampling import Drawn, Sampling, draw, seeded

QUIET = 1.0
"""Seconds without a writer after which all is as if nobody wrote: who asks for one token at a time is still there."""


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
        """Draws and reads the next token of all that write and whose inner step is not due; says whether any does."""
        jobs, lanes = self._jobs, self._lanes
        writers = [job for job in heads if job.ready and not job.reads and job.sampling is not None]
        for job in [job for job in writers if job.next is None]:
            if job.task.cancelled or job.written >= sampling_of(job).max_tokens:
                reason = "cancelled" if job.task.cancelled else "length"
                jobs.guarded([job], jobs.end_writing, job, reason)
        drawing = [job for job in writers if job.ready and job.next is None]
        if any(job.sampling is not None for job in heads):
            self._wrote_at = time.perf_counter()
        for job in drawing:
            if lanes.possible and job.reader.lane is None and jobs.is_here(job):
                jobs.guarded([job], self._enter, job)
        late = next((job for job in drawing if job.ready and job.reader.lane is None), None)
        if lanes.possible and late is not None and len(lanes.jobs) == lanes.lanes:
            jobs.make_way(late, lane=True)
        loose = [job for job in drawing if job.ready and not lanes.possible and jobs.is_here(job)]
        present = [*lanes.jobs, *loose]
        if not any(job.next is None or not lanes.due(job) for job in present):
            return any(not job.ready for job in writers)
        began = time.perf_counter()
        jobs.guarded(present, self._round, loose)
        jobs.counts["rounds"] += 1
        self._charge(present, began)
        return True

    def _enter(self, job: Job) -> None:
        if self._jobs.tiers.make_lane(self._jobs.readers.values()):
            self._lanes.enter(job)

    def _round(self, loose: list[Job]) -> None:
        jobs, lanes = self._jobs, self._lanes
        drawing = [job for job in (*lanes.jobs, *loose) if job.next is None]
        news: list[tuple[Job, Token]] = []
        for job, drawn in zip(drawing, self._drawn(drawing), strict=True):
            if drawn.id in sampling_of(job).stop_ids:
                jobs.end_writing(job, "stop")
                continue
            job.next = drawn.id
            jobs.computing(job, wrote=True)
            news.append((job, Token(drawn.id, drawn.logprob, drawn.top, job.reader.position + 1)))
        try:
            if not self._launches:
                self._tell(news)
            self._read_drawn()
        finally:
            self._tell(news)

    def _tell(self, news: list[tuple[Job, Token]]) -> None:
        """Tells clients what was not told yet."""
        while news:
            job, token = news.pop(0)
            job.task._emit(token)

    def _read_drawn(self) -> None:
        """Reads the drawn tokens of all in lanes whose inner step is not due."""
        jobs, lanes = self._jobs, self._lanes
        others = [job for job in lanes.jobs if job.next is not None and not lanes.due(job)]
        if jobs.alone:
            for job in others:
                jobs.guarded([job], self._read_one, job)
            return
        lanes.first(others)
        with jobs.lock.released():
            lanes.read(len(others))
        for job in others:
            self._jobs.written(job)

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

    def step(self, heads: list[Job]) -> bool:
        """Takes the inner steps that the next tokens of a group of writers ask for, and reads these tokens.

        They leave their lanes for it, since they need room twice, and come back.
        """
        jobs, lanes = self._jobs, self._lanes
        due = sorted((job for job in lanes.jobs if job.next is not None), key=lambda job: job.ticket)
        due = due[: self._pieces.most(jobs.model.config.mini_batch_size, hurried=True)]
        for job in due:
            jobs.guarded([job], lanes.leave, job)
        # who had to leave for the host, or never is in a lane, reads when it is here
        waiting = [job for job in heads if job.ready and job.next is not None and job.reader.lane is None]
        waiting = [job for job in waiting if jobs.is_here(job)]
        worked = stepped = False
        while waiting and not stepped:
            group = self._pieces.group(waiting, 1, hurried=True)
            stepped = self._pieces.step_is_due(group[0])
            for job in due:
                if job not in group:
                    self._come_back(job)
            began = time.perf_counter()
            jobs.guarded(group, self._pieces.read, group, 1)
            self._charge(group, began)
            for job in due:
                self._come_back(job)
            waiting = [job for job in waiting if job.next is not None and job.ready and job.reader.lane is None]
            worked = True
        return worked

    def _come_back(self, job: Job) -> None:
        """Lets a job that has just left its lane enter it again."""
        reader = job.reader
        if job.ready and reader.lane is None and reader.tier == "device":
            self._jobs.guarded([job], self._lanes.enter, job)

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
