"""The process: where it listens, how it stops, and clients that are too slow to say what they want."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Iterator
from typing import Any

from longread.config import UserError
from longread.server.app import create_app
from longread.server.log import logger
from longread.server.service import Service

HEADER_SECONDS = 20.0
"""In which a client must have sent the head of a request, once it is connected or has begun."""
PATIENCE_SECONDS = 10.0
"""For requests to end when the server stops; then they are ended, at the next token or mini-batch."""
GRACE_SECONDS = 20
"""After which their connections are closed, whether they have ended or not."""


def run(service: Service, listener: socket.socket) -> None:
    """Serves on a bound socket until SIGINT or SIGTERM, lets requests end, and closes the engine."""
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
        timeout_graceful_shutdown=GRACE_SECONDS,
        limit_concurrency=None,
    )
    server = _quiet_server()(config)
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def main() -> None:
        watch = asyncio.create_task(_announce(server, service, address))
        try:
            await server.serve(sockets=[listener])
        finally:
            watch.cancel()

    asyncio.run(main())


async def _announce(server: Any, service: Service, address: str) -> None:
    """Says what happens. New requests are refused from the moment of the signal on; those under way may end."""
    while not server.started:
        await asyncio.sleep(0.02)
    logger.info("%s is served at %s", service.name, address)
    while not server.should_exit:
        await asyncio.sleep(0.05)
    service.stopping = True
    logger.info("stopping: requests may end within %d seconds, then all sessions are saved", PATIENCE_SECONDS)
    await asyncio.sleep(PATIENCE_SECONDS)
    for work in list(service.works):
        work.cut_off()


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


def _quiet_server() -> type[Any]:
    from uvicorn import Server

    class Quiet(Server):
        """Stops on a signal and leaves it at that; uvicorn would raise the signal again once everything is closed."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            with super().capture_signals():
                try:
                    yield
                finally:
                    self._captured_signals.clear()

    return Quiet


def _impatient_protocol() -> type[asyncio.Protocol]:
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Impatient(H11Protocol):
        """Closes connections on which the head of a request does not come; uvicorn waits for it for ever."""

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

        def _wait(self) -> None:
            self._deadline = self.loop.call_later(HEADER_SECONDS, self.transport.close)

        def _stop_waiting(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return Impatient
