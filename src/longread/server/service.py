"""What all routes share: the engine, the tokenizer, the limits, who is asking, and what requests have under way."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, ParamSpec, Self, TypeVar
from urllib.parse import parse_qsl

from fastapi import Depends, Request

from longread.config import ModelConfig
from longread.data import TextFormat
from longread.engine import Appended, Engine, Finished, Task
from longread.files import make_private
from longread.server.errors import ApiError, stopping
from longread.server.metrics import Meters
from longread.server.openai.history import History
from longread.server.tenants import Keys, ServerLimits
from longread.tokenizer import Tokenizer

THREADS = 32
"""For calls that wait; more requests than this may be under way, only not wait for a disk at the same time."""
CLOSE_SECONDS = 120.0
"""That the engine may take to save all sessions when the server stops."""

P = ParamSpec("P")
R = TypeVar("R")


@dataclass
class Service:
    """One model being served."""

    engine: Engine
    tokenizer: Tokenizer
    config: ModelConfig
    name: str
    """Of the model, in requests and answers."""
    fingerprint: str
    device: str
    scratch: Path
    """Where files lie on their way in and out; it belongs to this server alone."""
    keys: Keys = field(default_factory=Keys)
    metrics_keys: Keys = field(default_factory=Keys)
    """What opens /metrics, and nothing else does then; none: tenants' keys open it."""
    limits: ServerLimits = field(default_factory=ServerLimits)
    keep_line_ends: bool = False
    """Whether carriage returns of texts are read; else CRLF and CR become LF, as wherever the library reads text."""
    learn: bool = True
    """Whether sessions learn where a request does not say."""
    reuse: bool = False
    """Whether prompts go on from what sessions have read, where a request does not say."""
    created: int = field(default_factory=lambda: int(time.time()))
    stopping: bool = False
    """Whether new requests are refused."""
    ending: bool = False
    """Whether what is under way is ended too."""
    requests: Counter[str] = field(default_factory=Counter)
    """Under way, of each tenant."""
    meters: Meters = field(default_factory=Meters)
    works: set[Work] = field(default_factory=set)
    """What requests have under way in the engine."""

    def __post_init__(self) -> None:
        self.scratch = self.scratch.absolute()
        self.meters.follow(self.engine)
        self.history = History(None if self.engine.directory is None else self.engine.directory / "responses.sqlite")
        self._threads = ThreadPoolExecutor(THREADS, "longread-server")

    @property
    def directories(self) -> list[Path]:
        """Where files are, of which no client shall hear."""
        return [self.scratch] if self.engine.directory is None else [self.scratch, self.engine.directory]

    @property
    def busy(self) -> bool:
        """Whether any request is under way."""
        return any(self.requests.values())

    def end(self) -> None:
        """Ends what is under way, and what will be, at the next token or mini-batch."""
        self.ending = True
        for work in list(self.works):
            work.cut_off()

    def tidy(self) -> None:
        """Removes what a killed server left of files on their way."""
        make_private(self.scratch)
        for path in self.scratch.iterdir():
            path.unlink()

    async def run(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Calls something that waits, for a disk or for the engine, without holding up other requests."""
        call = functools.partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    def close(self) -> None:
        """Stops the engine, which saves all sessions."""
        self.stopping = True
        self.engine.close(CLOSE_SECONDS)
        self.history.close()
        self._threads.shutdown(wait=False)

    def encode(self, text: str, *, bos: bool, inside: bool = False) -> tuple[list[int], list[int]]:
        """Token ids of `text` and the UTF-8 bytes of each; BOS, if it is wanted and there is one, covers none.

        `inside`: the text goes on from what a session has read.
        """
        text = TextFormat(keep_line_ends=self.keep_line_ends).normalized(text)
        encode = self.tokenizer.encode_inside if inside else self.tokenizer.encode_with_bytes
        ids, lengths = encode(text)
        beginning = self.tokenizer.beginning if bos else []
        return [*beginning, *ids], [0] * len(beginning) + lengths

    def learns(self, asked: bool | None) -> bool:
        """Whether a new session learns."""
        return self.learn if asked is None else asked

    def reuses(self, asked: bool | None) -> bool:
        """Whether a prompt may go on from what a session has read."""
        return self.reuse if asked is None else asked

    def check_model(self, model: str) -> None:
        """Refuses the name of a model that is not here."""
        if model != self.name:
            message = f"there is no model {model[:100]!r} here; there is {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def check_tokens(self, ids: list[int], param: str) -> None:
        """Refuses ids that the model does not know, before anything else is done with them."""
        if ids and (min(ids) < 0 or max(ids) >= self.config.vocab_size):
            wrong = next(i for i in ids if not 0 <= i < self.config.vocab_size)
            raise ApiError(400, f"token id {wrong} is not in the vocabulary of {self.config.vocab_size}", param=param)

    def check_amount(self, tokens: int) -> None:
        """Refuses a request that makes the model read and write too much."""
        if tokens > self.limits.tokens:
            raise ApiError(
                413,
                f"{tokens} tokens are more than {self.limits.tokens}, which one request may cost; send several",
            )

    @property
    def stop_ids(self) -> frozenset[int]:
        """What ends a text: the beginning of another."""
        return frozenset(self.tokenizer.beginning)


class Running:
    """One engine task: iterate over its events, then take its `result`."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self._outcome: Any = None
        task.subscribe(self._deliver)

    def _deliver(self, event: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def __aiter__(self) -> AsyncIterator[Any]:
        while self._outcome is None:
            event = await self._events.get()
            if isinstance(event, Appended | Finished | BaseException):
                self._outcome = event
            else:
                yield event

    async def result(self) -> Any:
        """Waits for the outcome; raises it if it is an error."""
        async for _ in self:
            pass
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome


class Work:
    """All tasks of one request. They are cancelled when the time is up, and when the client has gone.

    Use it as an asynchronous context; leaving it cancels what still runs.
    """

    def __init__(self, service: Service, request: Request, *, survives: bool = False) -> None:
        self.tenant: str = request.scope["longread.tenant"]
        self._request, self._survives = request, survives
        self._service, self._seconds = service, service.limits.seconds
        self._running: list[Running] = []
        self._late = self._over = False

    async def __aenter__(self) -> Self:
        self._service.works.add(self)
        self._watch = asyncio.create_task(self._wait_until_gone())
        self._clock = asyncio.get_running_loop().call_later(self._seconds, self._time_is_up)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._service.works.discard(self)
        self._clock.cancel()
        self._watch.cancel()
        if not self._survives or error is not None:
            self.cut_off()

    async def run(self, begin: Callable[P, Task], /, *args: P.args, **kwargs: P.kwargs) -> Running:
        """Begins a task and takes charge of it."""
        running = Running(await self._service.run(begin, *args, **kwargs))
        self._running.append(running)
        if self._over or self._service.ending:
            running.task.cancel()
        return running

    def cut_off(self) -> None:
        """Ends everything at the next token or mini-batch."""
        self._over = True
        for running in self._running:
            running.task.cancel()

    def check(self, ended: str, **facts: Any) -> None:
        """Raises if it was the clock, or the end of the server, that cancelled something; not for what is finished.

        Args:
            ended: what became of it and what to do, the end of the sentence.
            facts: the same for programs.
        """
        if self._late:
            raise ApiError(504, f"the request took more than {self._seconds:g} seconds; {ended}", **facts)
        if self._service.stopping:
            raise stopping(ended, **facts)

    async def _wait_until_gone(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        if not self._survives:
            self.cut_off()

    def _time_is_up(self) -> None:
        self._late = True
        self.cut_off()


def of_app(name: str) -> Any:
    """What a route is given that the application holds under this name."""

    async def given(request: Request) -> Any:  # in the event loop: one that is not asynchronous waits for a thread
        return getattr(request.app.state, name)

    return Depends(given)


async def _tenant(request: Request) -> str:
    tenant: str = request.scope["longread.tenant"]
    return tenant


async def _check_query(request: Request) -> None:
    known = [parameter.alias for parameter in request.scope["route"].dependant.query_params]
    try:
        query = request.scope["query_string"].decode("ascii")
        names = [name for name, _ in parse_qsl(query, keep_blank_values=True, errors="strict")]
    except UnicodeDecodeError:
        raise ApiError(400, "the query is not UTF-8 in percent-encoding; encode it so") from None
    for name in names:
        if name not in known:
            remedy = f"there are {', '.join(known)}" if known else "there are none"
            raise ApiError(400, f"there is no query parameter {name[:60]!r} here; {remedy}", code="unknown_parameter")
        if names.count(name) > 1:
            raise ApiError(400, f"the query parameter {name} is given {names.count(name)} times; give it once")


TheService = Annotated[Service, of_app("service")]
Tenant = Annotated[str, Depends(_tenant)]
CHECKED_QUERY = Depends(_check_query)
"""For the routes of a router: its query parameters are checked as strictly as bodies, since a slip, or a second value,
would change what a request does."""


def number(value: float) -> float | None:
    """A number for JSON, which has no NaN: the first token of all has no log-probability."""
    return value if math.isfinite(value) else None
