"""What all routes share: the engine, the tokenizer, the limits, and who is asking."""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ParamSpec, TypeVar

from fastapi import Depends, Request

from longread.config import ModelConfig
from longread.data import TextFormat
from longread.engine import Engine
from longread.files import make_private
from longread.server.errors import ApiError
from longread.server.keys import Keys
from longread.server.limits import ServerLimits
from longread.server.metrics import Meters
from longread.server.openai.history import History
from longread.tokenizer import Tokenizer

if TYPE_CHECKING:
    from longread.server.work import Work

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


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _tenant(request: Request) -> str:
    tenant: str = request.scope["longread.tenant"]
    return tenant


TheService = Annotated[Service, Depends(_service)]
Tenant = Annotated[str, Depends(_tenant)]


def number(value: float) -> float | None:
    """A number for JSON, which has no NaN: the first token of all has no log-probability."""
    return value if math.isfinite(value) else None
