"""The process: where it listens, how it stops, and clients that are too slow to say what they want."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import time
from collections.abc import Iterator
from typing import Any

from longread.config import UserError
from longread.server.app import create_app
from longread.server.errors import ApiError, logger
from longread.server.service import Service
from longread.signals import Requests

HEADER_SECONDS = 20.0
"""In which a client must have sent the head of a request, once it is connected or has begun."""
PATIENCE_SECONDS = 10.0
"""For requests to end when the server stops; then they are ended, at the next token or mini-batch."""
ENDING_SECONDS = 10.0
"""For that; then their connections are closed."""
_TICK = 0.05


def run(service: Service, listener: socket.socket) -> None:
    """Serves on a bound socket until SIGINT or SIGTERM, lets requests end, and closes the engine."""
    asyncio.run(make_server(service, listener).serve(sockets=[listener]))


def make_server(service: Service, listener: socket.socket) -> Any:
    """A uvicorn server of the application that is to be served on the socket."""
    import uvicorn

    config = uvicorn.Config(
        create_app(service),
        http=_impatient_protocol(),
        ws="none",
        lifespan="on",
        access_log=False,  # numbers are in /metrics; addresses and paths need not be kept
        log_config=None,  # the process that serves has one already
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=1,  # requests have had their time by then
        limit_concurrency=None,
    )
    host, port = listener.getsockname()[:2]
    return _draining_server()(config, service, f"http://{f'[{host}]' if ':' in host else host}:{port}")


def listen(host: str, port: int, *, has_keys: bool) -> socket.socket:
    """A bound socket; without keys only for addresses that nobody else can reach. Port 0 takes a free one.

    Raises:
        UserError: the address cannot be bound, or others could reach a server that has no keys.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise UserError(f"there is no address {host}: {error.strerror}; give one of this machine's") from None
    family, _, _, _, address = found[0]
    if not has_keys and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise UserError(f"{host} can be reached by others, and there are no keys; give --keys, or use 127.0.0.1")
    # with the protocol said, asyncio switches Nagle's algorithm off; else every answer may wait for 40 ms
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise UserError(f"cannot listen on {host} port {port}: {error.strerror}; choose another with --port") from None
    return listener


def find_uvicorn() -> None:
    """Raises `ModuleNotFoundError` if it is not there."""
    import uvicorn  # noqa: F401


def _draining_server() -> type[Any]:
    from uvicorn import Server

    class Draining(Server):
        """On a signal refuses new requests, lets those under way end, and only then closes its socket.

        uvicorn would close it first, so that nobody could be told to come back, and would raise the signal again at
        the end.
        """

        def __init__(self, config: Any, service: Service, address: str) -> None:
            super().__init__(config)
            self._service, self._address = service, address
            self._requests = Requests()

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            logger.info("%s is served at %s", self._service.name, self._address)

        def handle_exit(self, sig: int, frame: Any) -> None:
            if self._requests.is_new(sig):  # a second one, unlike an echo, asks to hurry
                self._service.stopping = True
                super().handle_exit(sig, frame)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            logger.info("stopping: requests may end within %g seconds, then all sessions are saved", PATIENCE_SECONDS)
            await self._while_busy(PATIENCE_SECONDS)
            self._service.end()
            await self._while_busy(ENDING_SECONDS)
            await super().shutdown(sockets)

        async def _while_busy(self, seconds: float) -> None:
            """Waits until no request is under way, at most so long, and not if a second signal asks to hurry."""
            end = time.monotonic() + seconds
            while self._service.busy and time.monotonic() < end and not self.force_exit:
                await asyncio.sleep(_TICK)

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            with super().capture_signals():
                try:
                    yield
                finally:
                    self._captured_signals.clear()

    return Draining


def _impatient_protocol() -> type[asyncio.Protocol]:
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Impatient(H11Protocol):
        """Closes connections on which the head of a request does not come; uvicorn waits for it for ever.

        A head that is no HTTP is answered as every other error.
        """

        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_waiting()
            elif self._deadline is None:
                self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
                remedy = "send it with an HTTP client"
                answer = ApiError(
                    400, f"this is no HTTP/1.1 request; {remedy}", headers={"Connection": "close"}
                ).response()
                head = b"".join(b"%s: %s\r\n" % header for header in answer.raw_headers)
                self.transport.write(b"HTTP/1.1 400 Bad Request\r\n%s\r\n%s" % (head, bytes(answer.body)))
            self.transport.close()

        def _wait(self) -> None:
            self._deadline = self.loop.call_later(HEADER_SECONDS, self.transport.close)

        def _stop_waiting(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return Impatient
