"""A piece of text, read by a group of sessions at once.

It is as long as pays. On a CPU it stands still after each mini-batch's work, so that others can have a turn. On a GPU,
whose graphs cannot, it is one mini-batch while somebody writes, but where a batch must change no bit: how a text is cut
changes the last bits too. While somebody writes, a group is as many sessions as read a mini-batch in `HOLD` seconds.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from longread.engine.interface import Progress
from longread.engine.jobs import Jobs
from longread.engine.records import Job, Reader
from longread.inner_loop import Reading, ReadingState, captured, read, rescue
from longread.inner_loop.state import apart, together

LONG, SHORT = 2048, 128
"""Tokens of a text that are read at a time, and where others wait for the end of that; or one mini-batch, if longer."""
STRETCHES = 4
"""On a GPU: of so many for which the lower half of the network runs at once."""
STEPS = 8
"""Most mini-batches of them."""
MOST_WORK = 8e9
"""Parameters times tokens of a piece on a CPU: about a second on two cores."""
GROUP = 4096
"""Most tokens of a group, or one piece."""
HOLD = 0.1
"""Seconds for which a group of several sessions may hold the device while somebody writes."""
DRIFT_EVERY = 32
"""Inner steps of a long text after which drift is measured again, which costs a small part of one."""


class _Read(NamedTuple):
    """What a group of sessions reads at once, and what came of it for one of them."""

    state: ReadingState
    nll: list[float]
    norms: list[float]
    refused: int
    """Steps that were not taken, or taken back."""
    top: list[list[tuple[int, float]]]


class _Unwanted(Exception):
    """Nobody waits any more for what is being read."""


class TextPieces:
    """Cuts texts, finds who can read together, and lets them read and books it."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._M = jobs.model.config.mini_batch_size
        on_gpu, work = jobs.model.device.type == "cuda", int(MOST_WORK / jobs.model.config.num_parameters)
        long = LONG if on_gpu else min(LONG, work)
        self.long, self.short = (self._M * min(STEPS, max(1, tokens // self._M)) for tokens in (long, SHORT))
        """Tokens of a piece, and of one for whose end others wait."""
        self.pauses = not on_gpu
        """Whether a long piece stands still now and then."""
        if on_gpu and not jobs.alone:
            self.long = max(self.long, STRETCHES * self._M * math.ceil(captured.STRETCH / self._M))
        if jobs.alone:
            self.short = self.long
        self._pace: float | None = None  # seconds a token, as read last

    def stops(self, job: Job) -> bool:
        """Whether a job that reads is to stop, and can: between two mini-batches, or where nothing is learned."""
        state = job.reader.state
        return job.task.cancelled and not job.replay and (state is None or state.hidden.shape[1] in (0, self._M))

    def _tokens(self, job: Job, size: int) -> Sequence[int]:
        """What a job reads next: the drawn token, or as much as brings it to the end of a mini-batch, or `size`."""
        if job.next is not None:
            return (job.next,)
        waiting = state_of(job.reader).hidden.shape[1]
        count = self._M - waiting if job.learns and 0 < waiting < self._M else size
        return job.tokens[job.done : job.done + count]

    def group(self, jobs: list[Job], size: int, *, hurried: bool) -> list[Job]:
        """The first job, and those that can be read together with it."""
        if not jobs:
            return []
        first = len(self._tokens(jobs[0], size))
        if self.step_is_due(jobs[0]):
            first = max(first, self._M)
        key = self._key(jobs[0], size)
        return [job for job in jobs if self._key(job, size) == key][: self.most(first, hurried=hurried)]

    def step_is_due(self, job: Job) -> bool:
        """Whether the next token asks for an inner step."""
        return job.learns and state_of(job.reader).hidden.shape[1] == self._M

    def most(self, tokens: int, *, hurried: bool) -> int:
        """Sessions that may read so many tokens each as one group."""
        jobs = self._jobs
        if jobs.alone:
            return 1
        most = GROUP // max(1, tokens)
        if hurried and tokens >= self._M:  # until it has been seen how long one takes: one
            held = self._M if self.pauses else tokens
            most = min(most, int(HOLD / self._pace) // held) if self._pace else 1
        return max(1, min(jobs.limits.max_batch, most))

    def _key(self, job: Job, size: int) -> tuple[Any, ...]:
        return job.reader.shapes, len(self._tokens(job, size)), job.learns, job.logprobs if job.reads else 0

    def read(self, group: list[Job], size: int, between: Callable[[], None] | None = None) -> None:
        """Reads the next tokens of jobs that are a group.

        Args:
            between: called whenever the piece stands still, with the lock held. Afterwards it is given up if nobody
                wants it any more: then nothing of it has been read.
        """
        jobs, paused = self._jobs, 0.0

        def pause(turn: Callable[[], None]) -> None:
            nonlocal paused
            stopped = time.perf_counter()
            with jobs.lock:
                turn()
                if all(self.stops(job) for job in group):
                    raise _Unwanted
            paused += time.perf_counter() - stopped

        began = time.perf_counter()
        pieces = [list(self._tokens(job, size)) for job in group]
        before = [state_of(job.reader) for job in group]
        pausing = None if between is None else functools.partial(pause, between)
        learn, top, scored = group[0].learns, group[0].logprobs if group[0].reads else 0, group[0].next is None
        for job in group:
            jobs.computing(job)
        try:
            with jobs.lock.released():
                found = self._computed(before, pieces, learn=learn, top=top, may_rescue=scored, pause=pausing)
        except _Unwanted:
            return
        except torch.OutOfMemoryError:
            if len(group) == 1:
                raise
            half = len(group) // 2
            for part in (group[:half], group[half:]):
                self.read(part, size, between)
            return
        seconds = time.perf_counter() - began - paused
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
                self._jobs.written(job)
                continue
            reader.extend(tokens, None if job.wrote else piece.nll)
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
        self,
        before: list[ReadingState],
        pieces: list[list[int]],
        *,
        learn: bool,
        top: int,
        may_rescue: bool,
        pause: Callable[[], None] | None,
    ) -> list[_Read]:
        """What comes of reading a piece from each of these states."""
        model, inner = self._jobs.model, self._jobs.inner
        tokens = torch.tensor(pieces, device=model.device)
        found = read(model, together(before), tokens, inner=inner, learn=learn, guard=True, top=top, pause=pause)
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


def tops(found: Reading) -> list[list[list[tuple[int, float]]]]:
    """For each sequence and token, the likeliest tokens in its place."""
    if found.top is None:
        return []
    values, ids = (x.tolist() for x in found.top)
    return [[list(zip(i, v, strict=True)) for i, v in zip(*row, strict=True)] for row in zip(ids, values, strict=True)]


def _alone(found: Reading, i: int, state: ReadingState) -> Reading:
    here = slice(i, i + 1)
    return Reading(state, found.nll[here], found.inner_grad_norm[here], found.rolled_back[here])
