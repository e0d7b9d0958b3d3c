"""Appending to sessions, and scoring with them: texts that are read while the client watches."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from longread.config import UserError
from longread.engine import Appended, Progress, UnknownSession, WrongPosition
from longread.server.catalog import Catalog, Entry
from longread.server.choices import merged
from longread.server.errors import ApiError, as_api_error
from longread.server.service import Running, Service, Work, number
from longread.server.sessions.losses import Losses
from longread.server.stream import Event

STREAM_BIN = 64


class SessionReading:
    """One text being read by a session and by its frozen twin.

    Args:
        text: what to read; at position 0 a BOS comes before it, if the tokenizer has one.
        tokens: what to read instead, as it is.
        keep: the session goes on from here; False reads on a fork that is dropped.
        expected_position: where the client believes the session to be.
        skip: tokens at the beginning that the session has read already.
        bin_size: tokens of a bin; None: no bins.
    """

    def __init__(
        self,
        service: Service,
        catalog: Catalog,
        tenant: str,
        session: str,
        *,
        text: str | None = None,
        tokens: list[int] | None = None,
        keep: bool = True,
        expected_position: int | None = None,
        skip: int = 0,
        bin_size: int | None = None,
    ) -> None:
        self._service, self._catalog, self._tenant, self._session = service, catalog, tenant, session
        self._text, self._tokens, self.keep, self._expected, self._bin = text, tokens, keep, expected_position, bin_size
        self._skip = skip
        self._begun = time.perf_counter()
        self._reached, self._more, self._over = 0, asyncio.Event(), False
        self._pieces: deque[int] = deque()
        self._norms: list[float] = []
        self._entry: Entry
        self._ids: Sequence[int]
        self._losses: Losses
        self._outcome: Appended

    async def events(self, work: Work) -> AsyncGenerator[Event, None]:
        """Progress as it is made; the last one has the unfinished bin."""
        async with self._catalog.turn(self._session):
            await self._prepare()
            engine = self._service.engine
            if self.keep:
                running = await work.run(engine.append, self._session, self._ids, expected_position=self._expected)
                self._catalog.under_way(self._session, running.task)
            else:
                running = await work.run(engine.score, self._session, self._ids)
            sources = [self._read(running)]
            if self._entry.twin is not None:
                sources.append(self._read_along(work, self._entry.twin))
            async for number, event in merged(sources):
                if number == 0:
                    self._losses.add(event.nll)
                    self._norms += event.grad_norms
                else:
                    self._losses.add_frozen(event.nll)
                yield "progress", self._progress(final=False)
            self._outcome = await self._result(running)
            if not self._reached:  # acknowledged before: the answer is given again, without events
                self._losses.drop_twin()
                self._losses.add(self._outcome.nll)
        self._service.meters.tokens.labels("read").inc(self._losses.tokens)
        last = self._progress(final=True)
        if last["bins"] and last["bins"]["start"]:
            yield "progress", last
        if self._outcome.cancelled:
            ended = f"it had read {self._reached} of {len(self._ids)} tokens"
            remedy = "they stay read, so go on from there" if self.keep else "the session is as it was, so send less"
            work.check(f"{ended}; {remedy}", **self._how_far())

    def done(self) -> dict[str, Any]:
        """The reading, once it is over."""
        seconds = time.perf_counter() - self._begun
        tokens = self._outcome.position - self._losses.start
        return {
            "session": self._session,
            "start": self._losses.start,
            "position": self._outcome.position,
            "tokens": tokens,
            **self._losses.means(),
            "steps": self._outcome.steps,
            "rolled_back": self._outcome.rolled_back,
            "cancelled": self._outcome.cancelled,
            "seconds": seconds,
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "bins": None,
        }

    async def _prepare(self) -> None:
        self._entry = await self._catalog.get(self._tenant, self._session)
        start = self._entry.info.position if self._expected is None else self._expected
        lengths, skip = None, self._skip
        if skip and self._expected is None:
            message = f"skip is {skip}, and expected_position is not given; give both, so that nothing is left out"
            raise ApiError(400, message, param="skip")
        if self._text is not None:
            fresh = start == skip
            self._ids, lengths = await self._service.run(self._service.encode, self._text, bos=fresh, inside=not fresh)
            lengths = lengths[skip:]
        else:
            self._ids = self._tokens or []
            self._service.check_tokens(self._ids, "tokens")
        if skip > min(start, len(self._ids)):
            message = f"skip is {skip}; the text has {len(self._ids)} tokens and the session has read {start}"
            raise ApiError(400, f"{message}, so it can be at most the smaller of the two", param="skip")
        self._ids = self._ids[skip:]
        self._service.check_amount(len(self._ids))
        twin = self._entry.twin is not None
        self._losses = Losses(start, lengths, bin_size=self._bin, total=len(self._ids), twin=twin)

    async def _result(self, running: Running) -> Appended:
        """The outcome; an error says how far the session came."""
        try:
            found: Appended = await running.result()
        except UserError as error:
            if not (self.keep and self._reached):
                raise
            raise as_api_error(error, self._service.directories).with_facts(**self._how_far()) from error
        return found

    def _how_far(self) -> dict[str, Any]:
        """What a client needs to go on after an end that came too early; a score leaves nothing to go on from."""
        if not self.keep:
            return {}
        start, tokens = self._losses.start, self._reached
        return {"start": start, "position": start + tokens, "tokens": tokens, "bytes": self._losses.num_bytes(tokens)}

    async def _read(self, running: Running) -> AsyncGenerator[Progress, None]:
        async for event in running:
            self._reached += len(event.nll)
            if self.keep and self._entry.twin is not None:
                self._pieces.append(len(event.nll))
            self._more.set()
            yield event
        self._over = True
        self._more.set()

    async def _read_along(self, work: Work, twin: str) -> AsyncGenerator[Progress, None]:
        """What the session has read its twin reads too, and no more, wherever the session stops.

        In the same pieces, whoever of the two is faster: other pieces would change the last bits of its losses.
        """
        engine, start = self._service.engine, self._losses.start
        try:
            if not self.keep:
                running = await work.run(engine.score, twin, self._ids)
                async for event in running:
                    yield event
                await running.result()
                return
            done = 0
            while not (self._over and done >= self._reached):
                await self._more.wait()
                self._more.clear()
                while done < self._reached:
                    new = self._ids[done : done + self._pieces.popleft()]
                    running = Running(await self._service.run(engine.append, twin, new, expected_position=start + done))
                    async for event in running:
                        yield event
                    done += len(new)
                    await running.result()
        except (UnknownSession, WrongPosition):  # after a crash it may stand elsewhere: it cannot be compared any more
            self._losses.drop_twin()
            if self.keep:
                await self._catalog.drop_twin(self._entry)

    def _progress(self, *, final: bool) -> dict[str, Any]:
        seconds, tokens = time.perf_counter() - self._begun, self._reached
        norms, self._norms = self._norms, []
        return {
            "position": self._losses.start + tokens,
            "tokens": tokens,
            "total": len(self._ids),
            "seconds": seconds,
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "grad_norms": [number(norm) for norm in norms],
            "bins": self._losses.new_bins(final=final),
        }


async def watched(reading: SessionReading, work: Work) -> AsyncGenerator[Event, None]:
    """The reading as a stream."""
    async with work:
        async for event in reading.events(work):
            yield event
    yield "done", reading.done()


async def whole(reading: SessionReading, work: Work) -> dict[str, Any]:
    """The reading in one piece, with all its bins. `work` has been entered."""
    bins: dict[str, Any] | None = None
    async for _, progress in reading.events(work):
        more = progress["bins"]
        if bins is None or more is None:
            bins = more if bins is None else bins
        else:
            bins = {name: None if more[name] is None else values + more[name] for name, values in bins.items()}
    return reading.done() | {"bins": bins}
