"""What the device is given at a time: a token of all that write, or a piece of text for a group of those that read.

A piece is short while somebody writes: one mini-batch, of as many sessions as the device reads in `HOLD` seconds. With
nobody writing it is as long as pays. Where a batch must change no bit it is always as long, since how a text is cut
changes the last bits too.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from longread.engine.interface import Progress, Token
from longread.engine.jobs import Jobs
from longread.engine.reader import Job, Reader
from longread.inner_loop import Reading, ReadingState, captured, read, rescue
from longread.inner_loop.batches import apart, together
from longread.session.sampling import Drawn, Sampling, draw, seeded

LONG, SHORT = 2048, 128
"""Tokens of a text that are read at a time, with nobody who writes and beside others; or one mini-batch, if longer."""
STEPS = 8
"""Most mini-batches of them."""
MOST_WORK = 4e9
"""Parameters times tokens of a piece on a CPU: about half a second on two cores."""
GROUP = 4096
"""Most tokens of a group, or one piece."""
HOLD = 0.1
"""Seconds for which a group of several sessions may hold the device while somebody writes."""
DRIFT_EVERY = 32
"""Inner steps of a long text after which drift is measured again, which costs a small part of one."""
QUIET = 1.0
"""Seconds without a writer after which pieces are long again: who writes a token at a time is still there."""


class _Read(NamedTuple):
    """What a group of sessions reads at once, and what came of it for one of them."""

    state: ReadingState
    nll: list[float]
    norms: list[float]
    refused: int
    """Steps that were not taken, or taken back."""
    top: list[list[tuple[int, float]]]


class Slices:
    """Computes for jobs, with the lock let go; `Jobs` begins and ends them."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs, self._lanes = jobs, jobs.lanes
        self._M = jobs.model.config.mini_batch_size
        on_gpu, work = jobs.model.device.type == "cuda", int(MOST_WORK / jobs.model.config.num_parameters)
        long = LONG if on_gpu else min(LONG, work)
        self._long, self._short = (self._M * min(STEPS, max(1, tokens // self._M)) for tokens in (long, SHORT))
        if jobs.alone:  # on a GPU long enough for graphs
            self._long = self._short = self._long if on_gpu else self._short
        elif on_gpu:  # a long graph, and what brings it to its border
            stretch = self._M * math.ceil(captured.STRETCH / self._M)
            self._long = max(self._long, captured.STRETCHES * stretch + self._M)
        self._debt = 0.0  # seconds that writers are owed
        self._short_first: defaultdict[str, bool] = defaultdict(lambda: True)
        self._pace: float | None = None  # seconds a token, as read last
        self._wrote_at = -math.inf

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
        seconds = time.perf_counter() - began
        self._debt -= seconds
        jobs.shares.charge([job.reader.owner for job in present], seconds)
        return True

    def _enter(self, job: Job) -> None:
        if self._jobs.tiers.make_lane(self._jobs.readers.values()):
            self._lanes.enter(job)

    def _round(self, loose: list[Job]) -> None:
        jobs, lanes = self._jobs, self._lanes
        drawing = [job for job in (*lanes.jobs, *loose) if job.next is None]
        for job, drawn in zip(drawing, self._drawn(drawing), strict=True):
            if drawn.id in sampling_of(job).stop_ids:
                jobs.end_writing(job, "stop")
                continue
            job.next = drawn.id
            jobs.computing(job, wrote=True)
            job.task._emit(Token(drawn.id, drawn.logprob, drawn.top, job.reader.position + 1))
        others = [job for job in lanes.jobs if job.next is not None and not lanes.due(job)]
        if jobs.alone:
            for job in others:
                jobs.guarded([job], self._read_one, job)
            return
        lanes.first(others)
        with jobs.lock.released():
            lanes.read(len(others))
        for job in others:
            self._written(job)

    def _read_one(self, job: Job) -> None:
        with self._jobs.lock.released():
            self._lanes.read_one(job)
        self._written(job)

    def _drawn(self, drawing: list[Job]) -> list[Drawn]:
        """The next token of each of these jobs, in lanes or not."""
        if not drawing:
            return []
        jobs = self._jobs
        rows = [job.reader.lane for job in drawing if job.reader.lane is not None]
        outputs = [state_of(job.reader).output for job in drawing if job.reader.lane is None]
        settings = [sampling_of(job) for job in drawing]
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

    def _written(self, job: Job) -> None:
        """Books that the drawn token has been read."""
        reader, token = job.reader, job.next
        if token is None:
            return
        reader.position += 1
        reader.losses.add_written(1)
        reader.recent.append(token)
        if reader.durable:
            reader.unlogged.append(token)
        job.next, job.written = None, job.written + 1
        job.served += 1 / self._M
        self._jobs.counts["tokens_written"] += 1

    def step(self, heads: list[Job]) -> bool:
        """Takes the inner steps that the next tokens of a group of writers ask for, and reads these tokens.

        They leave their lanes for it, since they need room twice, and come back.
        """
        jobs, lanes = self._jobs, self._lanes
        due = sorted((job for job in lanes.jobs if job.next is not None), key=lambda job: job.ticket)
        due = due[: self._most(self._M, hurried=True)]
        for job in due:
            jobs.guarded([job], lanes.leave, job)
        # who had to leave for the host, or never is in a lane, reads when it is here
        waiting = [job for job in heads if job.ready and job.next is not None and job.reader.lane is None]
        waiting = [job for job in waiting if jobs.is_here(job)]
        worked = stepped = False
        while waiting and not stepped:
            group = self._group(waiting, 1, hurried=True)
            stepped = self._step_is_due(group[0])
            for job in due:
                if job not in group:
                    self._come_back(job)
            began = time.perf_counter()
            jobs.guarded(group, self._read_group, group, 1)
            self._debt -= time.perf_counter() - began
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
        """Reads a piece of text with a group of readers; says whether there was any."""
        jobs = self._jobs
        readers = [job for job in heads if job.ready and job.reads and job.next is None]
        for job in readers:
            if job.task.cancelled and not job.replay and self._at_a_boundary(job):
                jobs.guarded([job], jobs.cancel_reading, job)
        readers = [job for job in readers if job.ready]
        if not self._lanes.jobs and not any(job.next is not None for job in heads):
            self._debt = 0.0
        if not readers or self._debt > 0:
            return False
        owner = min(readers, key=lambda job: (jobs.shares.had(job.reader.owner), job.ticket)).reader.owner
        # every other time: a short text need not wait until all long ones of its owner have had a turn
        short_first, self._short_first[owner] = self._short_first[owner], not self._short_first[owner]
        readers.sort(
            key=lambda job: (
                jobs.shares.had(job.reader.owner),
                job.reader.owner == owner and short_first and len(job.tokens) - job.done > self._long,
                job.ticket,
            )
        )
        here = [job for job in readers if jobs.is_here(job)]
        if not here:
            return False
        hurried = self._is_hurried(heads, here[0])
        size = self._short if hurried else self._long
        group = self._group(here, size, hurried=hurried)
        began = time.perf_counter()
        jobs.guarded(group, self._read_group, group, size)
        self._debt = time.perf_counter() - began
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

    def _at_a_boundary(self, job: Job) -> bool:
        state = job.reader.state
        return state is None or state.hidden.shape[1] in (0, self._M)

    def _tokens(self, job: Job, size: int) -> Sequence[int]:
        """What a job reads next: the drawn token, or as much as brings it to the end of a mini-batch, or `size`."""
        if job.next is not None:
            return (job.next,)
        waiting = state_of(job.reader).hidden.shape[1]
        count = self._M - waiting if job.learns and 0 < waiting < self._M else size
        return job.tokens[job.done : job.done + count]

    def _group(self, jobs: list[Job], size: int, *, hurried: bool) -> list[Job]:
        """The first job, and those that can be read together with it."""
        if not jobs:
            return []
        first = len(self._tokens(jobs[0], size))
        if self._step_is_due(jobs[0]):
            first = max(first, self._M)
        key = self._key(jobs[0], size)
        return [job for job in jobs if self._key(job, size) == key][: self._most(first, hurried=hurried)]

    def _step_is_due(self, job: Job) -> bool:
        return job.learns and state_of(job.reader).hidden.shape[1] == self._M

    def _most(self, tokens: int, *, hurried: bool) -> int:
        """Sessions that may read so many tokens each as one group."""
        jobs = self._jobs
        if jobs.alone:
            return 1
        most = GROUP
        if hurried and tokens >= self._M:  # until it has been seen how long one takes: one
            most = min(most, int(HOLD / self._pace)) if self._pace else 1
        return max(1, min(jobs.limits.max_batch, most // max(1, tokens)))

    def _key(self, job: Job, size: int) -> tuple[Any, ...]:
        return job.reader.shapes, len(self._tokens(job, size)), job.learns, job.logprobs if job.reads else 0

    def _read_group(self, group: list[Job], size: int) -> None:
        """Reads the next tokens of jobs that are a group."""
        jobs = self._jobs
        began = time.perf_counter()
        pieces = [list(self._tokens(job, size)) for job in group]
        before = [state_of(job.reader) for job in group]
        learn, top, scored = group[0].learns, group[0].logprobs if group[0].reads else 0, group[0].next is None
        for job in group:
            jobs.computing(job)
        try:
            with jobs.lock.released():
                found = self._computed(before, pieces, learn=learn, top=top, may_rescue=scored)
        except torch.OutOfMemoryError:
            if len(group) == 1:
                raise
            half = len(group) // 2
            for part in (group[:half], group[half:]):
                self._read_group(part, size)
            return
        seconds = time.perf_counter() - began
        if len(pieces[0]) >= self._M:
            self._pace = seconds / sum(map(len, pieces))
        jobs.counts["groups"] += 1
        for job, tokens, piece in zip(group, pieces, found, strict=True):
            reader = job.reader
            reader.rest(piece.state)
            reader.steps += len(piece.norms)
            reader.rolled_back += piece.refused
            jobs.counts["steps"] += len(piece.norms)
            jobs.counts["rolled_back"] += piece.refused
            if job.next is not None:
                self._written(job)
                continue
            reader.position += len(tokens)
            if job.wrote:
                reader.losses.add_written(len(tokens))
            else:
                reader.losses.add(piece.nll)
            reader.recent.extend(tokens)
            job.done += len(tokens)
            job.served += 1
            job.steps, job.rolled_back = job.steps + len(piece.norms), job.rolled_back + piece.refused
            job.nll += piece.nll
            jobs.counts["tokens_read"] += len(tokens)
            if not job.replay:
                job.task._emit(Progress(reader.position, piece.nll, piece.norms, seconds, piece.top))
            jobs.measure_drift(reader, DRIFT_EVERY)
            if not job.reads and job.sampling is None:
                jobs.end_reading(job)

    def _computed(
        self, before: list[ReadingState], pieces: list[list[int]], *, learn: bool, top: int, may_rescue: bool
    ) -> list[_Read]:
        """What comes of reading a piece from each of these states."""
        model, inner = self._jobs.model, self._jobs.inner
        tokens = torch.tensor(pieces, device=model.device)
        found = read(model, together(before), tokens, inner=inner, learn=learn, guard=True, top=top)
        states = apart(found.state)
        nll, norms, refused = found.nll.tolist(), found.inner_grad_norm.tolist(), found.rolled_back.tolist()
        likeliest = tops(found) or [[] for _ in before]
        results = []
        for i, state in enumerate(states):
            back = sum(refused[i])
            if may_rescue and learn and self._may_be_broken(nll[i]):
                rescued = rescue(model, before[i], tokens[i : i + 1], _alone(found, i, state), inner=inner)
                if rescued is not None:
                    state, back = rescued, len(norms[i])
            results.append(_Read(state, nll[i], norms[i], back, likeliest[i]))
        return results

    def _may_be_broken(self, nll: list[float]) -> bool:
        newest = [x for x in nll[-self._M :] if x == x]  # the first of all is NaN
        return not newest or not sum(newest) / len(newest) <= math.log(self._jobs.model.config.vocab_size)


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
