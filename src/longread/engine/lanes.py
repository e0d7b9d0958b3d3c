"""The sessions that write at the moment: those in lanes, a token of all of them at a time, or one by one where a batch
must change no bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longread.config import InnerConfig
from longread.engine.records import Job, RecordsLock, Tier
from longread.inner_loop import ReadingState
from longread.inner_loop.kept import kept_nbytes
from longread.inner_loop.places import Places
from longread.inner_loop.state import compact
from longread.model import Transformer

HOST = torch.device("cpu")
HOST_TIER: Tier = "host"


class Lanes:
    """Jobs in lanes 0, 1, … without a gap; places are made as they are needed, at most `most`.

    All of this is for the thread that computes, and lets the lock go while anything is copied.

    Args:
        apart: whether each lane is computed by itself (`Limits.batch_invariant`).
    """

    def __init__(self, model: Transformer, most: int, lock: RecordsLock, *, apart: bool = False) -> None:
        self.model, self.most, self._lock, self._apart = model, most, lock, apart
        self.possible = model.config.decodes_in_place
        """Whether this model decodes in lanes; others are read token by token instead."""
        self.jobs: list[Job] = []
        self._places: Places | SeparatePlaces | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all places, and of the fast weights that their occupants keep beside them."""
        if self._places is None:
            return 0
        return self._places.nbytes + len(self.jobs) * fast_nbytes(self.model)

    @property
    def lanes(self) -> int:
        """How many there are, empty ones included."""
        return 0 if self._places is None else self._places.lanes

    @property
    def lane_nbytes(self) -> int:
        """Bytes of one more lane, about."""
        if self._places is not None:
            return self._places.nbytes // self._places.lanes
        return largest_session(self.model) + self.model.config.vocab_size * 8

    def resize(self, lanes: int) -> None:
        """Makes or adds empty lanes, or gives the memory of the last back, which must be empty."""
        if not lanes:
            self._places = None
            return
        with self._lock.released():
            if self._places is None:
                self._places = (
                    SeparatePlaces(self.model, lanes) if self._apart else Places(self.model, lanes, learn=True)
                )
            else:
                self._places.resize(lanes)

    def enter(self, job: Job) -> None:
        """Moves a session, which has read something and is where the model is, into a lane."""
        reader = job.reader
        if reader.state is None:
            raise LookupError(f"session {reader.id} has no state to write from")
        lane = len(self.jobs)
        if self._places is None or lane >= self.lanes:
            raise LookupError("there is no empty lane")
        with self._lock.released():
            self._places.put(lane, reader.state, learn=job.learns)
        self.jobs.append(job)
        reader.lane, reader.state = lane, None

    def state(self, job: Job, device: torch.device | None = None) -> ReadingState:
        """The state of a session in a lane, as a value, on another device if one is given."""
        if self._places is None or job.reader.lane is None:
            raise LookupError(f"session {job.reader.id} is in no lane")
        with self._lock.released():
            return compact(self._places.take(job.reader.lane, device=device))

    def state_somewhere(self, job: Job) -> tuple[ReadingState, Tier]:
        """The same on the device, or in the host's memory where the device has none left; and which of them."""
        try:
            return self.state(job), "device"
        except torch.OutOfMemoryError:
            return self.state(job, HOST), HOST_TIER

    def leave(self, job: Job, *, to_host: bool = False) -> None:
        """Moves a session out of its lane, onto the device or into the host's memory; the last takes its place.

        Into the host's memory too where the device turns out to have none left.
        """
        lane, places, tier = job.reader.lane, self._places, HOST_TIER
        if to_host:
            state = self.state(job, HOST)
        else:
            state, tier = self.state_somewhere(job)
        if places is None or lane is None:
            raise LookupError(f"session {job.reader.id} is in no lane")
        job.reader.rest(state)
        job.reader.lane, job.reader.tier = None, tier
        places.leave(lane)
        last = self.jobs.pop()
        if last is not job:
            with self._lock.released():
                places.move(last.reader.lane or 0, lane)
            last.reader.lane, self.jobs[lane] = lane, last

    def first(self, jobs: list[Job]) -> None:
        """Moves some of the jobs into the first lanes."""
        wanted, places = set(jobs), self._places
        ahead = [job for job in self.jobs[: len(jobs)] if job not in wanted]
        behind = [job for job in self.jobs[len(jobs) :] if job in wanted]
        for one, other in zip(ahead, behind, strict=True):
            lane, origin = one.reader.lane, other.reader.lane
            if places is None or lane is None or origin is None:
                raise LookupError(f"session {one.reader.id} or {other.reader.id} is in no lane")
            state, _ = self.state_somewhere(one)
            with self._lock.released():
                places.leave(lane)
                places.move(origin, lane)
                one.reader.lane, other.reader.lane = origin, lane
                self.jobs[origin], self.jobs[lane] = one, other
                places.put(origin, state, learn=one.learns)  # last: if it fails, nobody is taken for somebody else

    def due(self, job: Job) -> bool:
        """Whether the next token of a job asks for an inner step first."""
        return self._places is not None and job.reader.lane is not None and self._places.due(job.reader.lane)

    def step(self, job: Job, inner: InnerConfig) -> bool:
        """Takes the inner step that the drawn token of a job asks for; says whether it was refused.

        This and what follows is called with the lock let go.
        """
        if self._places is None or job.reader.lane is None or job.next is None:
            raise LookupError(f"session {job.reader.id} is in no lane")
        return bool(self._places.step(job.reader.lane, torch.tensor([job.next]), inner))

    def logits(self) -> Tensor:
        """Of the next tokens of all jobs, [jobs, V]."""
        if self._places is None:
            raise LookupError("nobody is in a lane")
        return self._places.logits(len(self.jobs))

    def likeliest(self, count: int) -> list[tuple[int, float]]:
        """The likeliest next token of each of the first jobs, and its log-probability."""
        if self._places is None:
            raise LookupError("nobody is in a lane")
        return self._places.likeliest(count)

    def read(self, count: int) -> None:
        """Reads the drawn tokens of the first jobs; none may be due."""
        if isinstance(self._places, Places) and count:
            self._places.read(torch.tensor([job.next for job in self.jobs[:count]]))

    def read_one(self, job: Job) -> None:
        """Reads the drawn token of one job, where lanes share nothing."""
        if not isinstance(self._places, SeparatePlaces) or job.reader.lane is None or job.next is None:
            raise LookupError(f"session {job.reader.id} is in no lane of its own")
        self._places.read_one(job.reader.lane, job.next)

    def abandon(self) -> list[Job]:
        """Empties all lanes without looking at what is in them."""
        jobs, self.jobs, self._places = self.jobs, [], None
        for job in jobs:
            job.reader.lane = None
        return jobs


