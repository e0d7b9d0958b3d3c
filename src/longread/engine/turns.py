"""What a turn consists of: a token of all that write, and some mini-batches of a group of those that read."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from longread.engine.interface import Progress, Token
from longread.engine.reader import Job, Reader
from longread.inner_loop import Reading, ReadingState, read, rescue
from longread.inner_loop.batches import apart, together
from longread.session.sampling import Drawn, Sampling, draw, seeded

if TYPE_CHECKING:
    from longread.engine.worker import Worker

SLICE = 2048
"""Tokens of a text that are read at a time, or one mini-batch if that is longer."""
STEPS = 8
"""Most mini-batches of them."""
GROUP = 4096
"""Most tokens of a group, or one slice."""


class Turns:
    """Computes; the worker begins and ends jobs."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._debt = 0.0  # seconds that writers are owed
        self._short_first = True
        self._M = worker.model.config.mini_batch_size
        self._slice = self._M * min(STEPS, max(1, SLICE // self._M))

    def write(self, jobs: list[Job]) -> bool:
        """Draws and reads the next token of all that write; says whether there was any."""
        worker = self._worker
        writers = [job for job in jobs if job.ready and not job.reads and job.sampling is not None and job.next is None]
        for job in writers:
            if job.task.cancelled or job.written >= sampling_of(job).max_tokens:
                reason = "cancelled" if job.task.cancelled else "length"
                worker.guarded([job], worker.end_writing, job, reason)
        writers = [job for job in writers if job.ready]
        for job in writers:
            if worker.lanes.possible and job.reader.lane is None and worker.is_here(job):
                worker.guarded([job], self._enter, job)
        loose = [job for job in writers if job.ready and not worker.lanes.possible and worker.is_here(job)]
        drawing = [*worker.lanes.jobs, *loose]
        if not drawing:
            return bool(writers) and any(not job.ready for job in writers)
        began = time.perf_counter()
        worker.guarded(drawing, self._round, loose)
        worker.counts["rounds"] += 1
        self._debt -= time.perf_counter() - began
        return True

    def _enter(self, job: Job) -> None:
        worker = self._worker
        if worker.tiers.make_lane(worker.readers.values()):
            worker.lanes.enter(job)

    def _round(self, loose: list[Job]) -> None:
        worker = self._worker
        drawing = [*worker.lanes.jobs, *loose]
        for job, drawn in zip(drawing, self._drawn(loose), strict=True):
            if drawn.id in sampling_of(job).stop_ids:
                worker.end_writing(job, "stop")
                continue
            job.next = drawn.id
            worker.computed(job, wrote=True)
            job.task._emit(Token(drawn.id, drawn.logprob, drawn.top, job.reader.position + 1))
        self._step([job for job in worker.lanes.jobs if worker.lanes.due(job)])
        others = [job for job in worker.lanes.jobs if job.next is not None]
        if worker.alone:
            for job in others:
                worker.guarded([job], self._read_one, job)
            return
        worker.lanes.first(others)
        worker.lanes.read(len(others))
        for job in others:
            self._written(job)

    def _read_one(self, job: Job) -> None:
        self._worker.lanes.read_one(job)
        self._written(job)

    def _drawn(self, loose: list[Job]) -> list[Drawn]:
        """The next token of each job in a lane, and of each of `loose`."""
        worker = self._worker
        rows = [worker.lanes.logits()] if worker.lanes.jobs else []
        outputs = [state_of(job.reader).output for job in loose]
        if outputs:
            rows += map(worker.model.logits, outputs if worker.alone else [torch.cat(outputs)])
        logits, jobs = torch.cat(rows) if len(rows) > 1 else rows[0], [*worker.lanes.jobs, *loose]
        size, found = 1 if worker.alone else len(jobs), []
        for first in range(0, len(jobs), size):
            here = slice(first, first + size)
            found += draw(
                logits[here],
                [sampling_of(job) for job in jobs[here]],
                [job.reader.recent for job in jobs[here]],
                [self._generator(job) for job in jobs[here]],
            )
        return found

    def _generator(self, job: Job) -> torch.Generator:
        if job.generator is None:
            job.generator = seeded(sampling_of(job).seed, self._worker.model.device)
        return job.generator

    def _step(self, due: list[Job]) -> None:
        """Takes the inner steps that the next tokens of some jobs ask for, and reads these tokens.

        They leave their lanes for it, a group at a time since they need room twice, and come back.
        """
        worker = self._worker
        while due:
            for job in due[: self._most(self._M)]:
                worker.lanes.leave(job)
            due = [job for job in due if job.reader.tier == "device"]  # who had to leave for the host reads when back
            group = self._group([job for job in due if job.reader.lane is None])
            if not group:
                continue
            for job in due:
                if job.reader.lane is None and job not in group:
                    worker.lanes.enter(job)
            self._read_group(group)
            for job in group:
                worker.lanes.enter(job)
            due = [job for job in due if job not in group]

    def _written(self, job: Job) -> None:
        """Books that the drawn token has been read."""
        worker = self._worker
        reader, token = job.reader, job.next
        if token is None:
            return
        reader.position += 1
        reader.losses.add_written(1)
        reader.recent.append(token)
        if reader.durable:
            reader.unlogged.append(token)
        job.next, job.written = None, job.written + 1
        worker.counts["tokens_written"] += 1

    def read(self, jobs: list[Job]) -> bool:
        """Reads with one group of writers whose step is due, or of readers; says whether there was any."""
        worker = self._worker
        writers = [job for job in jobs if job.ready and job.next is not None and job.reader.lane is None]
        others = [job for job in jobs if job.ready and job.reads and job.next is None]
        for job in others:
            if job.task.cancelled and not job.replay and self._at_a_boundary(job):
                worker.guarded([job], worker.cancel_reading, job)
        others = [job for job in others if job.ready]
        worked = False
        while writers:
            group = self._group([job for job in writers if worker.is_here(job)])
            if not group:
                break
            writers = [job for job in writers if job not in group]
            worker.guarded(group, self._read_group, group)
            worked = True
        if not worker.lanes.jobs:
            self._debt = 0.0
        if others and self._debt <= 0:
            if self._short_first:  # every other time: a short text need not wait until all long ones have had a turn
                others.sort(key=lambda job: len(job.tokens) - job.done > self._slice)
            self._short_first = not self._short_first
            group = self._group([job for job in others if worker.is_here(job)])
            if group:
                began = time.perf_counter()
                worker.guarded(group, self._read_group, group)
                self._debt = time.perf_counter() - began
                worked = True
        return worked

    def _at_a_boundary(self, job: Job) -> bool:
        state = job.reader.state
        return state is None or state.hidden.shape[1] in (0, self._M)

    def _tokens(self, job: Job) -> Sequence[int]:
        """What a job reads next: the drawn token, or as much as brings it to the end of a mini-batch."""
        if job.next is not None:
            return (job.next,)
        waiting = state_of(job.reader).hidden.shape[1]
        count = self._M - waiting if job.learns and 0 < waiting < self._M else self._slice
        return job.tokens[job.done : job.done + count]

    def _group(self, jobs: list[Job]) -> list[Job]:
        """The first job, and those that can be read together with it."""
        if not jobs:
            return []
        first = len(self._tokens(jobs[0]))
        if jobs[0].learns and state_of(jobs[0].reader).hidden.shape[1] == self._M:
            first = max(first, self._M)  # a step is due
        key = self._key(jobs[0])
        return [job for job in jobs if self._key(job) == key][: self._most(first)]

    def _most(self, tokens: int) -> int:
        """Sessions that may read so many tokens each as one group."""
        worker = self._worker
        return 1 if worker.alone else max(1, min(worker.limits.max_batch, GROUP // max(1, tokens)))

    def _key(self, job: Job) -> tuple[Any, ...]:
        return job.reader.shapes, len(self._tokens(job)), job.learns, job.logprobs if job.reads else 0

    def _read_group(self, jobs: list[Job]) -> None:
        """Reads the next tokens of jobs that are a group."""
        worker = self._worker
        began = time.perf_counter()
        for job in jobs:
            worker.computed(job)
        pieces = [list(self._tokens(job)) for job in jobs]
        tokens = torch.tensor(pieces, device=worker.model.device)
        before = [state_of(job.reader) for job in jobs]
        learn, top = jobs[0].learns, jobs[0].logprobs if jobs[0].reads else 0
        try:
            found = read(worker.model, together(before), tokens, inner=worker.inner, learn=learn, guard=True, top=top)
        except torch.OutOfMemoryError:
            if len(jobs) == 1:
                raise
            half = len(jobs) // 2
            for part in (jobs[:half], jobs[half:]):
                self._read_group(part)
            return
        after = apart(found.state)
        nll, norms, refused = found.nll.tolist(), found.inner_grad_norm.tolist(), found.rolled_back.tolist()
        likeliest = tops(found)
        seconds = time.perf_counter() - began
        worker.counts["groups"] += 1
        for i, job in enumerate(jobs):
            reader, state, back = job.reader, after[i], sum(refused[i])
            if job.next is None and learn and self._may_be_broken(nll[i]):
                rescued = rescue(
                    worker.model, before[i], tokens[i : i + 1], _alone(found, i, state), inner=worker.inner
                )
                if rescued is not None:
                    state, back = rescued, len(norms[i])
            reader.rest(state)
            reader.served, reader.drift = time.perf_counter(), None
            reader.steps += len(norms[i])
            reader.rolled_back += back
            worker.counts["steps"] += len(norms[i])
            worker.counts["rolled_back"] += back
            if job.next is not None:
                self._written(job)
                continue
            reader.position += len(pieces[i])
            if job.wrote:
                reader.losses.add_written(len(pieces[i]))
            else:
                reader.losses.add(nll[i])
            reader.recent.extend(pieces[i])
            job.done += len(pieces[i])
            job.steps, job.rolled_back = job.steps + len(norms[i]), job.rolled_back + back
            job.nll += nll[i]
            worker.counts["tokens_read"] += len(pieces[i])
            if not job.replay:
                job.task._emit(Progress(reader.position, nll[i], norms[i], seconds, likeliest[i] if likeliest else []))
            if not job.reads and job.sampling is None:
                worker.end_reading(job)

    def _may_be_broken(self, nll: list[float]) -> bool:
        worker = self._worker
        newest = [x for x in nll[-self._M :] if x == x]  # the first of all is NaN
        return not newest or not sum(newest) / len(newest) <= math.log(worker.model.config.vocab_size)


def state_of(reader: Reader) -> ReadingState:
    """The state of a reader that must have one."""
    if reader.state is None:
        raise LookupError(f"session {reader.id} has no state here")
    return reader.state


def sampling_of(job: Job) -> Sampling:
    """The settings of a job that writes."""
    if job.sampling is None:
        raise LookupError("this job does not write")
    return job.sampling


def tops(found: Reading) -> list[list[list[tuple[int, float]]]]:
    """For each sequence and token, the likeliest tokens in its place."""
    if found.top is None:
        return []
    values, ids = (x.tolist() for x in found.top)
    return [[list(zip(i, v, strict=True)) for i, v in zip(*row, strict=True)] for row in zip(ids, values, strict=True)]


def _alone(found: Reading, i: int, state: ReadingState) -> Reading:
    here = slice(i, i + 1)
    return Reading(state, found.nll[here], found.inner_grad_norm[here], found.rolled_back[here])