class SeparatePlaces:
    """What `Places` is, with places of its own for each lane: what a sequence gives in one is bit for bit what it gives
    alone.

    Products over several rows sum in another order than those over one, and attention over more slots than needed does
    too.
    """

    def __init__(self, model: Transformer, lanes: int) -> None:
        self._model = model
        self._each: list[Places] = []
        self._learning: list[bool] = []
        self.resize(lanes)

    @property
    def lanes(self) -> int:
        """How many there are, empty ones included."""
        return len(self._each)

    @property
    def nbytes(self) -> int:
        """Bytes of all lanes."""
        return sum(places.nbytes for places in self._each)

    def resize(self, lanes: int) -> None:
        """Adds empty lanes, or takes the last away, which must be empty."""
        more = lanes - self.lanes
        self._each = [*self._each, *(Places(self._model, 1, learn=True) for _ in range(more))][:lanes]
        self._learning = [*self._learning, *[True] * more][:lanes]

    def put(self, lane: int, state: ReadingState, *, learn: bool) -> None:
        """Lets the sequence of `state`, which has read something, go on in a lane."""
        if learn != self._learning[lane]:  # one that does not learn looks back less far
            self._each[lane], self._learning[lane] = Places(self._model, 1, learn=learn), learn
        self._each[lane].put(0, state, learn=learn)

    def take(self, lane: int, device: torch.device | None = None) -> ReadingState:
        """The state, as a value, of the sequence in a lane, on another device if one is given."""
        return self._each[lane].take(0, device=device)

    def leave(self, lane: int) -> None:
        """Makes a lane empty."""
        self._each[lane].leave(0)

    def move(self, origin: int, lane: int) -> None:
        """Moves a sequence into an empty lane."""
        places, learning = self._each, self._learning
        places[origin], places[lane] = places[lane], places[origin]
        learning[origin], learning[lane] = learning[lane], learning[origin]

    def due(self, lane: int) -> bool:
        """Whether the sequence must step before its next token is read."""
        return self._each[lane].due(0)

    def step(self, lane: int, tokens: Tensor, inner: InnerConfig) -> Tensor:
        """Takes the inner step of the sequence in a lane, as `Places.step` does."""
        return self._each[lane].step(0, tokens, inner)

    def logits(self, count: int) -> Tensor:
        """Of the next token of the first `count` lanes, [count, V]."""
        return torch.cat([places.logits(1) for places in self._each[:count]])

    def likeliest(self, count: int) -> list[tuple[int, float]]:
        """The likeliest next token of each of the first `count` lanes, and its log-probability."""
        return [found for places in self._each[:count] for found in places.likeliest(1)]

    def read_one(self, lane: int, token: int) -> None:
        """Reads one token in a lane; it may not be due."""
        self._each[lane].read(torch.tensor([token], device=self._model.device))


def largest_session(model: Transformer) -> int:
    """Bytes of a session whose windows are full and whose mini-batch is complete; without windows, of an empty one."""
    config, itemsize = model.config, model.dtype.itemsize
    M = config.mini_batch_size if config.num_suffix_blocks else 0
    above = config.num_blocks - model.num_lower_attentions if config.mixer == "attention" else 0
    windows = [config.window_of(i) for i in range(config.num_blocks) if "attention" in config.mixers_of(i)]
    tokens = sum(2 * window for window in windows if window is not None) + 2 * above * M
    numbers = tokens * config.kv_width + (M + 1) * config.width
    return fast_nbytes(model) + numbers * itemsize + max(0, M - 1) * 9 + kept_nbytes(model)


def fast_nbytes(model: Transformer) -> int:
    """Bytes of the fast weights of one session, float32 or wider."""
    return model.config.num_fast_weights * max(4, model.embedding.weight.dtype.itemsize)
